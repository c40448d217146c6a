"""What adapters make of a weight: ``ΔW``, the merged weight, DoRA's norm and gain, the bias.

Those are DoRA's gain and the adapter's bias, one number for each output feature. Casts are those of
``lowrank``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Inexact

from . import lowrank, sharding
from .adapter import IN, OUT, STACKED, Adapter, is_number

Axes = Sequence[int]


def delta(adapter: Adapter) -> Inexact[Array, "..."]:
    """Return ``ΔW = s·A·B`` in the weight's axis order, accumulated in at least float32.

    >>> import jax.numpy as jnp
    >>> stacked = Adapter(jnp.ones((6, 4, 2)), jnp.ones((6, 2, 5)), scale=1.0, axes="sio")
    >>> delta(stacked).shape
    (6, 4, 5)
    """
    exact = lowrank.accumulation_dtype(adapter.a.dtype)
    stacked = range(adapter.axes.count(STACKED))
    product = lax.dot_general(
        adapter.a.astype(exact),
        adapter.b.astype(exact),
        (([adapter.a.ndim - 1], [len(stacked)]), (stacked, stacked)),
        precision=lax.Precision.HIGHEST,
    )
    grouped = [n for letter in (STACKED, IN, OUT) for n in lowrank.axes_with(adapter.axes, letter)]
    return lowrank.scaled(
        lax.transpose(product, [grouped.index(n) for n in range(len(grouped))]), adapter
    )


def merged(weight: Inexact[Array, "*w"], adapter: Adapter) -> Inexact[Array, "*w"]:
    """Return ``W + s·A·B``, or DoRA's weight, formed in at least float32 and rounded once."""
    change = delta(adapter)
    if adapter.magnitude is not None:
        wide = weight.astype(lowrank.wider(weight.dtype, change.dtype))
        return with_gain(lowrank.add(wide, change), gain(weight, adapter), adapter.axes).astype(
            weight.dtype
        )
    if adapter.columns is None:
        return lowrank.add(weight, change)
    start, stop = adapter.columns
    axis = adapter.axes.index(OUT)
    old = lax.slice_in_dim(weight, start, stop, axis=axis)
    return lax.dynamic_update_slice_in_dim(weight, lowrank.add(old, change), start, axis)


def change(weight: Inexact[Array, "*w"], adapters: Sequence[Adapter]) -> Inexact[Array, "*w"]:
    """Return what these adapters of one weight add to it, in at least float32.

    That is ``Σ s·A·B``, and with DoRA ``m·(W + s·A·B)/‖W + s·A·B‖ − W``.

    >>> import jax.numpy as jnp
    >>> pair = Adapter(jnp.ones((4, 1)), jnp.ones((1, 2)), 0.5, magnitude=jnp.full(2, 6.0))
    >>> change(jnp.ones((4, 2)), [pair])[0].tolist()
    [2.0, 2.0]
    """
    if len(adapters) == 1 and adapters[0].magnitude is not None:
        wide = weight.astype(lowrank.accumulation_dtype(weight.dtype))
        return merged(wide, adapters[0]) - wide
    return delta(joined(adapters, weight.shape))


def joined(adapters: Sequence[Adapter], shape: Sequence[int]) -> Adapter:
    """Return one adapter for several of one weight, each for its columns or for all.

    ``Σ sᵢ·AᵢBᵢ = [s₁A₁ s₂A₂ …]·[B₁; B₂; …]``, each Bᵢ filled up with zeros to all columns.

    >>> import jax.numpy as jnp
    >>> one = Adapter(jnp.ones((3, 2)), jnp.ones((2, 4)), 0.5, columns=(0, 4))
    >>> two = Adapter(jnp.ones((3, 1)), jnp.ones((1, 5)), 2.0, columns=(6, 11))
    >>> whole = joined([one, two], (3, 11))
    >>> whole.a.shape, whole.b.shape, delta(whole)[0].tolist()
    ((3, 3), (3, 11), [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    """
    first = adapters[0]
    if len(adapters) == 1 and first.columns is None:
        return first
    stacked, axis = first.axes.count(STACKED), first.axes.index(OUT)

    def widened(adapter: Adapter) -> Array:
        start, stop = adapter.columns or (0, shape[axis])
        widths = [(0, 0)] * adapter.b.ndim
        widths[stacked + 1] = (start, shape[axis] - stop)
        return jnp.pad(adapter.b, widths)

    scale = common_scale(adapters)
    a = [lowrank.scaled(one.a, one) if scale is None else one.a for one in adapters]
    return replace(
        first,
        a=jnp.concatenate(a, axis=-1),
        b=jnp.concatenate([widened(adapter) for adapter in adapters], axis=stacked),
        scale=1.0 if scale is None else scale,
        columns=None,
    )


