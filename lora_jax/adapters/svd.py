"""Adapters in matrix form, and the SVD of ``A·B`` that never forms a matrix of W's size.

Whatever its axes, an adapter is ``stacked`` pairs A ``(in, r)`` and B ``(r, out)``, with the
axes of one letter flattened into one. Everything here computes in at least float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..core.adapter import STACKED, Adapter, Adapters, Full, Rows, rank
from ..core.lowrank import accumulation_dtype

# (s, in, r) and (s, r, out); ranks differ where several of them meet.
Factors = tuple[Float[Array, "_ _ _"], Float[Array, "_ _ _"]]

dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def factors(adapter: Adapter) -> Factors:
    """Return A ``(s, in, r)`` and B ``(s, r, out)`` without the scale, in at least float32.

    >>> pair = Adapter(jnp.ones((6, 384, 8)), jnp.ones((6, 8, 12, 32)), 2.0, "sioo")
    >>> a, b = factors(pair)
    >>> a.shape, b.shape
    ((6, 384, 8), (6, 8, 384))
    """
    stacked, fan_in, out = sizes(adapter)
    exact, r = accumulation_dtype(adapter.a.dtype), rank(adapter)
    a = adapter.a.astype(exact).reshape(math.prod(stacked), math.prod(fan_in), r)
    return a, adapter.b.astype(exact).reshape(math.prod(stacked), r, math.prod(out))


def scaled_factors(adapter: Adapter, weight: float = 1.0) -> Factors:
    """Return the pair with weight and scale put into A: ``A·B`` is then ``weight · ΔW``."""
    a, b = factors(adapter)
    return a * (weight * scale_of(adapter)), b


def with_factors(like: Adapter, pair: Factors, scale: float) -> Adapter:
    """Return an adapter for the same weight with another A and B, in the old dtypes.

    >>> pair = Adapter(jnp.ones((6, 384, 8)), jnp.ones((6, 8, 12, 32)), 2.0, "sioo")
    >>> with_factors(pair, (jnp.ones((6, 384, 3)), jnp.ones((6, 3, 384))), 1.0).b.shape
    (6, 3, 12, 32)
    """
    stacked, fan_in, out = sizes(like)
    a, b = pair
    a = a.reshape(*stacked, *fan_in, a.shape[-1]).astype(like.a.dtype)
    b = b.reshape(*stacked, b.shape[1], *out).astype(like.b.dtype)
    return replace(like, a=a, b=b, scale=scale)


def sizes(adapter: Adapter) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of the stacked, in and out axes."""
    stacked = adapter.axes.count(STACKED)
    a, b = tuple(adapter.a.shape), tuple(adapter.b.shape)
    return a[:stacked], a[stacked:-1], b[stacked + 1 :]


def scale_of(adapter: Adapter) -> float:
    """Return the scale as a number; `misfits` lists those that have none."""
    assert adapter.scale is not None
    return float(np.asarray(adapter.scale))


def concatenated(pairs: Sequence[Factors]) -> Factors:
    """Return ``[A₁ A₂ …]`` and ``[B₁; B₂; …]``, whose product is ``Σ AᵢBᵢ`` exactly."""
    return jnp.concatenate([a for a, _ in pairs], -1), jnp.concatenate([b for _, b in pairs], 1)


def padded(pair: Factors, r: int) -> Factors:
    """Return the pair with zeros up to rank r; the product stays as it is."""
    more = max(r - pair[0].shape[-1], 0)
    return (
        jnp.pad(pair[0], ((0, 0), (0, 0), (0, more))),
        jnp.pad(pair[1], ((0, 0), (0, more), (0, 0))),
    )


