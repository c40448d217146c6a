"""The maths of rows that are trained as they are: PEFT's ``trainable_token_indices``."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact

from . import lowrank
from .adapter import IN, Adapter, Rows


def start(
    weight: Inexact[Array, "*w"],
    indices: tuple[int, ...],
    dtype: DTypeLike,
    axes: str = "io",
    axis: int = 0,
) -> Rows:
    """Return the rows as they are in the weight, so that they change nothing.

    Args:
        weight: the frozen weight.
        indices: which rows.
        dtype: of the values; no narrower than the weight's.
        axes: the weight's letters.
        axis: the axis that the indices count along.

    >>> start(jnp.arange(6.0).reshape(3, 2), (2, 0), "float32").values.tolist()
    [[4.0, 5.0], [0.0, 1.0]]
    """
    weight = jnp.asarray(weight)
    values = of(weight, indices, axis).astype(lowrank.wider(weight.dtype, dtype))
    return Rows(values, indices, axes, axis)


def of(
    weight: Inexact[Array, "*w"], indices: tuple[int, ...], axis: int
) -> Inexact[Array, "n *rest"]:
    """Return these rows of a weight, in this order."""
    return jnp.moveaxis(jnp.asarray(weight), axis, 0)[jnp.asarray(indices, jnp.int32)]


def put(weight: Inexact[Array, "*w"], rows: Rows) -> Inexact[Array, "*w"]:
    """Return the weight with the rows in it: set, not added, and rounded to its dtype.

    Source: ``TrainableTokensLayer`` of PEFT 0.21.2, which does this in every call.

    >>> put(jnp.ones((3, 2)), Rows(jnp.full((1, 2), 7.0), (1,))).tolist()
    [[1.0, 1.0], [7.0, 7.0], [1.0, 1.0]]
    """
    weight = jnp.asarray(weight)
    first = jnp.moveaxis(weight, rows.axis, 0)
    changed = first.at[jnp.asarray(rows.indices, jnp.int32)].set(rows.values.astype(weight.dtype))
    return jnp.moveaxis(changed, 0, rows.axis)


def pair(weight: Inexact[Array, "*w"], rows: Rows) -> Adapter:
    """Return A and B with ``A·B = P·(values − W[indices])``: what the rows add to the weight.

    P ``(V, n)`` has a 1 for each row and is not trained; the gradient of the other factor is the
    rows' own. Nothing of the weight's size is formed.

    >>> adapter = pair(jnp.ones((3, 2)), Rows(jnp.full((1, 2), 7.0), (1,)))
    >>> adapter.a.T.tolist(), adapter.b.tolist()
    ([[0.0, 1.0, 0.0]], [[6.0, 6.0]])
    """
    dtype = lowrank.wider(rows.values.dtype, weight.dtype)
    old = of(weight, rows.indices, rows.axis).astype(dtype)
    change = rows.values.astype(dtype) - old
    size = weight.shape[rows.axis]
    # (n, V); JAX's own one_hot reads a flag for its dtype.
    ones = jnp.asarray(rows.indices, jnp.int32)[:, None] == jnp.arange(size, dtype=jnp.int32)
    ones = ones.astype(dtype)
    if rows.axes[rows.axis] == IN:
        return Adapter(ones.T, change, 1.0, rows.axes)
    return Adapter(jnp.moveaxis(change, 0, -1), ones, 1.0, rows.axes)
