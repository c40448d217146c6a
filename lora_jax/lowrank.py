"""The low-rank maths on arrays, and the only place that casts.

Policy: the low-rank path computes in the wider of the input's and the adapter's dtype,
accumulates in at least float32, multiplies by the scale there, and rounds once, to the base
output's dtype. So an fp32 adapter beside a bf16 base behaves as PEFT's does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Inexact, Key

from . import arranging
from .adapter import IN, OUT, STACKED, Adapter, is_number, pick
from .inlining import inlined

Axes = Sequence[int]
Numbers = tuple[tuple[Axes, Axes], tuple[Axes, Axes]]

_STATIC = ("numbers", "weight_first", "precision")


def dot(
    x: Inexact[Array, "..."],
    adapter: Adapter,
    contract: tuple[Axes, Axes],
    batch: tuple[Axes, Axes] = ((), ()),
    *,
    weight_first: bool = False,
    precision: lax.PrecisionLike = None,
) -> Inexact[Array, "..."]:
    """Return ``s·(x·A)·B``, laid out as ``lax.dot_general(x, W)`` lays out ``x·W``.

    Args:
        x: the input.
        adapter: A, B and scale for a weight with axes ``adapter.axes``.
        contract: the axes summed over, of x and of the weight, in pairs. They are all of the
            weight's ``i`` axes, or all of its ``o`` axes when the weight is used transposed.
        batch: the batch axes of x and of the weight (all of its ``s`` axes), in pairs.
        weight_first: the layout of ``lax.dot_general(W, x)`` instead.
        precision: as in ``lax.dot_general``.

    Returns:
        The addend in the accumulation dtype, see ``add``.

    Source: LoRA, arXiv 2106.09685, section 4.1.

    >>> import jax.numpy as jnp
    >>> adapter = Adapter(a=jnp.ones((3, 2)), b=jnp.ones((2, 5)), scale=0.5)
    >>> dot(jnp.ones((4, 3)), adapter, contract=([1], [0]))[0]
    Array([3., 3., 3., 3., 3.], dtype=float32)
    """
    numbers = _numbers(contract, batch)
    return _dot(x, adapter, numbers=numbers, weight_first=weight_first, precision=precision)


def add_dot(
    y: Inexact[Array, "*out"],
    x: Inexact[Array, "..."],
    adapter: Adapter,
    contract: tuple[Axes, Axes],
    batch: tuple[Axes, Axes] = ((), ()),
    weight_first: bool = False,
    precision: lax.PrecisionLike = None,
) -> Inexact[Array, "*out"]:
    """Return ``y + s·(x·A)·B``: the sum that ``add`` forms of y and ``dot``.

    >>> import jax.numpy as jnp
    >>> adapter = Adapter(a=jnp.ones((3, 2)), b=jnp.ones((2, 5)), scale=0.5)
    >>> add_dot(jnp.ones((4, 5)), jnp.ones((4, 3)), adapter, contract=([1], [0]))[0]
    Array([4., 4., 4., 4., 4.], dtype=float32)
    """
    numbers = _numbers(contract, batch)
    return _add_dot(y, x, adapter, numbers=numbers, weight_first=weight_first, precision=precision)


def _numbers(contract: tuple[Axes, Axes], batch: tuple[Axes, Axes]) -> Numbers:
    return (tuple(contract[0]), tuple(contract[1])), (tuple(batch[0]), tuple(batch[1]))


# Layers of one shape share one tracing.
@partial(inlined, static=_STATIC)
def _add_dot(y: Array, x: Array, adapter: Adapter, **static: Any) -> Array:
    return add(y, _dot(x, adapter, **static))


@partial(inlined, static=_STATIC)
def _dot(
    x: Array,
    adapter: Adapter,
    *,
    numbers: Numbers,
    weight_first: bool,
    precision: lax.PrecisionLike,
) -> Array:
    (x_contract, w_contract), (x_batch, w_batch) = numbers
    transposed = bool(w_contract) and adapter.axes[w_contract[0]] == OUT
    summed, kept = (OUT, IN) if transposed else (IN, OUT)
    down, up = (adapter.b, adapter.a) if transposed else (adapter.a, adapter.b)
    at_down, at_up = positions(adapter.axes, summed), positions(adapter.axes, kept)
    if not transposed:
        rows = arranging.count(x, x_contract, x_batch)
        down, at_down = arranging.rank_first(down, at_down, len(w_batch), rows)

    dtype = wider(x.dtype, adapter.a.dtype)
    exact = accumulation_dtype(dtype)

    def product(lhs: Array, rhs: Array, lhs_axes: tuple[Axes, Axes], rhs_axes: tuple[Axes, Axes]):
        if weight_first:
            lhs, rhs, lhs_axes, rhs_axes = rhs, lhs, rhs_axes, lhs_axes
        return lax.dot_general(
            lhs.astype(dtype),
            rhs.astype(dtype),
            ((lhs_axes[0], rhs_axes[0]), (lhs_axes[1], rhs_axes[1])),
            precision,
            preferred_element_type=exact,
        )

    x, x_contract, apart = arranging.merged_rows(x, x_contract, x_batch)
    hidden = product(
        x,
        down,
        (x_contract, x_batch),
        ([at_down[axis] for axis in w_contract], [at_down[axis] for axis in w_batch]),
    )
    stacked = range(len(w_batch))
    rank_axis = len(w_batch) if weight_first else hidden.ndim - 1
    y = product(
        scaled(hidden, adapter),
        up,
        ([rank_axis], stacked),
        ([_rank_axis(adapter.axes, kept)], [at_up[axis] for axis in w_batch]),
    )
    if not apart:
        return y
    return y.reshape(*y.shape[:-1], *apart) if weight_first else y.reshape(*apart, *y.shape[1:])


def drop(
    x: Inexact[Array, "..."], adapter: Adapter, key: Key[Array, ""]
) -> tuple[Inexact[Array, "..."], Adapter]:
    """Zero elements of x with probability ``adapter.dropout``, and make the scale up for it.

    ``1 / (1 - p)`` goes into the scale, where a bf16 x does not round it.

    >>> import jax, jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((8, 2)), jnp.ones((2, 5)), scale=1.0, dropout=0.5)
    >>> x, scaled = drop(jnp.ones((4, 8)), adapter, jax.random.key(0))
    >>> scaled.scale, bool(((x == 0) | (x == 1)).all())
    (2.0, True)
    """
    keep = random.bernoulli(key, 1 - adapter.dropout, x.shape)
    assert adapter.scale is not None
    return jnp.where(keep, x, 0), replace(adapter, scale=adapter.scale / (1 - adapter.dropout))


@inlined
def add(y: Inexact[Array, "*out"], addend: Inexact[Array, "*out"]) -> Inexact[Array, "*out"]:
    """Return ``y + addend``, summed in the wider dtype and rounded once to y's."""
    wide = wider(y.dtype, addend.dtype)
    return (y.astype(wide) + addend.astype(wide)).astype(y.dtype)


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
    a = [scaled(one.a, one) if scale is None else one.a for one in adapters]
    return replace(
        first,
        a=jnp.concatenate(a, axis=-1),
        b=jnp.concatenate([widened(adapter) for adapter in adapters], axis=stacked),
        scale=1.0 if scale is None else scale,
        columns=None,
    )


