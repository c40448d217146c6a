"""What LoRA gives by its formula alone, where PEFT itself computes something else.

``W + s·B·A`` is put in the place of every adapted weight of a PyTorch model, so that the model's
own layers do all the rest; A and B get their gradients through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch.func import functional_call

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


def by_formula(
    module: torch.nn.Module,
    directory: Path,
    scale: float,
    batch: Mapping[str, np.ndarray],
    mode: Any = nullcontext,
    dtype: torch.dtype = torch.float32,
) -> dict[str, np.ndarray]:
    """Return loss, logits, and the gradient of every A and B by PEFT's names.

    Args:
        module: the base model, which is put in eval mode.
        directory: of an adapter in PEFT's format that has pairs and nothing else.
        scale: of every pair.
        batch: the model's arguments.
        mode: a context to run in, such as one that keeps everything in float64.
        dtype: what is computed in.
    """
    tensors = safetensors.torch.load_file(directory / "adapter_model.safetensors")
    leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
    parameters = {name: p.detach().to(dtype) for name, p in module.named_parameters()}
    parameters |= {
        name: b.detach().to(dtype) if b.is_floating_point() else b
        for name, b in module.named_buffers()
    }
    owners = [name.removesuffix(A) for name in leaves if name.endswith(A)]
    assert len(leaves) == 2 * len(owners), "there is more than pairs in the file"
    for owner in owners:
        name = f"{owner.removeprefix(PREFIX)}.weight"
        parameters[name] = parameters[name] + scale * _product(leaves[owner + A], leaves[owner + B])
    inputs = {name: torch.from_numpy(value) for name, value in batch.items()}
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with mode():
        out = functional_call(module.eval(), parameters, kwargs=inputs)
    out.loss.backward()
    found = {"loss": out.loss, "logits": out.logits} | {n: t.grad for n, t in leaves.items()}
    return {name: value.detach().numpy().copy() for name, value in found.items()}


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``B·A`` for A ``(r, in, *window)`` and B ``(out, r, 1, …)``."""
    return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])


def dilated(module: torch.nn.Module) -> torch.nn.Module:
    """Give every 3×3 convolution of a model a dilation, and a padding that goes round.

    PEFT 0.21.2 hands on neither to the convolution that it makes of A.
    """
    for conv in module.modules():
        if isinstance(conv, torch.nn.Conv2d) and conv.kernel_size == (3, 3):
            conv.dilation, conv.padding, conv.padding_mode = (2, 1), (2, 1), "circular"
            conv._reversed_padding_repeated_twice = [1, 1, 2, 2]
    return module
