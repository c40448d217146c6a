"""Taps on PyTorch's side: what enters and leaves every module of a model, through its hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import numpy as np

from ...core.errors import ParityError, raise_all
from ..sides import torch_side
from ..sides.torch_side import ModuleFn, named, torch
from .taps import INPUT, MASK, OUTPUT, Calls, Place, Shape, largest

See = Callable[[str, str, int, Any], Any]


class TappedModule(ModuleFn):
    """A module as a function that also returns the values at these places, by their keys.

    It takes for each key a keyword of zeros, added to the value there: the gradient with respect
    to it is the cotangent at the place.
    """

    def __init__(self, module: torch.nn.Module, keys: Mapping[Place, str]):
        super().__init__(module)
        self.keys = keys

    def __call__(self, **given: Any) -> dict[str, Any]:
        """Run the module on these weights, arguments and zeros."""
        zeros = {key: given.pop(key) for key in self.keys.values()}
        seen: dict[str, Any] = {}

        def visit(place: Place, value: Any) -> Any:
            key = self.keys.get(place)
            if key is None:
                return value
            seen[key] = _shown(value.detach())
            return value + zeros[key].to(value.dtype)

        with _visiting(self.module, visit):
            out = super().__call__(**given)
        return named(out) | seen

    def wide(self) -> TappedModule:
        """Return the same with a float64 copy of the module."""
        return TappedModule(copy.deepcopy(self.module).double(), self.keys)


def _shown(value: torch.Tensor) -> torch.Tensor:
    far = value.abs() > largest(torch.finfo(value.dtype).max)
    return torch.where(far, value.sign() * MASK, value)


def places(fn: ModuleFn, inputs: Mapping[str, Any]) -> dict[Place, Shape]:
    """Return every place of the module with the shape there, in the order of execution.

    Raises:
        ParityError: the module gives something else when it is run with taps.
    """
    found: dict[Place, Shape] = {}

    def visit(place: Place, value: Any) -> Any:
        found[place] = tuple(value.shape)
        return value.clone()

    plain = torch_side.run(fn, inputs)
    with _visiting(fn.module, visit):
        out = torch_side.run(fn, inputs)
    raise_all(
        ParityError,
        "these outputs are others with taps: the module is random, so call .eval(), or a part of "
        "it works in place on what its caller goes on to use",
        (n for n, y in plain.items() if not np.array_equal(y, out[n], equal_nan=True)),
    )
    return found


def marked(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a module whose submodules are tapped where ``from_torch`` runs it in JAX.

    In PyTorch it does what the module does.

    >>> from lora_jax.torch import from_torch
    >>> fn, params = from_torch(marked(torch.nn.Sequential(torch.nn.Tanh())))
    >>> fn(params, np.zeros(2))
    Array([0., 0.], dtype=float32)
    """
    own = copy.deepcopy(module)
    _hook(own, _mark)
    return own


def _mark(name: str, kind: str, index: int, value: Any) -> Any:
    """Mark one tensor for JAX; one of PyTorch's own comes back as it is."""
    if not hasattr(value, "jax"):
        return value
    from .marks import mark_one

    return value.apply_jax(mark_one, name, kind, index)


@contextmanager
def _visiting(module: torch.nn.Module, visit: Callable[[Place, Any], Any]) -> Iterator[None]:
    """Pass every tensor that enters or leaves a submodule through ``visit``."""
    calls = Calls()

    def see(name: str, kind: str, index: int, value: Any) -> Any:
        return visit(calls.place(name, kind, index), value)

    with ExitStack() as stack:
        for handle in _hook(module, see):
            stack.callback(handle.remove)
        yield


def _hook(module: torch.nn.Module, see: See) -> list[Any]:
    """Hook every submodule; its tensors are exchanged for what ``see`` makes of them."""
    handles = []
    for name, child in module.named_modules():
        if not name:
            continue

        def before(_: Any, args: Any, kwargs: Any, name: str = name) -> Any:
            return _exchanged((args, kwargs), name, INPUT, see)

        def after(_: Any, args: Any, kwargs: Any, out: Any, name: str = name) -> Any:
            return _exchanged(out, name, OUTPUT, see)

        handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(child.register_forward_hook(after, with_kwargs=True))
    return handles


def _exchanged(tree: Any, name: str, kind: str, see: See) -> Any:
    index = count()

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            floating = value.is_floating_point()
            return see(name, kind, next(index), value) if floating else value
        if isinstance(value, list | tuple):
            children = [one(child) for child in value]
            return type(value)(*children) if hasattr(value, "_fields") else type(value)(children)
        if isinstance(value, Mapping):
            # A copy, so that the dataclasses of transformers stay what they are.
            own: Any = copy.copy(value)
            for key, child in value.items():
                own[key] = one(child)
            return own
        return value

    return one(tree)
