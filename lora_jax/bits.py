"""Arrays that XLA would widen for a slice, moved as integers of their bits.

XLA's CPU backend has no bfloat16 slices: it converts the whole array to float32, and what is
written into it back again. A loop over stacked weights so holds them all in float32, and each step
writes the whole stack of what is kept for the gradients. Integers it moves as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import ad_checkpoint, lax
from jaxtyping import Array, UInt16


def widens(x: Any) -> bool:
    """Tell whether XLA would widen slices of an array."""
    return getattr(x, "dtype", None) == jnp.bfloat16 and jax.default_backend() == "cpu"


def of(tree: Any) -> list[Any]:
    """Return the bits of each leaf that XLA would widen, and None for each other one.

    >>> of([jnp.ones(2, jnp.bfloat16), jnp.ones(2)])
    [Array([16256, 16256], dtype=uint16), None]
    """
    return [_bits(leaf) if widens(leaf) else None for leaf in jax.tree.leaves(tree)]


def joined(tree: Any, bits: list[Any]) -> Any:
    """Return the tree with the values that the bits have, and the tangents that its own have.

    >>> ones = [jnp.ones(2, jnp.bfloat16)]
    >>> joined([jnp.zeros(2, jnp.bfloat16)], of(ones))
    [Array([1, 1], dtype=bfloat16)]
    """
    leaves, structure = jax.tree.flatten(tree)
    pairs = zip(leaves, bits, strict=True)
    return structure.unflatten([x if own is None else _joined(x, own) for x, own in pairs])


def checkpoint_name(x: Array, name: str) -> Array:
    """Return x, named for ``jax.checkpoint``'s policies, so that a scan stacks it as it is.

    Source: ``jax.ad_checkpoint.checkpoint_name``.

    >>> checkpoint_name(jnp.ones(2, jnp.bfloat16), "kept")
    Array([1, 1], dtype=bfloat16)
    """
    if not widens(x):
        return ad_checkpoint.checkpoint_name(x, name)
    return _joined(x, ad_checkpoint.checkpoint_name(_bits(x), name))


def _bits(x: Array) -> UInt16[Array, "..."]:
    return lax.bitcast_convert_type(x, jnp.uint16)


@jax.custom_jvp
def _joined(x: Array, bits: UInt16[Array, "..."]) -> Array:
    return lax.bitcast_convert_type(bits, x.dtype)


@_joined.defjvp
def _joined_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    return _joined(*primals), tangents[0]