def scaled(x: Inexact[Array, "..."], adapter: Any) -> Inexact[Array, "..."]:
    """Return ``s·x``; a scale that is an array is fixed, too: it gets no gradient."""
    assert adapter.scale is not None, "`check_fit` lists adapters without a scale"
    if is_number(adapter.scale):
        return x * adapter.scale
    return x * lax.stop_gradient(jnp.asarray(adapter.scale, x.dtype))


def common_scale(adapters: Sequence[Any]) -> Any:
    """Return the number that is the scale of all these adapters; None where there is none."""
    scales = [adapter.scale for adapter in adapters]
    same = all(is_number(scale) for scale in scales) and len({*scales}) == 1
    return scales[0] if same else None


def delta(adapter: Adapter) -> Float[Array, "..."]:
    """Return ``ΔW = s·A·B`` in the weight's axis order, accumulated in at least float32.

    >>> import jax.numpy as jnp
    >>> stacked = Adapter(jnp.ones((6, 4, 2)), jnp.ones((6, 2, 5)), scale=1.0, axes="sio")
    >>> delta(stacked).shape
    (6, 4, 5)
    """
    exact = accumulation_dtype(adapter.a.dtype)
    stacked = range(adapter.axes.count(STACKED))
    product = lax.dot_general(
        adapter.a.astype(exact),
        adapter.b.astype(exact),
        (([adapter.a.ndim - 1], [len(stacked)]), (stacked, stacked)),
        precision=lax.Precision.HIGHEST,
    )
    grouped = [n for letter in (STACKED, IN, OUT) for n in _axes_with(adapter.axes, letter)]
    return scaled(lax.transpose(product, [grouped.index(n) for n in range(len(grouped))]), adapter)


