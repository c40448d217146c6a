"""Which method of an NNX model is called, and what it must be given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from ..core.errors import LoraError

Method = str | Callable[..., Any]

CALL = "__call__"


def bound(model: nnx.Module, method: Method) -> Callable[..., Any]:
    """Return a method of a model by its name, or by the function that its class has.

    Raises:
        LoraError: the model has no such method.
    """
    if not isinstance(method, str):
        return lambda *args, **kwargs: method(model, *args, **kwargs)
    if callable(found := getattr(model, method, None)):
        return found
    name = type(model).__name__
    others = ", ".join(_methods(type(model))) or "none"
    raise LoraError(
        f"{name} has no {method}: name the method that is called, method=…. It has: {others}"
    )


def with_rngs(
    model: nnx.Module,
    method: Method,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rngs: nnx.Rngs,
) -> dict[str, Any]:
    """Return the keyword arguments with a copy of ``rngs`` where the call needs its own.

    The name is ``wrap``'s, too, so that a call whose ``rngs`` is a keyword cannot be given one.
    """
    call = bound(model, method) if isinstance(method, str) else method
    signature = inspect.signature(call)
    own = signature.parameters.get("rngs")
    if own is None or own.default is not own.empty:
        return dict(kwargs)
    instance = () if isinstance(method, str) else (model,)
    given = signature.bind_partial(*instance, *args, **kwargs).arguments
    return dict(kwargs) if "rngs" in given else {**kwargs, "rngs": nnx.clone(rngs)}


def _methods(cls: type[nnx.Module]) -> list[str]:
    """Return the public methods that a class has beyond those of every NNX module."""
    return sorted(
        name
        for name, value in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_") and value is not getattr(nnx.Module, name, None)
    )
