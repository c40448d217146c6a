"""Adapters of another rank, by SVD, without a matrix of the weight's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Key

from ..core.adapter import Adapter, Adapters, Entry, rank
from ..core.buffers import apart
from ..core.errors import AdapterError, raise_all
from ..core.initializers import fold_in_path, kaiming_uniform
from .svd import (
    Factors,
    factors,
    misfits,
    norm,
    padded,
    pairs_of,
    ratio,
    scaled_factors,
    svd,
    with_factors,
)


def resize(
    adapters: Adapters, r: int | Mapping[str, int], *, key: Key[Array, ""] | None = None
) -> tuple[dict[str, Entry], dict[str, float]]:
    """Return adapters of rank r, and the relative Frobenius error of each.

    A smaller rank keeps the r largest singular values of ``A·B = UΣVᵀ``:
    ``A' = U√Σ``, ``B' = √ΣVᵀ``, the best there is (Eckart and Young), with an error of
    ``√(Σₖ₌ᵣ₊₁ σₖ²) / √(Σ σₖ²)``. A larger one is exact. The scale stays, so a configuration
    that goes with the result has ``lora_alpha = scale · r``.

    Args:
        adapters: leaves and rows trained in full pass through.
        r: the rank, or one for each path; what the mapping does not name stays.
        key: with it, a larger rank's new part of A is drawn as for fresh adapters; without,
            it is zero like B's, and gets no gradient.

    Returns:
        The adapters, and the error by path; 0 where nothing was taken away.

    Raises:
        AdapterError: lists ranks below 1, names without an adapter, adapters without a scale.

    >>> import jax
    >>> a, b = jnp.diag(jnp.array([1.0, 2.0, 2.0])), jnp.eye(3, 4)
    >>> smaller, errors = resize({"w": Adapter(a, b, scale=0.5)}, 2)
    >>> smaller["w"].a.shape, smaller["w"].b.shape, round(errors["w"], 4)
    ((3, 2), (2, 4), 0.3333)
    """
    pairs = pairs_of(adapters)
    wanted = dict(r) if isinstance(r, Mapping) else dict.fromkeys(pairs, r)
    problems = [f"{path}: got rank {n}, wanted at least 1" for path, n in wanted.items() if n < 1]
    problems += [f"{path}: no such adapter" for path in wanted if path not in pairs]
    problems += misfits([pairs], biases=True)
    raise_all(AdapterError, "these adapters cannot be resized", problems)
    resized, errors = dict(adapters), dict.fromkeys(pairs, 0.0)
    for path, to in wanted.items():
        old = pairs[path]
        if to > rank(old):
            resized[path] = _grown(old, to, None if key is None else fold_in_path(key, path))
        elif to < rank(old):
            pair, errors[path] = truncated(*svd(factors(old)), to)
            resized[path] = replace(with_factors(old, pair, 1.0), scale=old.scale)
    return apart(resized, adapters), errors


def truncated(u: Array, sigma: Array, vt: Array, r: int) -> tuple[Factors, float]:
    """Return ``U√Σ`` and ``√ΣVᵀ`` of the r largest singular values, and the relative error.

    >>> pair, error = truncated(jnp.eye(2)[None], jnp.array([[4.0, 3.0]]), jnp.eye(2)[None], 1)
    >>> pair[0].tolist(), round(error, 6)
    ([[[2.0], [0.0]]], 0.6)
    """
    root = jnp.sqrt(sigma[:, :r])
    pair = u[..., :r] * root[:, None, :], root[..., None] * vt[:, :r]
    error = ratio(float(jnp.linalg.norm(sigma[:, r:])), float(jnp.linalg.norm(sigma)))
    return padded(pair, r), error


def effective_rank(adapter: Adapter) -> float:
    """Return ``exp(H(σ / Σσ))``, how many singular values ``ΔW`` really has; 0 for ``ΔW = 0``.

    r equal ones give r, one alone gives 1. Stacked adapters give their mean.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.

    >>> round(effective_rank(Adapter(jnp.eye(5, 3), jnp.eye(3, 4), scale=1.0)), 3)
    3.0
    """
    _, sigma, _ = svd(factors(adapter))
    total = sigma.sum(1, keepdims=True)
    share = sigma / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0), 1)
    return float(jnp.where(total[:, 0] > 0, jnp.exp(entropy), 0).mean())


def delta_norm(adapter: Adapter) -> float:
    """Return ``‖ΔW‖`` (Frobenius), without forming ``ΔW``.

    >>> round(delta_norm(Adapter(jnp.ones((8, 1)), jnp.ones((1, 2)), scale=-0.5)), 6)
    2.0
    """
    return norm(scaled_factors(adapter))


def _grown(old: Adapter, r: int, key: Key[Array, ""] | None) -> Adapter:
    a, b = factors(old)
    pair = padded((a, b), r)
    if key is not None:
        fresh, _ = kaiming_uniform(key, len(a), a.shape[1], r - rank(old), b.shape[2])
        pair = jnp.concatenate([a, fresh.astype(a.dtype)], -1), pair[1]
    return replace(with_factors(old, pair, 1.0), scale=old.scale)
