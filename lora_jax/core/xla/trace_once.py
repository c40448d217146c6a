"""A ``jit`` that shares its tracing and leaves nothing of itself in the caller's jaxpr."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])

# Since jax 0.12 `True` means: when the program is lowered. Before, and by this name now, it is
# when the caller is traced.
_EARLY: Any = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True  # pyright: ignore


def inlined(function: F, *, static: tuple[str, ...] = ()) -> F:
    """Return the function, traced once for all calls with arguments of the same shapes.

    Args:
        function: of arrays, and of keyword arguments that are compared by equality.
        static: the names of these keyword arguments.

    >>> twice = inlined(lambda x: x * 2.0)
    >>> [eqn.primitive.name for eqn in jax.make_jaxpr(lambda x: twice(x))(1.0).eqns]
    ['mul']
    """
    return jax.jit(function, inline=_EARLY, static_argnames=static)  # pyright: ignore