def svd(
    pair: Factors,
) -> tuple[Float[Array, "s i k"], Float[Array, "s k"], Float[Array, "s k o"]]:
    """Return U, σ and Vᵀ of ``A·B``, from the QR of A and of Bᵀ and the SVD of the small core.

    ``A = Q₁R₁`` and ``Bᵀ = Q₂R₂`` give ``AB = Q₁(R₁R₂ᵀ)Q₂ᵀ``, so k is at most r.

    >>> u, sigma, vt = svd((jnp.ones((1, 40, 2)), jnp.ones((1, 2, 10))))
    >>> u.shape, vt.shape, [round(float(s), 3) for s in sigma[0]]
    ((1, 40, 2), (1, 2, 10), [40.0, 0.0])
    """
    left, right, core = _core(pair)
    u, sigma, vt = jnp.linalg.svd(core, full_matrices=False)
    return dot(left, u), sigma, dot(vt, right.swapaxes(1, 2))


def singular_values(pair: Factors) -> Float[Array, "s k"]:
    """Return the singular values of ``A·B``."""
    return jnp.linalg.svd(_core(pair)[2], compute_uv=False)


def norm(pair: Factors) -> float:
    """Return the Frobenius norm of ``A·B``, all stacked ones together.

    >>> round(norm((jnp.ones((1, 8, 1)), jnp.ones((1, 1, 2)))), 6)
    4.0
    """
    return float(jnp.linalg.norm(_core(pair)[2]))


def ratio(part: float, whole: float) -> float:
    """Return ``part / whole``, 0 where both are 0."""
    return part / whole if whole else (math.inf if part else 0.0)


def pairs_of(adapters: Adapters) -> dict[str, Adapter]:
    """Return the low-rank ones, without leaves and rows trained in full."""
    return {path: one for path, one in adapters.items() if isinstance(one, Adapter)}


def misfits(
    trees: Iterable[Adapters], *, same_rank: bool = False, biases: bool = False
) -> list[str]:
    """Return why these adapters cannot be reckoned with together; empty if they can.

    Args:
        trees: adapters of one model, of the same or of different paths.
        same_rank: whether a path's ranks must be equal, too.
        biases: whether adapters may have a bias.
    """
    found: dict[str, None] = {}
    firsts: dict[str, Adapter] = {}
    for n, tree in enumerate(trees):
        for path, entry in tree.items():
            if isinstance(entry, Full):
                found[f"{path}: trained in full, so its change is not known; leave it out"] = None
                continue
            if isinstance(entry, Rows):
                found[f"{path}: rows trained as they are, of unknown change; leave it out"] = None
                continue
            if entry.scale is None or np.ndim(entry.scale):
                found[f"{path}: scale got {_shape_of(entry.scale)}, wanted one number"] = None
            if entry.magnitude is not None:
                found[f"{path}: DoRA's change is not A·B alone; merge it, or leave it out"] = None
            if entry.bias is not None and not biases:
                found[f"{path}: its bias is no part of A·B; merge it, or leave it out"] = None
            first = firsts.setdefault(path, entry)
            for what, got in _traits(entry, same_rank).items():
                wanted = _traits(first, same_rank)[what]
                if got != wanted:
                    found[f"{path}: {what} of number {n} got {got}, wanted {wanted}"] = None
    return list(found)


def _traits(adapter: Adapter, same_rank: bool) -> Mapping[str, object]:
    traits: dict[str, object] = {
        "axes": adapter.axes,
        "shape": sizes(adapter),
        "columns": adapter.columns,
        "masked": adapter.masked,
        "dtype": adapter.a.dtype.name,
    }
    return traits | ({"rank": rank(adapter)} if same_rank else {})


def _shape_of(scale: object) -> object:
    return None if scale is None else np.shape(scale)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _core(
    pair: Factors,
) -> tuple[Float[Array, "s i k"], Float[Array, "s o l"], Float[Array, "s k l"]]:
    left, ra = jnp.linalg.qr(pair[0])
    right, rb = jnp.linalg.qr(pair[1].swapaxes(1, 2))
    return left, right, dot(ra, rb.swapaxes(1, 2))
