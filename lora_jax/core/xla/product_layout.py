"""How the low-rank products are written, so that XLA transposes nothing of the data's size.

The operations are ordinary ones: any transform of JAX goes through them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

Axes = Sequence[int]

# A number, or what jax.export leaves open, which compares with nothing.
Size = Any

# How many vectors x has for each of A's columns where transposing A is the lesser work.
MANY = 8


def count(x: Inexact[Array, "..."], contract: Axes, batch: Axes) -> Size:
    """Return how many vectors x holds for each index of the batch."""
    return math.prod(n for axis, n in enumerate(x.shape) if axis not in (*contract, *batch))


def rank_first(
    a: Inexact[Array, "..."], at: Mapping[int, int], stacked: int, rows: Size
) -> tuple[Inexact[Array, "..."], Mapping[int, int]]:
    """Return A with its rank before its in axes, and where the weight's axes are in it then.

    A's gradient is so ``(gBᵀ)ᵀ·x``, of r rows. Without the barrier XLA would write it as
    ``xᵀ·(gBᵀ)``, and transpose all of x for it; with few rows A is what would take longer, and
    stays as it is.

    Args:
        a: A.
        at: where the weight's axes are in it.
        stacked: how many of its axes are stacked; they are the first.
        rows: of x.

    >>> import jax.numpy as jnp
    >>> a, at = rank_first(jnp.ones((3, 2)), {0: 0}, 0, rows=64)
    >>> a.shape, at
    ((2, 3), {0: 1})
    """
    # A size that is left open counts as many.
    if isinstance(rows, int) and rows < MANY * a.shape[-1]:
        return a, at
    first = lax.optimization_barrier(jnp.moveaxis(a, -1, stacked))
    return first, {axis: place + (place >= stacked) for axis, place in at.items()}


def merged_rows(
    x: Inexact[Array, "..."], contract: Axes, batch: Axes
) -> tuple[Inexact[Array, "..."], Axes, tuple[Size, ...]]:
    """Return x with its vectors along one axis, which axes are summed then, and the old sizes.

    XLA transposes what a product sums along several axes, and B's gradient sums along these: on a
    CPU that costs more than the product. With several devices they may be sharded one by one, and
    stay as they are, as they do where others stand between them; the sizes are ``()`` then.

    >>> import jax.numpy as jnp
    >>> x, contract, sizes = merged_rows(jnp.ones((2, 3, 4)), [2], [])
    >>> x.shape, contract, sizes
    ((6, 4), [1], (2, 3))
    """
    kept = [n for n in range(x.ndim) if n not in contract]
    start = kept[0] if kept else 0
    if batch or len(kept) < 2 or kept[-1] - start >= len(kept) or jax.device_count() > 1:
        return x, contract, ()
    sizes = tuple(x.shape[n] for n in kept)
    merged = x.reshape(*x.shape[:start], math.prod(sizes), *x.shape[start + len(kept) :])
    return merged, [n if n < start else n - len(kept) + 1 for n in contract], sizes