def merged(weight: Inexact[Array, "*w"], adapter: Adapter) -> Inexact[Array, "*w"]:
    """Return ``W + s·A·B``, or DoRA's weight, formed in at least float32 and rounded once."""
    change = delta(adapter)
    if adapter.magnitude is not None:
        wide = weight.astype(wider(weight.dtype, change.dtype))
        return with_gain(add(wide, change), gain(weight, adapter), adapter.axes).astype(
            weight.dtype
        )
    if adapter.columns is None:
        return add(weight, change)
    start, stop = adapter.columns
    axis = adapter.axes.index(OUT)
    old = lax.slice_in_dim(weight, start, stop, axis=axis)
    return lax.dynamic_update_slice_in_dim(weight, add(old, change), start, axis)


def change(weight: Inexact[Array, "*w"], adapters: Sequence[Adapter]) -> Float[Array, "*w"]:
    """Return what these adapters of one weight add to it, in at least float32.

    That is ``Σ s·A·B``, and with DoRA ``m·(W + s·A·B)/‖W + s·A·B‖ − W``.

    >>> import jax.numpy as jnp
    >>> pair = Adapter(jnp.ones((4, 1)), jnp.ones((1, 2)), 0.5, magnitude=jnp.full(2, 6.0))
    >>> change(jnp.ones((4, 2)), [pair])[0].tolist()
    [2.0, 2.0]
    """
    if len(adapters) == 1 and adapters[0].magnitude is not None:
        wide = weight.astype(accumulation_dtype(weight.dtype))
        return merged(wide, adapters[0]) - wide
    return delta(joined(adapters, weight.shape))


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
    exact = wider(accumulation_dtype(weight.dtype), adapter.a.dtype)
    w, a, b = (array.astype(exact) for array in (weight, adapter.a, adapter.b))
    of = {letter: _axes_with(adapter.axes, letter) for letter in (STACKED, IN, OUT)}
    r, r2 = w.ndim, w.ndim + 1
    for_a, for_b = (*of[STACKED], *of[IN]), (*of[STACKED], r, *of[OUT])

    def product(one: Array, its: Axes, two: Array, others: Axes, result: Axes) -> Array:
        return jnp.einsum(one, its, two, others, result, precision=lax.Precision.HIGHEST)

    wa = product(w, range(w.ndim), a, (*for_a, r), for_b)
    gram = product(a, (*for_a, r), a, (*for_a, r2), (*of[STACKED], r, r2))
    low = product(gram, (*of[STACKED], r2, r), b, (*of[STACKED], r2, *of[OUT]), for_b)
    b = scaled(b, adapter)
    added = jnp.sum(b * (2 * wa + scaled(low, adapter)), axis=len(of[STACKED]))
    kept = sorted(of[STACKED] + of[OUT])
    squares = lax.transpose(
        jnp.sum(w * w, axis=of[IN]), [kept.index(n) for n in of[STACKED] + of[OUT]]
    )
    return jnp.sqrt(jnp.maximum(squares + added, 0))


