"""The low-rank path of the other products: convolution, lookup, and ragged products.

They compute in the dtype in which ``lowrank`` accumulates, and return the addend in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

from . import lowrank
from .adapter import IN, OUT, Adapter


def conv(
    x: Inexact[Array, "..."],
    adapter: Adapter,
    spec: lax.ConvDimensionNumbers,
    groups: int,
    options: Mapping[str, Any],
) -> Inexact[Array, "..."]:
    """Return ``s·(x∗A)·B``: a convolution to r channels with A's window, then B at each point.

    A holds the window and the channels that are summed over, B the channels that are kept. The
    kernel's change is ``s·A·B`` in the kernel's own shape; with groups every group has the
    same A, and columns of B of its own. Where the kernel is used the other way round, as in the
    gradient of a convolution, B comes first.

    Args:
        x: the input.
        adapter: with the kernel's axes as the convolution reads them.
        spec: the convolution's ``dimension_numbers``.
        groups: its ``feature_group_count``.
        options: its strides, padding and dilations.

    Raises:
        ValueError: a grouped kernel is used the other way round.

    Source: the Conv2d of PEFT 0.21.2, for one group.
    """
    kernel = spec.rhs_spec
    dtype = lowrank.accumulation_dtype(lowrank.wider(x.dtype, adapter.a.dtype))
    at_a = lowrank.positions(adapter.axes, IN)
    transposed = adapter.axes[kernel[0]] == IN
    if transposed and groups > 1:
        raise ValueError("a grouped kernel is used the other way round")
    a, b, r = adapter.a.astype(dtype), adapter.b.astype(dtype), adapter.a.ndim - 1
    x = x.astype(dtype)
    if transposed:
        x = _at_each_point(lowrank.scaled(x, adapter), b.T, spec.lhs_spec[1])
        a_spec = (at_a[kernel[0]], r, *(at_a[axis] for axis in kernel[2:]))
    else:
        a = jnp.tile(a, (1,) * r + (groups,)) if groups > 1 else a
        a_spec = (r, at_a[kernel[1]], *(at_a[axis] for axis in kernel[2:]))
    hidden = lax.conv_general_dilated(
        x,
        a,
        dimension_numbers=lax.ConvDimensionNumbers(spec.lhs_spec, a_spec, spec.out_spec),
        feature_group_count=groups,
        **options,
    )
    if transposed:
        return hidden
    hidden, feature = lowrank.scaled(hidden, adapter), spec.out_spec[1]
    if groups == 1:
        return _at_each_point(hidden, b, feature)
    points = jnp.moveaxis(hidden, feature, -1)
    points = points.reshape(*points.shape[:-1], groups, b.shape[0])
    y = jnp.einsum("...gr,rgo->...go", points, b.reshape(b.shape[0], groups, -1))
    return jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, feature)


def take(
    adapter: Adapter, axis: int, gather: Callable[[Array, int], Array]
) -> Float[Array, "*index kept"]:
    """Return ``s·A[ids]·B``: the change of a lookup's rows, for a weight ``(in, out)``.

    Args:
        adapter: of a matrix.
        axis: the axis of the weight that the ids count along.
        gather: ``gather(factor, at)`` looks the ids up along the factor's axis ``at`` and
            returns ``(*index, r)``.

    Source: the Embedding of PEFT 0.21.2, which drops nothing either.
    """
    looked_up = adapter.axes[axis]
    rows, kept = (adapter.a, adapter.b) if looked_up == IN else (adapter.b, adapter.a)
    at = lowrank.positions(adapter.axes, looked_up)[axis]
    dtype = lowrank.accumulation_dtype(rows.dtype)
    hidden = lowrank.scaled(gather(rows, at).astype(dtype), adapter)
    return hidden @ (kept if looked_up == IN else kept.T).astype(dtype)


def ragged_dot(
    x: Inexact[Array, "m _"],
    adapter: Adapter,
    group_sizes: Int[Array, "g"],
    x_axis: int,
    w_axis: int,
    group_axis: int,
    precision: lax.PrecisionLike = None,
) -> Inexact[Array, "m _"]:
    """Return ``s·(x·A_g)·B_g`` for the rows of each group g, as ``lax.ragged_dot`` has them.

    Args:
        x: the rows, sorted by group.
        adapter: with a stacked axis for the groups.
        group_sizes: rows of each group.
        x_axis: the axis of x that is summed over.
        w_axis: the axis of the weight that is summed over.
        group_axis: the axis of the weight that counts the groups.
        precision: as in ``lax.ragged_dot``.
    """
    summed = adapter.axes[w_axis]
    kept = OUT if summed == IN else IN
    down, up = (adapter.a, adapter.b) if summed == IN else (adapter.b, adapter.a)
    at_down, at_up = (lowrank.positions(adapter.axes, letter) for letter in (summed, kept))
    dtype = lowrank.accumulation_dtype(lowrank.wider(x.dtype, adapter.a.dtype))

    def product(lhs: Array, rhs: Array, lhs_axis: int, rhs_axis: int, group: int) -> Array:
        return lax.ragged_dot_general(
            lhs.astype(dtype),
            rhs.astype(dtype),
            group_sizes,
            lax.RaggedDotDimensionNumbers(
                (((lhs_axis,), (rhs_axis,)), ((), ())), [1 - lhs_axis], [group]
            ),
            precision=precision,
        )

    hidden = product(x, down, x_axis, at_down[w_axis], at_down[group_axis])
    rank_axis = 1 if kept == OUT else up.ndim - 1
    return product(lowrank.scaled(hidden, adapter), up, 1, rank_axis, at_up[group_axis])


def _at_each_point(x: Inexact[Array, "..."], matrix: Inexact[Array, "m n"], axis: int) -> Any:
    """Multiply one axis of x with a matrix; the axis stays where it is."""
    return jnp.moveaxis(jnp.moveaxis(x, axis, -1) @ matrix, -1, axis)
