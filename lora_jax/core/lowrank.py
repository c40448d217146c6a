"""The low-rank maths on arrays, and the only place that casts.

Policy: the low-rank path computes in the wider of the input's and the adapter's dtype,
accumulates in at least float32, multiplies by the scale there, and rounds once, to the base
output's dtype. So an fp32 adapter beside a bf16 base behaves as PEFT's does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Key

from .adapter import IN, OUT, STACKED, Adapter, is_number, pick
from .xla import product_layout
from .xla.trace_once import inlined

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
def _dot(x: Array, adapter: Adapter, **static: Any) -> Array:
    hidden, apart = _lowered(x, adapter, **static)
    y = _raised(hidden, adapter, x.dtype, **static)
    if not apart:
        return y
    shape = (*y.shape[:-1], *apart) if static["weight_first"] else (*apart, *y.shape[1:])
    return y.reshape(shape)


def hiddens(
    x: Inexact[Array, "*rows i *more"],
    adapters: Sequence[Adapter],
    axis: int,
    precision: lax.PrecisionLike = None,
) -> Sequence[Inexact[Array, "..."]]:
    """Return ``x·Aₙ`` for several adapters as one product, ``x·[A₁ A₂ …]``, for ``add_raised``.

    x and its gradient are read and written once for all of them.

    Args:
        x: the input.
        adapters: of matrices, with one dtype.
        axis: of x, that is summed over.
        precision: as in ``lax.dot_general``.

    >>> import jax.numpy as jnp
    >>> one, two = (Adapter(jnp.full((3, 2), n), jnp.ones((2, 5)), 0.5) for n in (1.0, 2.0))
    >>> [hidden.tolist() for hidden in hiddens(jnp.ones((4, 3)), [one, two], axis=1)][1][0]
    [6.0, 6.0]
    """
    return _hiddens(x, [one.a for one in adapters], axis=axis, precision=precision)


@partial(inlined, static=("axis", "precision"))
def _hiddens(
    x: Array, factors: list[Array], *, axis: int, precision: lax.PrecisionLike
) -> Sequence[Array]:
    together = Adapter(jnp.concatenate(factors, axis=-1), factors[0], 1.0)
    numbers = _numbers(([axis], [0]), ((), ()))
    whole, _ = _lowered(x, together, numbers=numbers, weight_first=False, precision=precision)
    return lax.split(whole, [factor.shape[-1] for factor in factors], axis=whole.ndim - 1)


def add_raised(
    y: Inexact[Array, "*out"],
    hidden: Inexact[Array, "..."],
    adapter: Adapter,
    dtype: DTypeLike,
    precision: lax.PrecisionLike = None,
) -> Inexact[Array, "*out"]:
    """Return ``y + s·hidden·B`` for one of the ``hiddens``, as ``add_dot`` forms it.

    Args:
        y: what the addend is added to.
        hidden: ``x·A``, its rows maybe along one axis.
        adapter: whose A it was.
        dtype: of x.
        precision: as in ``lax.dot_general``.

    >>> import jax.numpy as jnp
    >>> adapter = Adapter(a=jnp.ones((3, 2)), b=jnp.ones((2, 5)), scale=0.5)
    >>> hidden, = hiddens(jnp.ones((4, 3)), [adapter], axis=1)
    >>> add_raised(jnp.ones((4, 5)), hidden, adapter, "float32")[0].tolist()
    [4.0, 4.0, 4.0, 4.0, 4.0]
    """
    return _add_raised(y, hidden, adapter, dtype=jnp.dtype(dtype), precision=precision)


@partial(inlined, static=("dtype", "precision"))
def _add_raised(
    y: Array, hidden: Array, adapter: Adapter, *, dtype: jnp.dtype, precision: lax.PrecisionLike
) -> Array:
    numbers = _numbers(([0], [adapter.axes.index(IN)]), ((), ()))
    addend = _raised(
        hidden, adapter, dtype, numbers=numbers, weight_first=False, precision=precision
    )
    return add(y, addend.reshape(y.shape))


def _lowered(
    x: Array,
    adapter: Adapter,
    *,
    numbers: Numbers,
    weight_first: bool,
    precision: lax.PrecisionLike,
) -> tuple[Array, tuple[product_layout.Size, ...]]:
    """Return ``x·A``, x's vectors along one axis, and their old sizes, as ``merged_rows`` does."""
    (x_contract, w_contract), (x_batch, w_batch) = numbers
    summed, _ = _ends(adapter, numbers)
    down, at = (adapter.a if summed == IN else adapter.b), positions(adapter.axes, summed)
    if summed == IN:
        rows = product_layout.count(x, x_contract, x_batch)
        down, at = product_layout.rank_first(down, at, len(w_batch), rows)
    x, x_contract, apart = product_layout.merged_rows(x, x_contract, x_batch)
    axes = (x_contract, x_batch), ([at[n] for n in w_contract], [at[n] for n in w_batch])
    dtype = wider(x.dtype, adapter.a.dtype)
    return _product(x, down, *axes, dtype, weight_first, precision), apart