def gain(weight: Inexact[Array, "*w"], adapter: Adapter) -> Float[Array, "*stacked_1_out"] | None:
    """Return DoRA's ``m / ‖W + s·A·B‖`` in the layout of B with r = 1; None without a magnitude.

    The norm enters as a constant: it gets no gradient (arXiv 2402.09353, section 4.3).
    """
    if adapter.magnitude is None:
        return None
    norm = lax.stop_gradient(dora_norm(weight, adapter))
    return jnp.expand_dims(adapter.magnitude / norm, adapter.axes.count(STACKED))


def scaled_bias(adapter: Adapter) -> Float[Array, "*stacked_1_out"] | None:
    """Return ``s·b`` in the layout of B with r = 1, in at least float32; None without a bias.

    >>> import jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((3, 2)), jnp.ones((2, 2)), 0.5, bias=jnp.array([1.0, 2.0]))
    >>> scaled_bias(adapter).tolist()
    [[0.5, 1.0]]
    """
    if adapter.bias is None:
        return None
    exact = adapter.bias.astype(accumulation_dtype(adapter.bias.dtype))
    return jnp.expand_dims(scaled(exact, adapter), adapter.axes.count(STACKED))


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
    wide = wider(y.dtype, bias.dtype)
    return y.astype(wide) + _placed(bias, axes, place, y.ndim).astype(wide)


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
    wide = wider(y.dtype, ratio.dtype)
    return (y.astype(wide) * ratio.astype(wide)).astype(y.dtype)


def _placed(thin: Array, axes: str, place: Mapping[int, int], ndim: int) -> Array:
    """Return an array in the layout of B with r = 1 as one that broadcasts against y."""
    own = _axes_with(axes, STACKED) + _axes_with(axes, OUT)
    thin = lax.squeeze(thin, [axes.count(STACKED)])
    order = sorted(range(len(own)), key=lambda n: place[own[n]])
    return lax.expand_dims(
        lax.transpose(thin, order), [n for n in range(ndim) if n not in map(place.get, own)]
    )


def with_gain(weight: Inexact[Array, "*w"], ratio: Any, axes: str) -> Inexact[Array, "*w"]:
    """Return the weight times a ``gain``; as it is where there is none."""
    if ratio is None:
        return weight
    return gained(weight, ratio, axes, {axis: axis for axis in range(weight.ndim)})


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype that sums are formed in: float32, or a wider one if given that."""
    return wider(dtype, jnp.float32)


def wider(one: DTypeLike, two: DTypeLike) -> jnp.dtype:
    """Return the dtype that holds both, where JAX's strict promotion would name none.

    >>> wider("bfloat16", "float32")
    dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, two)


def positions(axes: str, letter: str) -> dict[int, int]:
    """Return where each stacked axis and each axis of this letter sits in A (``i``) or B (``o``).

    >>> positions("iso", "i"), positions("iso", "o")
    ({1: 0, 0: 1}, {1: 0, 2: 2})
    """
    stacked, own = _axes_with(axes, STACKED), _axes_with(axes, letter)
    first = len(stacked) + (letter == OUT)
    return {n: k for k, n in enumerate(stacked)} | {n: first + k for k, n in enumerate(own)}


def _rank_axis(axes: str, letter: str) -> int:
    stacked = axes.count(STACKED)
    return stacked if letter == OUT else stacked + axes.count(IN)


def _axes_with(axes: str, letter: str) -> tuple[int, ...]:
    return pick(tuple(range(len(axes))), axes, letter)
