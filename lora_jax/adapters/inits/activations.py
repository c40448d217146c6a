"""A and B from what the weight's input looks like: EVA and CorDA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...core import lowrank
from ...core.adapter import IN, OUT, STACKED, Adapter, Adapters, b_shape, pick
from ...core.errors import ConfigError, raise_all
from ...rewrite import LeafPlan, Unsupported
from ...rewrite.interpret import Record
from ...rewrite.trace import trace
from ...rewrite.transform import apply, reject_unused
from .weights import Matrix, Pair, Scale

# Of a batch's arguments: true where an input counts, one place for each vector the weights meet.
Mask = Callable[..., Array]

_LARGEST_ERROR = 0.05  # of an inverse, as PEFT's CorDA has it


@dataclass(frozen=True)
class Moments:
    """Sums over a weight's inputs x, one for each stacked index.

    Args:
        gram: ``Σ x·xᵀ``.
        total: ``w·Σ x``, with the w that ``count`` counts in.
        count: the number of inputs; of calls, where each call's inputs are scaled.
    """

    gram: Float[Array, "s in_ in_"]
    total: Float[Array, "s in_"]
    count: Float[Array, "s"]


def eva(
    gram: Float[Array, "in_ in_"],
    total: Float[Array, "in_"],
    count: Float[Array, ""],
    r: int,
    out: int,
    *,
    whiten: bool = False,
) -> Pair:
    """Return A, the r directions in which the inputs vary most, and ``B = 0``.

    ``A = V_r`` with ``X_cᵀX_c = V·S²·Vᵀ``, ``X_c`` the inputs less their mean; with ``whiten``
    each direction is divided by ``√S``. PEFT finds V by incremental PCA, batch by batch, until
    it stays; this one is exact for all batches together. Its ranks are those of the plan, as
    with PEFT's ``rho=1``.

    Source: EVA, arXiv 2410.07170; PEFT 0.21.2 ``init_lora_weights="eva"``.

    >>> x = jnp.array([[1.0, 5.0], [-1.0, 5.0]])
    >>> a, b = eva(x.T @ x, x.sum(0), jnp.float32(2), 1, 3)
    >>> abs(a).T.tolist(), b.tolist()
    ([[1.0, 0.0]], [[0.0, 0.0, 0.0]])
    """
    mean = total / count
    squares, v = jnp.linalg.eigh(gram - count * jnp.outer(mean, mean))
    a = v[:, ::-1][:, :r]
    if whiten:
        a = a / jnp.maximum(squares[::-1][:r], 0) ** 0.25
    return a, jnp.zeros((r, out), a.dtype)


def corda(
    w: Matrix, covariance: Float[Array, "in_ in_"], r: int, scale: Scale, *, method: str = "ipm"
) -> Pair:
    """Return r directions of ``C·W = U·S·Vᵀ``: ``A = C⁻¹U_i√(S_i/s)``, ``B = √(S_i/s)V_iᵀ``.

    C is the inputs' covariance with 1 % of its mean diagonal added, doubled until its inverse
    is good. ``"ipm"`` takes the r largest directions, which serve the inputs' task best,
    ``"kpm"`` the r smallest, which spare what the inputs need.

    Source: CorDA, arXiv 2406.05223; PEFT 0.21.2 ``init_lora_weights="corda"``.

    >>> a, b = corda(jnp.diag(jnp.array([3.0, 1.0])), jnp.eye(2), 1, 1.0)
    >>> bool(abs(a @ b - jnp.diag(jnp.array([3.0, 0.0]))).max() < 1e-5)
    True
    """
    eye, damp = jnp.eye(len(covariance), dtype=covariance.dtype), 0.01
    mean = jnp.diag(covariance).mean()
    while True:
        c = covariance + damp * mean * eye
        inverse = jnp.linalg.inv(c)
        if float(jnp.linalg.norm(c @ inverse - eye)) < _LARGEST_ERROR or damp > 1e6:
            break
        damp *= 2
    u, s, vt = jnp.linalg.svd(c @ w, full_matrices=False)
    chosen = slice(0, r) if method == "ipm" else slice(len(s) - r, len(s))
    root = jnp.sqrt(s[chosen] / scale)
    return inverse @ u[:, chosen] * root, root[:, None] * vt[chosen]


def moments(
    fn: Callable[..., Any],
    params: Any,
    leaves: Sequence[LeafPlan],
    batches: Iterable[Any],
    *,
    scaled: bool = False,
    mask: Mask | None = None,
) -> dict[str, Moments]:
    """Return the moments of what every adapted weight is multiplied by, summed over batches.

    Each weight gets a probe in its adapter's place, whose gradient is defined to be ``Σ x·xᵀ``.
    So loops, checkpointing and stacked layers need nothing more than they do in training.

    Args:
        fn: the model, ``fn(params, *batch)``.
        params: its parameters.
        leaves: the adapted leaves.
        batches: tuples of arguments.
        scaled: divide the inputs of each call by their largest value, as CorDA does.
        mask: of a batch, which inputs count: true where they do; None for all.

    Raises:
        ConfigError: there are no batches, or lists the weights whose inputs do not reach any
            output that has a gradient.
        PlanError: a weight is not used by ``dot_general`` alone, or with its axes exchanged, or
            its inputs are not those that the mask is of.
    """
    probes = {leaf.path: _probe(leaf) for leaf in leaves}

    @jax.jit
    def one(probes: Adapters, params: Any, batch: Any) -> Any:
        def seen(probes: Adapters) -> Array:
            traced = trace(fn, params, batch, {})
            counted = None if mask is None else mask(*batch)
            record = Record(product=partial(_probed, scaled=scaled, mask=counted))
            outs = apply(record, traced, traced.operands, probes)
            reject_unused(record, probes)
            floats = [out for out in outs if jnp.issubdtype(out.dtype, jnp.inexact)]
            return jnp.stack([out.astype(jnp.float32).sum() for out in floats]).sum()

        return jax.grad(seen)(probes)

    sums: Any = None
    for batch in batches:
        found = one(probes, params, tuple(batch))
        sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
    if sums is None:
        raise ConfigError("batches: got none, wanted at least one tuple of arguments")
    unseen = [f"{p}: no input reaches an output" for p, x in sums.items() if not x.b.any()]
    raise_all(ConfigError, "these weights' inputs were not seen", unseen)
    return {leaf.path: _read(leaf, sums[leaf.path]) for leaf in leaves}


def _probe(leaf: LeafPlan) -> Adapter:
    """Return an adapter with ``A = [I 0]``, so that ``x·A`` is x, flat, and one place more."""
    sizes, ins = pick(leaf.shape, leaf.axes, STACKED), pick(leaf.shape, leaf.axes, IN)
    n = math.prod(ins)
    a = jnp.broadcast_to(jnp.eye(n, n + 1).reshape(*ins, n + 1), (*sizes, *ins, n + 1))
    b = jnp.zeros(b_shape(leaf.shape, leaf.axes, n + 1), jnp.float32)
    return Adapter(a, b, 1.0, leaf.axes)


def _read(leaf: LeafPlan, sums: Adapter) -> Moments:
    n = math.prod(pick(leaf.shape, leaf.axes, IN))
    both = sums.a.reshape(-1, n, n + 1)
    count = sums.b.reshape(both.shape[0], -1)[:, 0]
    return Moments(both[:, :, :n], both[:, :, n], count)


def _probed(
    y: Array,
    x: Array,
    adapter: Adapter,
    contract: tuple[Any, Any],
    batch: tuple[Any, Any],
    weight_first: bool,
    precision: Any,
    *,
    scaled: bool,
    mask: Array | None,
) -> Array:
    """Return y, with zeros in the place of ``s·(x·A)·B`` and gradients that are moments."""
    if any(adapter.axes[n] == OUT for n in contract[1]):
        raise Unsupported("the weight is used with its axes exchanged, so it has two inputs")
    options: Any = dict(weight_first=weight_first, precision=lax.Precision.HIGHEST)
    kept = [n for n, letter in enumerate(adapter.axes) if letter != OUT]
    letters = "".join(adapter.axes[n] for n in kept) + OUT
    at = tuple(tuple(kept.index(n) for n in axes) for axes in (contract[1], batch[1]))
    axes, r, sizes = (
        adapter.axes,
        adapter.a.shape[-1],
        adapter.b.shape[: adapter.axes.count(STACKED)],
    )

    def flat(x: Array, a: Array) -> Array:
        eye = jnp.broadcast_to(jnp.eye(r), (*sizes, r, r))
        only_a = Adapter(a, eye, 1.0, letters)
        return lowrank.dot(x, only_a, (contract[0], at[0]), (batch[0], at[1]), **options)

    @jax.custom_vjp
    def probe(x: Array, a: Array, b: Array, kept: Array) -> Array:
        shape = jax.eval_shape(
            lambda: lowrank.dot(x, Adapter(a, b, 1.0, axes), contract, batch, **options)
        )
        return jnp.zeros(shape.shape, shape.dtype)

    def forward(x: Array, a: Array, b: Array, kept: Array) -> Any:
        return probe(x, a, b, kept), (x, a, b, kept)

    def backward(saved: Any, _: Array) -> Any:
        x, a, b, kept = saved
        wide = jnp.where(_beside(kept, x, contract[0], batch[0]), x.astype(jnp.float32), 0)
        if scaled:
            others = tuple(n for n in range(x.ndim) if n not in batch[0])
            seen = _beside(kept, x, contract[0], batch[0])
            largest = abs(jnp.where(seen, wide, -jnp.inf).max(axis=others, keepdims=True))
            wide = wide / jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)
        hidden, pull = jax.vjp(partial(flat, wide), a)
        rank_axis = len(batch[0]) if weight_first else hidden.ndim - 1
        rows = kept.sum()
        weight = jnp.where(rows > 0, 1 / jnp.maximum(rows, 1), 0) if scaled else 1.0
        place = lax.broadcasted_iota(jnp.int32, hidden.shape, rank_axis) == r - 1
        (moments,) = pull(jnp.where(place, weight, hidden))
        return jnp.zeros_like(x), moments, jnp.full_like(b, rows * weight), jnp.zeros_like(kept)

    probe.defvjp(forward, backward)
    kept = _rows(mask, tuple(x.shape[n] for n in _free(x, contract[0], batch[0])))
    return lowrank.add(y, probe(x, adapter.a, adapter.b, kept))


def _free(x: Array, contract: Any, batch: Any) -> list[int]:
    """Return the axes of x that count its vectors."""
    return [n for n in range(x.ndim) if n not in contract and n not in batch]


def _rows(mask: Array | None, shape: tuple[int, ...]) -> Float[Array, "*rows"]:
    """Return 1 for every vector that counts, in the shape in which x has them."""
    if mask is None:
        return jnp.ones(shape, jnp.float32)
    if shape not in (mask.shape, (mask.size,)):
        raise Unsupported(f"its inputs are {shape} vectors, and the mask is {mask.shape}")
    return mask.astype(bool).astype(jnp.float32).reshape(shape)


def _beside(kept: Float[Array, "*rows"], x: Array, contract: Any, batch: Any) -> Array:
    """Return, for every place of x, whether its vector counts."""
    free = _free(x, contract, batch)
    return (kept != 0).reshape([x.shape[n] if n in free else 1 for n in range(x.ndim)])
