"""The low-rank maths on arrays, and the only place that casts.

Policy: the low-rank path computes in the wider of the input's and the adapter's dtype,
accumulates in at least float32, multiplies by the scale there, and rounds once, to the base
output's dtype. So an fp32 adapter beside a bf16 base behaves as PEFT's does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Inexact, Key

from .adapter import IN, OUT, STACKED, Adapter, pick
from .inlining import inlined

Axes = Sequence[int]


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
    return _dot(
        x,
        adapter,
        contract=(tuple(contract[0]), tuple(contract[1])),
        batch=(tuple(batch[0]), tuple(batch[1])),
        weight_first=weight_first,
        precision=precision,
    )


# Layers of one shape share one tracing.
@partial(inlined, static=("contract", "batch", "weight_first", "precision"))
def _dot(
    x: Array,
    adapter: Adapter,
    *,
    contract: tuple[Axes, Axes],
    batch: tuple[Axes, Axes],
    weight_first: bool,
    precision: lax.PrecisionLike,
) -> Array:
    x_contract, w_contract = contract
    x_batch, w_batch = batch
    transposed = bool(w_contract) and adapter.axes[w_contract[0]] == OUT
    summed, kept = (OUT, IN) if transposed else (IN, OUT)
    down, up = (adapter.b, adapter.a) if transposed else (adapter.a, adapter.b)
    at_down, at_up = positions(adapter.axes, summed), positions(adapter.axes, kept)

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

    hidden = product(
        x,
        down,
        (x_contract, x_batch),
        ([at_down[axis] for axis in w_contract], [at_down[axis] for axis in w_batch]),
    )
    stacked = range(len(w_batch))
    rank_axis = len(w_batch) if weight_first else hidden.ndim - 1
    return product(
        hidden * adapter.scale,
        up,
        ([rank_axis], stacked),
        ([_rank_axis(adapter.axes, kept)], [at_up[axis] for axis in w_batch]),
    )


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
    return jnp.where(keep, x, 0), replace(adapter, scale=adapter.scale / (1 - adapter.dropout))


@inlined
def add(y: Inexact[Array, "*out"], addend: Inexact[Array, "*out"]) -> Inexact[Array, "*out"]:
    """Return ``y + addend``, summed in the wider dtype and rounded once to y's."""
    wide = wider(y.dtype, addend.dtype)
    return (y.astype(wide) + addend.astype(wide)).astype(y.dtype)


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
    return lax.transpose(product, [grouped.index(n) for n in range(len(grouped))]) * adapter.scale


def merged(weight: Inexact[Array, "*w"], adapter: Adapter) -> Inexact[Array, "*w"]:
    """Return ``W + s·A·B``, summed in at least float32 and rounded once to W's dtype."""
    return add(weight, delta(adapter))


def dora_norm(weight: Inexact[Array, "*w"], adapter: Adapter) -> Float[Array, "*stacked_out"]:
    """Return DoRA's ``‖W + s·A·B‖`` over the in axes, one for each stacked and out index.

    It enters ``y = m / ‖W + s·A·B‖ · x(W + s·A·B)`` as a constant: the caller stops its
    gradient (arXiv 2402.09353, section 4.3).
    """
    change = delta(adapter)
    whole = add(weight.astype(wider(weight.dtype, change.dtype)), change)
    return jnp.sqrt(jnp.sum(whole * whole, axis=_axes_with(adapter.axes, IN)))


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