def common_scale(adapters: Sequence[Any]) -> Any:
    """Return the number that is the scale of all these adapters; None where there is none."""
    scales = [adapter.scale for adapter in adapters]
    same = all(is_number(scale) for scale in scales) and len({*scales}) == 1
    return scales[0] if same else None


def dora_norm(weight: Inexact[Array, "*w"], adapter: Adapter) -> Float[Array, "*stacked_out"]:
    """Return DoRA's ``‖W + s·A·B‖`` over the in axes, one for each stacked and out index.

    ``‖W‖² + 2s·Σ (WᵀA)∘Bᵀ + s²·Σ (AᵀA·B)∘B`` is the square of it, so that no sum of the weight's
    size is formed.

    Source: DoRA, arXiv 2402.09353, section 4.1.

    >>> import jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((4, 1)), jnp.ones((1, 2)), scale=2.0)
    >>> dora_norm(jnp.ones((4, 2)), adapter).tolist()
    [6.0, 6.0]
    """
    exact = lowrank.wider(lowrank.accumulation_dtype(weight.dtype), adapter.a.dtype)
    adapter = sharding.whole(adapter, weight)
    w, a, b = (array.astype(exact) for array in (weight, adapter.a, adapter.b))
    of = {letter: lowrank.axes_with(adapter.axes, letter) for letter in (STACKED, IN, OUT)}
    r, r2 = w.ndim, w.ndim + 1
    for_a, for_b = (*of[STACKED], *of[IN]), (*of[STACKED], r, *of[OUT])

    def product(one: Array, its: Axes, two: Array, others: Axes, result: Axes) -> Array:
        return jnp.einsum(one, its, two, others, result, precision=lax.Precision.HIGHEST)

    # Of complex weights the same with one side of each product conjugated, and the real part of it.
    conj, real = _parts_of(exact)
    wa = product(conj(w), range(w.ndim), a, (*for_a, r), for_b)
    gram = product(a, (*for_a, r), conj(a), (*for_a, r2), (*of[STACKED], r, r2))
    low = product(gram, (*of[STACKED], r2, r), b, (*of[STACKED], r2, *of[OUT]), for_b)
    b = lowrank.scaled(b, adapter)
    added = real(
        jnp.sum(conj(b) * (2 * conj(wa) + lowrank.scaled(low, adapter)), axis=len(of[STACKED]))
    )
    kept = sorted(of[STACKED] + of[OUT])
    squares = lax.transpose(
        real(jnp.sum(w * conj(w), axis=of[IN])),
        [kept.index(n) for n in of[STACKED] + of[OUT]],
    )
    return jnp.sqrt(jnp.maximum(squares + added, 0))


def gain(weight: Inexact[Array, "*w"], adapter: Adapter) -> Float[Array, "*stacked_1_out"] | None:
    """Return DoRA's ``m / ‖W + s·A·B‖`` in the layout of B with r = 1; None without a magnitude.

    The norm enters as a constant: it gets no gradient (arXiv 2402.09353, section 4.3).

    Where it is 0, as for a column of zeros in a checkpoint, the column has no direction to be
    scaled. The gain is m itself there, which is 0 at the start as m is the norm: the base's output.
    PEFT 0.21.2 divides by 0 and gives NaN.

    >>> import jax.numpy as jnp
    >>> pair = Adapter(jnp.ones((3, 1)), jnp.zeros((1, 2)), 1.0, magnitude=jnp.array([0.0, 5.0]))
    >>> gain(jnp.array([[0.0, 3.0], [0.0, 4.0], [0.0, 0.0]]), pair).tolist()
    [[0.0, 1.0]]
    """
    if adapter.magnitude is None:
        return None
    norm = lax.stop_gradient(dora_norm(weight, adapter))
    ratio = present(adapter.magnitude / jnp.where(norm == 0, 1, norm), adapter)
    return jnp.expand_dims(ratio, adapter.axes.count(STACKED))


