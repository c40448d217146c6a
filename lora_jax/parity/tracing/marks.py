"""Marks: identities with a name, which stand in the jaxpr where a value is tapped."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from .taps import OUTPUT

PREFIX = "lora_jax.parity.tap"


_SEPARATOR = "|"


def tap(name: str, x: Any) -> Any:
    """Return ``x``, and let ``trace`` see its value and its gradient under this name.

    The identity, in ``jit`` and ``grad`` and ``vmap`` and ``scan`` as well.

    Args:
        name: of PyTorch's module whose output it is, or one that ``names=`` maps to it.
        x: an array or a pytree; its floating arrays are tapped.

    >>> bool((tap("mlp.act", jnp.arange(3.0)) == jnp.arange(3.0)).all())
    True
    """
    return mark(name, OUTPUT, x)


def mark(name: str, kind: str, tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Return the tree with every floating array in it marked as a module's input or output."""
    index = count()

    def one(leaf: Any) -> Any:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not hasattr(leaf, "shape") or (is_leaf and is_leaf(leaf)):
            return leaf
        floating = jnp.issubdtype(dtype, jnp.floating)
        return mark_one(leaf, name, kind, next(index)) if floating else leaf

    return jax.tree.map(one, tree, is_leaf=is_leaf)


def mark_one(value: Any, name: str, kind: str, index: int) -> jax.Array:
    """Return an array, marked."""
    return checkpoint_name(value, _SEPARATOR.join((PREFIX, kind, str(index), name)))


def _mark_of(eqn: core.JaxprEqn) -> tuple[str, str, int] | None:
    """Return name, kind and index of a mark; None for any other equation."""
    said = eqn.params.get("name")
    if eqn.primitive.name != "name" or not str(said).startswith(PREFIX + _SEPARATOR):
        return None
    _, kind, index, name = str(said).split(_SEPARATOR, 3)
    return name, kind, int(index)
