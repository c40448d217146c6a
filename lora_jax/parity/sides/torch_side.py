"""PyTorch's side of a comparison: outputs and gradients of a function, as numpy by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

try:
    import torch
except ImportError as error:
    raise ImportError(
        "comparing with PyTorch needs it: pip install 'lora_jax[torch]' (this module alone does; "
        "the rest of lora_jax.parity works without it)"
    ) from error

from torch.utils._python_dispatch import TorchDispatchMode

from ..tensors import Tensors, flatten


class ModuleFn:
    """A module as a function of its weights and its arguments, all by keyword.

    Keywords that are names of the module's state are its weights and buffers, the others are
    arguments of ``forward``.

    >>> fn = ModuleFn(torch.nn.Linear(3, 2))
    >>> ones = torch.ones(2, 3)
    >>> fn(input=ones, weight=ones, bias=torch.zeros(2))
    tensor([[3., 3.],
            [3., 3.]])
    """

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self.state = frozenset(module.state_dict())

    def __call__(self, **given: Any) -> Any:
        """Run the module on these weights and arguments."""
        weights = {name: value for name, value in given.items() if name in self.state}
        rest = {name: value for name, value in given.items() if name not in self.state}
        return torch.func.functional_call(self.module, weights, (), rest)

    def wide(self) -> ModuleFn:
        """Return the same with a float64 copy of the module, whose buffers count too."""
        return ModuleFn(copy.deepcopy(self.module).double())


def run(
    fn: Callable[..., Any],
    inputs: Mapping[str, Any],
    wrt: Sequence[str] = (),
    cotangents: Mapping[str, Any] | None = None,
    *,
    wide: bool = False,
) -> Tensors:
    """Return every floating output of ``fn(**inputs)``, and the gradient of ``Σ⟨g, output⟩``.

    The counterpart of ``jax_side.run``, with the names of PyTorch.

    Args:
        fn: takes the inputs as keywords and returns a tensor or nested containers of them.
        inputs: arrays, or nested containers of them, by keyword.
        wrt: the names of the inputs to derive by, nested ones dotted.
        cotangents: g of every output.
        wide: whether to run in float64; a ``ModuleFn`` is then a copy in float64.
    """
    leaves = {name: to_torch(value, wide) for name, value in flatten(inputs).items()}
    for name in wrt:
        leaves[name].requires_grad_()
    fn = fn.wide() if wide and isinstance(fn, ModuleFn) else fn
    with torch.set_grad_enabled(cotangents is not None):
        found = named(fn(**_nested(inputs, leaves)))
        result = {name: to_numpy(value) for name, value in found.items()}
        if cotangents is None:
            return result
        # Of other names or shapes there is no gradient: who compares says what does not fit.
        fit = [n for n, g in cotangents.items() if n in found and found[n].shape == g.shape]
        reached = [n for n in fit if found[n].requires_grad]
        seeds = [to_torch(cotangents[n], wide).to(found[n].dtype) for n in reached]
        gradients = torch.autograd.grad(
            [found[n] for n in reached], [leaves[n] for n in wrt], seeds, allow_unused=True
        )
    for name, gradient in zip(wrt, gradients, strict=True):
        zero = torch.zeros_like(leaves[name]) if gradient is None else gradient
        result[f"d{name}"] = to_numpy(zero)
    return result


def islands(fn: Callable[..., Any], inputs: Mapping[str, Any]) -> list[str]:
    """Return the operations that stay narrower than float64 when the inputs are float64.

    >>> islands(lambda x: torch.sin(x.float()), {"x": np.ones(2)})
    ['aten._to_copy to float32', 'aten.sin to float32']
    """
    leaves = {name: to_torch(value, True) for name, value in flatten(inputs).items()}
    fn = fn.wide() if isinstance(fn, ModuleFn) else fn
    with torch.no_grad(), _Narrow() as seen:
        fn(**_nested(inputs, leaves))
    return list(seen.found)


class _Narrow(TorchDispatchMode):
    """Notes every operation whose result is floating and narrower than float64."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, list | tuple) else (out,):
            if isinstance(one, torch.Tensor) and one.is_floating_point() and one.itemsize < 8:
                dtype = str(one.dtype).removeprefix("torch.")
                self.found[f"{str(func).rpartition('.')[0]} to {dtype}"] = None
        return out


def named(out: Any) -> dict[str, torch.Tensor]:
    """Return the floating tensors of an output by name; one alone is called ``"y"``."""
    found = {name or "y": leaf for name, leaf in flatten(out).items()}
    return {
        name: leaf
        for name, leaf in found.items()
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    }


def to_torch(value: Any, wide: bool = False) -> torch.Tensor:
    """Return an array as a new tensor, bfloat16 included; with ``wide`` floats as float64."""
    value = np.array(value)
    if value.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(value.view(np.uint16).copy()).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(value)
    return tensor.double() if wide and tensor.is_floating_point() else tensor


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a tensor as a new array, bfloat16 included."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


def _nested(tree: Any, leaves: Mapping[str, Any], prefix: str = "") -> Any:
    if isinstance(tree, Mapping):
        return {key: _nested(child, leaves, f"{prefix}{key}.") for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_nested(c, leaves, f"{prefix}{n}.") for n, c in enumerate(tree))
    return leaves[prefix.rstrip(".")]
