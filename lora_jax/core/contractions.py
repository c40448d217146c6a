"""The low-rank path of the other products: convolution, lookup, ragged products, stacks.

They compute in the dtype in which ``lowrank`` accumulates, and return the addend in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

from . import delta, lowrank
from .adapter import IN, OUT, STACKED, Adapter


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
    same A, and columns of B of its own. Where groups keep few channels, as those of a depthwise
    convolution do, the change is smaller than an A for each of them, and is what x meets. Where
    the kernel is used the other way round, as in the gradient of a convolution, B comes first.

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
    if groups > 1 and smaller_formed(groups, b.shape[-1], a.shape[-1]):
        change = delta.delta(adapter).astype(dtype)
        return lax.conv_general_dilated(
            x, change, dimension_numbers=spec, feature_group_count=groups, **options
        )
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
    y = jnp.einsum("...gr,rgo->...go", points, b.reshape(b.shape[0], groups, b.shape[1] // groups))
    return jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, feature)


def smaller_formed(groups: int, out: int, r: int) -> bool:
    """Tell whether a grouped kernel's ``A·B`` is no larger than an A for each of its groups.

    >>> smaller_formed(240, 240, 8), smaller_formed(2, 64, 8), smaller_formed(1, 4, 8)
    (True, False, False)
    """
    return groups > 1 and out <= r * groups


def take(
    adapter: Adapter, axis: int, gather: Callable[[Array, int], Array]
) -> Inexact[Array, "*index kept"]:
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


def by_group(
    bias: Float[Array, "g 1 o"], group_sizes: Int[Array, "g"], rows: int
) -> Float[Array, "m o"]:
    """Return its group's bias for each of the rows, which are sorted by group; 0 beyond them.

    >>> by_group(jnp.array([[[1.0]], [[2.0]]]), jnp.array([1, 2]), 4).tolist()
    [[1.0], [2.0], [2.0], [0.0]]
    """
    # A product with 1, so that it is 0 and has no gradient where `ragged_dot` is and has.
    ones = jnp.ones((rows, 1), bias.dtype)
    return lax.ragged_dot(ones, bias, group_sizes, precision=lax.Precision.HIGHEST)


def _at_each_point(x: Inexact[Array, "..."], matrix: Inexact[Array, "m n"], axis: int) -> Any:
    """Multiply one axis of x with a matrix; the axis stays where it is."""
    return jnp.moveaxis(jnp.moveaxis(x, axis, -1) @ matrix, -1, axis)


def dot_of_stacks(
    x: Inexact[Array, "..."],
    adapter: Adapter,
    contract: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    weight_first: bool = False,
    precision: lax.PrecisionLike = None,
) -> Inexact[Array, "..."]:
    """Return ``s·(x·A)·B`` where ``lax.dot_general(x, W)`` keeps stacked axes or sums over them.

    So every expert e may see the same x: ``y[t, e] = x[t]·A[e]·B[e]``, and what they say may be
    summed: ``y[t] = Σ x[t, e]·A[e]·B[e]``. Nothing of the size of x times the experts is formed.

    Args:
        x: the input.
        adapter: A, B and scale, with axes of which some are ``"s"``.
        contract: the axes summed over, of x and of the weight, in pairs: all of the weight's
            ``i`` axes or all of its ``o`` axes, and any of its ``s`` axes.
        batch: the batch axes of x and of the weight, in pairs.
        weight_first: the layout of ``lax.dot_general(W, x)`` instead.
        precision: as in ``lax.dot_general``.

    >>> adapter = Adapter(jnp.ones((4, 3, 2)), jnp.ones((4, 2, 5)), 0.5, axes="sio")
    >>> dot_of_stacks(jnp.ones((6, 3)), adapter, ([1], [1]), ([], [])).shape
    (6, 4, 5)
    >>> dot_of_stacks(jnp.ones((6, 4, 3)), adapter, ([1, 2], [0, 1]), ([], [])).shape
    (6, 5)
    """
    letters = adapter.axes
    axes = {
        letter: [n for n, s in enumerate(letters) if s == letter] for letter in STACKED + IN + OUT
    }
    transposed = any(letters[axis] == OUT for axis in contract[1])
    rank = len(letters)
    a, b = (
        (adapter.a, [*axes[STACKED], *axes[IN], rank]),
        (adapter.b, [*axes[STACKED], rank, *axes[OUT]]),
    )
    (down, of_down), (up, of_up) = (b, a) if transposed else (a, b)
    shared = dict(zip([*contract[0], *batch[0]], [*contract[1], *batch[1]], strict=True))
    of_x = [shared.get(axis, rank + 1 + axis) for axis in range(x.ndim)]
    summed = axes[OUT if transposed else IN]
    hidden_axes = [n for n in dict.fromkeys([*of_x, *of_down]) if n not in summed]
    own = [n for n in range(rank) if n not in {*contract[1], *batch[1]}]
    free = [n for n in of_x if n > rank]
    out = [*batch[1], *own, *free] if weight_first else [*batch[1], *free, *own]

    dtype = lowrank.wider(x.dtype, adapter.a.dtype)
    exact = lowrank.accumulation_dtype(dtype)
    options: Any = dict(precision=precision, preferred_element_type=exact)
    hidden = jnp.einsum(x.astype(dtype), of_x, down.astype(dtype), of_down, hidden_axes, **options)
    hidden = lowrank.scaled(hidden, adapter).astype(dtype)
    return jnp.einsum(hidden, hidden_axes, up.astype(dtype), of_up, out, **options)
