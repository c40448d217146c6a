"""How ``lora(fn)`` is called: its true signature, and arguments that are no arrays."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter, Signature
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])

OWN = ("params", "adapters")
KEYWORDS = ("dropout_key", "active")


def with_signature(adapted: F, fn: Callable[..., Any]) -> F:
    """Return ``adapted`` with the name and the docstring of ``fn``, and a signature of its own.

    ``functools.wraps`` would say that it takes what ``fn`` takes. ``jax.jit`` counts
    ``static_argnums`` and finds ``donate_argnames`` by it, so it has to be the true one.
    """
    names = ("__module__", "__name__", "__qualname__", "__doc__")
    functools.update_wrapper(adapted, fn, assigned=names, updated=())
    del vars(adapted)["__wrapped__"]
    vars(adapted)["__signature__"] = signature(fn)
    return adapted


def signature(fn: Callable[..., Any]) -> Signature:
    """Return the signature of ``lora(fn)``.

    It is ``(params, adapters, *args, dropout_key=None, active=None)`` for ``fn(params, *args)``.
    Where ``fn`` has another argument of one of these names, that one keeps the name: ``params`` and
    ``adapters`` then go by position alone, and a keyword is given to both.

    >>> def fn(weights, x, mode="sum", **options): ...
    >>> print(signature(fn))
    (params, adapters, x, mode='sum', *, dropout_key=None, active=None, **options)
    >>> def fn(weights, adapters): ...
    >>> print(signature(fn))
    (params, adapters_, /, adapters, *, dropout_key=None, active=None)
    """
    rest, returns = _others(fn)
    names = {one.name for one in rest}
    by_position = names & set(OWN) or any(one.kind is Parameter.POSITIONAL_ONLY for one in rest)
    kind = Parameter.POSITIONAL_ONLY if by_position else Parameter.POSITIONAL_OR_KEYWORD
    own = [Parameter(_free(name, names), kind) for name in OWN]
    keywords = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None)
        for name in KEYWORDS
        if name not in names
    ]
    variable = [one for one in rest if one.kind is Parameter.VAR_KEYWORD]
    plain = [one for one in rest if one.kind is not Parameter.VAR_KEYWORD]
    return Signature([*own, *plain, *keywords, *variable], return_annotation=returns)


def names_of(fn: Callable[..., Any], first: int = 1) -> frozenset[str]:
    """Return the names of what ``fn`` takes behind its first arguments.

    >>> sorted(names_of(lambda params, x, adapters: x))
    ['adapters', 'x']
    """
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return frozenset(one.name for one in _others(fn, first)[0] if one.kind in by_name)


def arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], taken: Collection[str]
) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Return params, adapters, ``fn``'s own arguments, its keywords, and ``KEYWORDS``.

    Args:
        args: what was given by position.
        kwargs: what was given by name.
        taken: the names that are arguments of ``fn``.

    Raises:
        TypeError: there are no params or no adapters.

    >>> arguments((1, 2, 3), {"active": 4, "x": 5}, {"x"})
    (1, 2, (3,), {'x': 5}, {'dropout_key': None, 'active': 4})
    """
    own, rest = list(args[: len(OWN)]), dict(kwargs)
    for name in OWN[len(own) :]:
        if name in taken or name not in rest:
            raise TypeError(f"missing {name!r}: call lora(fn) with (params, adapters, *args)")
        own.append(rest.pop(name))
    # What `fn` has a name for is given to both.
    keywords = {
        name: rest.get(name) if name in taken else rest.pop(name, None) for name in KEYWORDS
    }
    return own[0], own[1], args[len(OWN) :], rest, keywords


def is_array(leaf: Any) -> bool:
    """Tell an array, a tracer or a ``ShapeDtypeStruct`` from a Python value."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def parted(
    tree: Any, is_part: Callable[[Any], bool]
) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return the leaves that ``is_part`` holds for, and what puts others in their places.

    >>> numbers, rebuild = parted({"a": 1, "b": "text"}, lambda leaf: leaf != "text")
    >>> rebuild([number + 1 for number in numbers])
    {'a': 2, 'b': 'text'}
    """
    leaves, structure = jax.tree.flatten(tree)
    places = [n for n, leaf in enumerate(leaves) if is_part(leaf)]
    # What outlives a trace holds nothing of it.
    others = [None if is_part(leaf) else leaf for leaf in leaves]

    def rebuild(parts: list[Any]) -> Any:
        whole = list(others)
        for place, part in zip(places, parts, strict=True):
            whole[place] = part
        return jax.tree.unflatten(structure, whole)

    return [leaves[place] for place in places], rebuild


def _others(fn: Callable[..., Any], first: int = 1) -> tuple[list[Parameter], Any]:
    """Return what ``fn`` takes behind its first arguments, and its return annotation."""
    try:
        theirs = inspect.signature(fn)
    except (TypeError, ValueError):  # some built-in callables say nothing
        theirs = inspect.signature(lambda *args, **kwargs: None)
    by_position = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    given = list(theirs.parameters.values())
    own = [one for one in given[:first] if one.kind in by_position]
    return given[len(own) :], theirs.return_annotation


def _free(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "_"
    return name