def present(ratio: Float[Array, "*gain"], adapter: Adapter) -> Float[Array, "*gain"]:
    """Return DoRA's gain, and exactly 1 where there is no adapter: ``m = 0`` and ``s = 0``.

    That is what ``select`` gives an example without one. A magnitude that is 0 beside a scale
    is a trained one.

    >>> absent = Adapter(jnp.zeros((3, 1)), jnp.zeros((1, 2)), 0.0, magnitude=jnp.zeros(2))
    >>> present(jnp.zeros(2), absent).tolist()
    [1.0, 1.0]
    """
    if is_number(adapter.scale) and adapter.scale != 0:
        return ratio
    absent = (jnp.asarray(adapter.scale) == 0) & (adapter.magnitude == 0)
    return jnp.where(absent, 1, ratio)


def _parts_of(dtype: DTypeLike) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Return what conjugates arrays of a dtype and takes their real part: nothing for real ones."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.conj, jnp.real
    return (lambda x: x), (lambda x: x)


def with_gain(weight: Inexact[Array, "*w"], ratio: Any, axes: str) -> Inexact[Array, "*w"]:
    """Return the weight times a ``gain``; as it is where there is none."""
    if ratio is None:
        return weight
    return gained(weight, ratio, axes, {axis: axis for axis in range(weight.ndim)})


def gained(
    y: Inexact[Array, "*out"], ratio: Float[Array, "..."], axes: str, place: Mapping[int, int]
) -> Inexact[Array, "*out"]:
    """Return y times a ``gain``, multiplied in the wider dtype and rounded once to y's.

    Args:
        y: what is multiplied.
        ratio: of a weight with these ``axes``.
        axes: one letter for each axis of the weight.
        place: which axis of y each stacked and out axis of the weight is.
    """
    ratio = _placed(ratio, axes, place, y.ndim)
    wide = lowrank.wider(y.dtype, ratio.dtype)
    return (y.astype(wide) * ratio.astype(wide)).astype(y.dtype)


def scaled_bias(adapter: Adapter) -> Float[Array, "*stacked_1_out"] | None:
    """Return ``s·b`` in the layout of B with r = 1, in at least float32; None without a bias.

    >>> import jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((3, 2)), jnp.ones((2, 2)), 0.5, bias=jnp.array([1.0, 2.0]))
    >>> scaled_bias(adapter).tolist()
    [[0.5, 1.0]]
    """
    if adapter.bias is None:
        return None
    exact = adapter.bias.astype(lowrank.accumulation_dtype(adapter.bias.dtype))
    return jnp.expand_dims(lowrank.scaled(exact, adapter), adapter.axes.count(STACKED))


def biased(
    y: Inexact[Array, "*out"], bias: Float[Array, "..."], axes: str, place: Mapping[int, int]
) -> Inexact[Array, "*out"]:
    """Return y plus a ``scaled_bias`` in the wider dtype, which the caller rounds.

    Args:
        y: what the bias is added to.
        bias: of a weight with these ``axes``.
        axes: one letter for each axis of the weight.
        place: which axis of y each stacked and out axis of the weight is.
    """
    wide = lowrank.wider(y.dtype, bias.dtype)
    return y.astype(wide) + _placed(bias, axes, place, y.ndim).astype(wide)


def _placed(thin: Array, axes: str, place: Mapping[int, int], ndim: int) -> Array:
    """Return an array in the layout of B with r = 1 as one that broadcasts against y."""
    own = lowrank.axes_with(axes, STACKED) + lowrank.axes_with(axes, OUT)
    thin = lax.squeeze(thin, [axes.count(STACKED)])
    order = sorted(range(len(own)), key=lambda n: place[own[n]])
    return lax.expand_dims(
        lax.transpose(thin, order), [n for n in range(ndim) if n not in map(place.get, own)]
    )