def _raised(
    hidden: Array,
    adapter: Adapter,
    dtype: DTypeLike,
    *,
    numbers: Numbers,
    weight_first: bool,
    precision: lax.PrecisionLike,
) -> Array:
    """Return ``s·hidden·B`` for what ``_lowered`` returned for an x of this dtype."""
    w_batch = numbers[1][1]
    _, kept = _ends(adapter, numbers)
    up, at = (adapter.b if kept == OUT else adapter.a), positions(adapter.axes, kept)
    stacked = range(len(w_batch))
    rank_axis = len(w_batch) if weight_first else hidden.ndim - 1
    axes = (
        ([rank_axis], stacked),
        ([_rank_axis(adapter.axes, kept)], [at[axis] for axis in w_batch]),
    )
    dtype = wider(dtype, adapter.a.dtype)
    return _product(scaled(hidden, adapter), up, *axes, dtype, weight_first, precision)


def _ends(adapter: Adapter, numbers: Numbers) -> tuple[str, str]:
    """Return the letters that are summed over and kept: exchanged for a weight used transposed."""
    w_contract = numbers[0][1]
    transposed = bool(w_contract) and adapter.axes[w_contract[0]] == OUT
    return (OUT, IN) if transposed else (IN, OUT)


def _product(
    lhs: Array,
    rhs: Array,
    lhs_axes: tuple[Axes, Axes],
    rhs_axes: tuple[Axes, Axes],
    dtype: jnp.dtype,
    weight_first: bool,
    precision: lax.PrecisionLike,
) -> Array:
    if weight_first:
        lhs, rhs, lhs_axes, rhs_axes = rhs, lhs, rhs_axes, lhs_axes
    return lax.dot_general(
        lhs.astype(dtype),
        rhs.astype(dtype),
        ((lhs_axes[0], rhs_axes[0]), (lhs_axes[1], rhs_axes[1])),
        precision,
        preferred_element_type=accumulation_dtype(dtype),
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
    assert adapter.scale is not None
    return jnp.where(keep, x, 0), replace(adapter, scale=adapter.scale / (1 - adapter.dropout))


@inlined
def add(y: Inexact[Array, "*out"], addend: Inexact[Array, "*out"]) -> Inexact[Array, "*out"]:
    """Return ``y + addend``, summed in the wider dtype and rounded once to y's."""
    wide = wider(y.dtype, addend.dtype)
    drops = jnp.issubdtype(wide, jnp.complexfloating) and not jnp.iscomplexobj(y)
    assert not drops, "a complex change of what is real"
    return (y.astype(wide) + addend.astype(wide)).astype(y.dtype)


def scaled(x: Inexact[Array, "..."], adapter: Any) -> Inexact[Array, "..."]:
    """Return ``s·x``; a scale that is an array is fixed, too: it gets no gradient."""
    assert adapter.scale is not None, "`check_fit` lists adapters without a scale"
    if is_number(adapter.scale):
        return x * adapter.scale
    return x * lax.stop_gradient(jnp.asarray(adapter.scale, x.dtype))


def cast(x: Inexact[Array, "*x"], dtype: DTypeLike) -> Inexact[Array, "*x"]:
    """Return x in this dtype; of complex values their real part, where it is a real one.

    So cotangents of real values are, when these were read as complex.

    >>> cast(jnp.array([1 + 2j]), "float32").tolist()
    [1.0]
    """
    real = jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating)
    return (lax.real(x) if real else x).astype(dtype)


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype that sums are formed in: float32, or a wider one if given that."""
    return wider(dtype, jnp.float32)


def wider(one: DTypeLike, two: DTypeLike) -> jnp.dtype:
    """Return the dtype that holds both, where JAX's strict promotion would name none.

    JAX names none either for floats of 8 bits or fewer beside others, which hold their values.

    >>> wider("bfloat16", "float32"), wider("float8_e4m3fn", "float16")
    (dtype('float32'), dtype('float16'))
    """
    dtypes = [jnp.dtype(one), jnp.dtype(two)]
    wide = [dtype for dtype in dtypes if not is_tiny(dtype)]
    if len(wide) == 2:
        with jax.numpy_dtype_promotion("standard"):
            return jnp.promote_types(one, two)
    if dtypes[0] == dtypes[1]:
        return dtypes[0]
    # float8_e8m0fnu has exponents that float16 has not.
    largest = max(jnp.finfo(dtype).maxexp for dtype in dtypes)
    enough = [dtype for dtype in wide if jnp.finfo(dtype).maxexp == largest]
    return enough[0] if enough else jnp.dtype("float32")


def is_tiny(dtype: DTypeLike) -> bool:
    """Tell floats of 8 bits and fewer.

    >>> is_tiny("float8_e4m3fn"), is_tiny("float16"), is_tiny("int8")
    (True, False, False)
    """
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.dtype(dtype).itemsize < 2


def positions(axes: str, letter: str) -> dict[int, int]:
    """Return where each stacked axis and each axis of this letter sits in A (``i``) or B (``o``).

    >>> positions("iso", "i"), positions("iso", "o")
    ({1: 0, 0: 1}, {1: 0, 2: 2})
    """
    stacked, own = axes_with(axes, STACKED), axes_with(axes, letter)
    first = len(stacked) + (letter == OUT)
    return {n: k for k, n in enumerate(stacked)} | {n: first + k for k, n in enumerate(own)}


def _rank_axis(axes: str, letter: str) -> int:
    stacked = axes.count(STACKED)
    return stacked if letter == OUT else stacked + axes.count(IN)


def axes_with(axes: str, letter: str) -> tuple[int, ...]:
    """Return the weight's axes that have this letter.

    >>> axes_with("sio", "o")
    (2,)
    """
    return pick(tuple(range(len(axes))), axes, letter)
