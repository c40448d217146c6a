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


def dynamic_slice_in_dim(
    x: Array, start_index: int | Array, slice_size: int, axis: int = 0
) -> Array:
    """Return ``lax.dynamic_slice_in_dim`` of the same arguments, without widening all of x.

    >>> dynamic_slice_in_dim(jnp.arange(5, dtype=jnp.bfloat16), 1, 2)
    Array([1, 2], dtype=bfloat16)
    """
    part = lax.dynamic_slice_in_dim(x, start_index, slice_size, axis)
    if not widens(x):
        return part
    return _joined(part, lax.dynamic_slice_in_dim(_bits(x), start_index, slice_size, axis))


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
    """Return the values of the bits; tangents, which integers have none of, are those of x."""
    return lax.bitcast_convert_type(bits, x.dtype)


@_joined.defjvp
def _joined_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    return _joined(*primals), tangents[0]
