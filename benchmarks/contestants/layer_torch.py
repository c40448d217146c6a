"""The layer in PyTorch: the reference, PEFT, and the layer without LoRA; eager and compiled."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..case import Arrays, Unsupported, Work
from .common import torch_arrays, torch_ready, torch_work
from .layer import Given, Layer, draw

Named = Callable[[Arrays], Mapping[str, np.ndarray]]


def reference(layer: Layer, *, compiled: bool) -> Work:
    """Return the work of ``lora_torch_ref.LinearWithLoRA``."""
    given = draw(layer)
    torch = torch_ready()
    from lora_torch_ref import LinearWithLoRA

    module = LinearWithLoRA(_frozen_linear(given), layer.r, layer.alpha)
    trained = {"dA": module.lora.A, "dB": module.lora.B}
    with torch.no_grad():
        trained["dA"].copy_(torch.from_numpy(given.a))
        trained["dB"].copy_(torch.from_numpy(given.b))
    return _layer_work(given, module, trained, dict, compiled=compiled)


def peft(layer: Layer, *, compiled: bool) -> Work:
    """Return the work of PEFT's linear layer."""
    given = draw(layer)
    torch = torch_ready()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=layer.r, lora_alpha=layer.alpha, target_modules=["linear"])
    holder = torch.nn.ModuleDict({"linear": _frozen_linear(given)})
    module: Any = get_peft_model(holder, config).get_submodule("base_model.model.linear")
    trained = {"dA": module.lora_A.default.weight, "dB": module.lora_B.default.weight}
    with torch.no_grad():
        trained["dA"].copy_(torch.from_numpy(given.a.T))
        trained["dB"].copy_(torch.from_numpy(given.b.T))

    def turned(gradients: Arrays) -> Mapping[str, np.ndarray]:
        return {name: value.T for name, value in gradients.items()}

    return _layer_work(given, module, trained, turned, compiled=compiled)


def full(layer: Layer) -> Work:
    """Return the work of ``nn.Linear`` with a trained weight: y, dx and dW."""
    given = draw(layer)
    module = _linear(given.merged, layer.dtype)

    def chained(gradients: Arrays) -> Mapping[str, np.ndarray]:
        return given.chained(gradients["dW"].T)

    return _layer_work(given, module, {"dW": module.weight}, chained, compiled=False)


def _frozen_linear(given: Given) -> Any:
    return _linear(given.w, given.layer.dtype).requires_grad_(False)


def _linear(weight: np.ndarray, dtype: str) -> Any:
    torch = torch_ready()
    linear = torch.nn.Linear(*weight.shape, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(_placed(weight.T, dtype))
    return linear


def _placed(array: np.ndarray, dtype: str) -> Any:
    torch = torch_ready()
    return torch.tensor(array, dtype=getattr(torch, dtype))


def _layer_work(
    given: Given, module: Any, trained: Mapping[str, Any], named: Named, *, compiled: bool
) -> Work:
    """Return the work of a module.

    Args:
        given: x, g, and which work.
        module: ``y = module(x)``.
        trained: what gradients are taken of, by the names that they get.
        named: makes these gradients into dA and dB, outside the clock.
        compiled: by ``torch.compile``.
    """
    torch = torch_ready()
    x, g = (_placed(array, given.layer.dtype) for array in (given.x, given.g))
    module = module.to(x.device)
    call = _compiled(module) if compiled else module
    names, wanted = ("dx", *trained), (x, *trained.values())

    def forward() -> Any:
        with torch.no_grad():
            return {"y": call(x)}

    def both() -> Any:
        y = call(x)
        gradients = torch.autograd.grad(y, wanted, g)
        return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}

    def read(result: Any) -> Arrays:
        arrays = dict(torch_arrays(result))
        same = {name: arrays.pop(name) for name in ("y", "dx")}
        return {**same, **named(arrays)}

    if not given.layer.backward:
        return torch_work(forward)
    x.requires_grad_()
    return torch_work(both, read)


def _compiled(module: Any) -> Any:
    """Return the module under ``torch.compile``, for these shapes alone and never eager.

    Compilations of other cases in the same process are kept apart, else the ninth would run
    eagerly.
    """
    needed = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(needed) is None:
        raise Unsupported(f"torch.compile needs a C++ compiler, and there is no {needed}")
    torch = torch_ready()
    return torch.compile(module, fullgraph=True, dynamic=False, isolate_recompiles=True)
