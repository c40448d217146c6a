"""PyTorch's sides of the layer checks: the reference layer and PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lora_torch_ref import LinearWithLoRA

from ..tensors import Tensors
from .lora_oracle import Case


def side(build: Callable[..., Any]) -> Callable[..., Tensors]:
    """Make a side of ``build(linear, case, alpha, rslora, dtype)``.

    What it builds is the layer, its A and B, and whether they are PyTorch's way round.
    """

    def run(
        case: Case,
        alpha: int | float,
        *,
        rslora: bool = False,
        base: str = "float32",
        low_rank: str = "float32",
    ) -> Tensors:
        dtypes = getattr(torch, base), getattr(torch, low_rank)
        linear = torch.nn.Linear(*case.w.shape, dtype=dtypes[0]).requires_grad_(False)
        linear.weight.copy_(_tensor(case.w).T)
        linear.bias.copy_(_tensor(case.bias))
        layer, a, b, transposed = build(linear, case, alpha, rslora, dtypes[1])
        x = _tensor(case.x).to(dtypes[0]).requires_grad_()
        y = layer(x)
        y.backward(_tensor(case.g).to(dtypes[0]))
        trained = [p for p in layer.parameters() if p.grad is not None]
        if {id(p) for p in trained} != {id(a), id(b)}:
            raise AssertionError("PyTorch gives others than A and B a gradient")
        da, db = (a.grad.T, b.grad.T) if transposed else (a.grad, b.grad)
        tensors = {"y": y.detach(), "dx": x.grad, "dA": da, "dB": db}
        return {name: value.double().numpy() for name, value in tensors.items()}

    return run


def reference(linear: Any, case: Case, alpha: int | float, rslora: bool, dtype: Any) -> Any:
    """Build ``lora_torch_ref.LinearWithLoRA``."""
    rank = case.b.shape[0]
    # The reference has no rank-stabilised scale; sqrt(r) times alpha makes it.
    layer = LinearWithLoRA(linear, rank, alpha * (rank**0.5 if rslora else 1), dtype=dtype)
    with torch.no_grad():
        layer.lora.A.copy_(_tensor(case.a))
        layer.lora.B.copy_(_tensor(case.b))
    return layer, layer.lora.A, layer.lora.B, False


def peft_linear(linear: Any, case: Case, alpha: int | float, rslora: bool, dtype: Any) -> Any:
    """Build PEFT's ``Linear``."""
    import peft
    from peft.tuners.lora.layer import Linear

    r = case.b.shape[0]
    options: Any = dict(r=r, lora_alpha=alpha, use_rslora=rslora)
    config = peft.LoraConfig(**options)
    linear_of: Any = Linear
    layer = linear_of(linear, "default", config, r=r, lora_alpha=alpha)
    a, b = (pair.to(dtype)["default"].weight for pair in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        a.copy_(_tensor(case.a).T)
        b.copy_(_tensor(case.b).T)
    return layer, a, b, True


def _tensor(value: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value))


TORCH_SIDES = {"reference": side(reference), "peft": side(peft_linear)}
