"""PyTorch's sides of the layer kinds: PEFT's layers, the reference, and the formula written out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..tensors import Tensors
from .kinds import ALPHA, Drawn, geometry, gradients


def base_layer(drawn: Drawn) -> torch.nn.Module:
    """Return PyTorch's layer without any low-rank path, with the numbers drawn."""
    kind, weight = drawn.kind, drawn.kind.weight
    if kind.op == "embedding":
        layer: Any = torch.nn.Embedding(weight[0], weight[1])
    elif kind.op == "conv":
        stride, padding, dilation = geometry(kind)
        make: Any = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d}[len(stride)]
        layer = make(weight[1], weight[0], weight[2:], stride, padding, dilation)
    elif kind.axes == "io":
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(weight[1], weight[0])
    else:
        layer = torch.nn.Linear(weight[1], weight[0])
    with torch.no_grad():
        layer.weight.copy_(tensor(drawn.weight))
        if kind.biased:
            layer.bias.copy_(tensor(drawn.lowered.cases[0].bias))
    return layer.requires_grad_(False)


def peft_layer(drawn: Drawn, base: str, low_rank: str) -> Any:
    """Return PEFT's layer, and its A and B as they are laid out there, and m."""
    import peft

    kind, (case,) = drawn.kind, drawn.lowered.cases
    modules = OrderedDict(layer=base_layer(drawn).to(getattr(torch, base)))
    conv1d = kind.op == "linear" and kind.axes == "io"
    options: Any = dict(
        r=kind.rank,
        lora_alpha=drawn.scale * kind.rank,
        target_modules=["layer"],
        use_dora=kind.dora,
        fan_in_fan_out=conv1d,
    )
    model = peft.get_peft_model(torch.nn.Sequential(modules), peft.LoraConfig(**options))
    layer: Any = model.get_submodule("base_model.model.layer")
    embedding = kind.op == "embedding"
    tables = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    found = [getattr(layer, table)["default"] for table in tables]
    a, b = found if embedding else (one.weight for one in found)
    for parameter, value in ((a, case.a), (b, case.b)):
        parameter.data = tensor(value.T).reshape(parameter.shape).to(getattr(torch, low_rank))
    trained: Any = {"dA": (a, lambda g: g.reshape(kind.rank, -1).T)}
    trained["dB"] = (b, lambda g: g.reshape(kind.out, -1).T)
    if kind.dora:
        m = layer.lora_magnitude_vector["default"].weight
        m.data = tensor(case.m).reshape(m.shape)
        trained["dm"] = (m, torch.Tensor.ravel)
    return model, trained


def reference_layer(drawn: Drawn, base: str, low_rank: str) -> Any:
    """Return ``lora_torch_ref.DoRALinear``, and its A, B and m."""
    from lora_torch_ref import DoRALinear

    (case,) = drawn.lowered.cases
    linear: Any = base_layer(drawn).to(getattr(torch, base))
    layer = DoRALinear(linear, drawn.kind.rank, ALPHA, dtype=getattr(torch, low_rank))
    parameters = {"dA": layer.lora.A, "dB": layer.lora.B, "dm": layer.magnitude}
    with torch.no_grad():
        for parameter, value in zip(parameters.values(), (case.a, case.b, case.m), strict=True):
            parameter.copy_(tensor(value))
    return layer, {name: (p, lambda g: g) for name, p in parameters.items()}


def formula(drawn: Drawn, base: str, low_rank: str) -> Any:
    """Return ``x·W + b + s·(x·A)·B`` in PyTorch's operations, with all of the layer's options."""
    kind, cases = drawn.kind, drawn.lowered.cases
    dtypes = getattr(torch, base), getattr(torch, low_rank)
    weight = tensor(drawn.weight).to(dtypes[0])
    a, b = (tensor(np.stack([getattr(case, n) for case in cases])).to(dtypes[1]) for n in "ab")
    if kind.op == "experts":
        a, b = torch.nn.Parameter(a), torch.nn.Parameter(b)

        def experts(x: torch.Tensor) -> torch.Tensor:
            y = torch.einsum("eni,eio->eno", x, weight)
            return (y + drawn.scale * ((x.to(a.dtype) @ a) @ b)).to(y.dtype)

        return experts, {
            "dA": (a, lambda g: g.reshape(-1, kind.rank)),
            "dB": (b, lambda g: g.reshape(-1, kind.out)),
        }
    ones = (1,) * (len(kind.weight) - 2)
    a = torch.nn.Parameter(a[0].T.reshape(kind.rank, *kind.weight[1:]).contiguous())
    b = torch.nn.Parameter(b[0].T.reshape(kind.out, kind.rank, *ones).contiguous())
    bias = tensor(cases[0].bias).to(dtypes[0])
    conv: Any = {1: F.conv1d, 2: F.conv2d}[len(ones)]

    def run(x: torch.Tensor) -> torch.Tensor:
        y = conv(x, weight, bias, *geometry(kind))
        return (y + drawn.scale * conv(conv(x.to(a.dtype), a, None, *geometry(kind)), b)).to(
            y.dtype
        )

    return run, {
        "dA": (a, lambda g: g.reshape(kind.rank, -1).T),
        "dB": (b, lambda g: g.reshape(kind.out, -1).T),
    }


SIDES: dict[str, Callable[..., Any]] = {
    "peft": peft_layer,
    "reference": reference_layer,
    "formula": formula,
}


def run(drawn: Drawn, base: str = "float32", low_rank: str = "float32") -> Tensors:
    """Return y, dx, dA, dB (and dm), laid out as ``lowering.truth``."""
    layer, trained = SIDES[drawn.kind.torch](drawn, base, low_rank)
    integers = drawn.x.dtype == np.int32
    x = tensor(drawn.x) if integers else tensor(drawn.x).to(getattr(torch, base)).requires_grad_()
    y = layer(x)
    y.backward(tensor(drawn.cotangent).to(y.dtype))
    if isinstance(layer, torch.nn.Module):
        got = {id(p) for p in layer.parameters() if p.grad is not None}
        if got != {id(p) for p, _ in trained.values()}:
            raise AssertionError("PyTorch gives others than A, B and m a gradient")
    found: Any = {"y": y.detach()} | ({} if integers else {"dx": x.grad})
    found |= {name: lay(parameter.grad) for name, (parameter, lay) in trained.items()}
    return gradients(drawn, {name: value.double().numpy() for name, value in found.items()})


def tensor(value: Any) -> torch.Tensor:
    """Return an array as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(value))
