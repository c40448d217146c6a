"""A and B from the gradient of the weight: LoRA-GA."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ...core import paths
from .weights import Matrix, Pair, Scale

SCALES = ("stable", "weight_svd", "gd_scale", "unit")


def _random(r: int, key: Key[Array, ""]) -> tuple[Array, Array]:
    chosen = jax.random.permutation(key, 2 * r)[:r]
    return chosen, chosen


# For r of the first 2r singular directions: those of A, and those of B.
DIRECTIONS: dict[str, Callable[[int, Any], tuple[Any, Any]]] = {
    "ArB2r": lambda r, _: (slice(0, r), slice(r, 2 * r)),
    "A2rBr": lambda r, _: (slice(r, 2 * r), slice(0, r)),
    "ArBr": lambda r, _: (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
    "random": _random,
}


def lora_ga(
    w: Matrix,
    gradient: Matrix,
    r: int,
    scale: Scale,
    *,
    direction: str = "ArB2r",
    scaling: str = "stable",
    stable_gamma: Scale = 16,
    key: Key[Array, ""] | None = None,
) -> Pair:
    """Return A and B from the 2r largest singular directions of the gradient, r for each.

    ``G = U·S·Vᵀ``; ``A = U_i``, ``B = c·S_j·V_jᵀ`` with i, j as ``direction`` says. The factor c
    is ``out^¼/√γ`` for ``"stable"``, ``σ₁(W)/S_j[0]`` for ``"weight_svd"``, ``1/s`` (on A, too)
    for ``"gd_scale"``, 1 for ``"unit"``. ``"random"`` takes the same r directions for both, drawn
    with ``key``. PEFT takes a randomised SVD, this an exact one; and for transformers' Conv1D
    PEFT has the number of inputs in the place of ``out``, as its weight lies the other way round.

    Source: LoRA-GA, arXiv 2407.05000; PEFT 0.21.2 ``init_lora_weights="lora_ga"``.

    >>> g = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    >>> a, b = lora_ga(g, g, 1, 1.0, scaling="unit")
    >>> abs(a).T.tolist(), abs(b).tolist()
    ([[1.0, 0.0, 0.0]], [[0.0, 2.0, 0.0]])
    """
    u, s, vt = jnp.linalg.svd(gradient, full_matrices=False)
    of_a, of_b = DIRECTIONS[direction](r, key)
    a, b = u[:, of_a], s[of_b, None] * vt[of_b]
    if scaling == "stable":
        return a, b * (w.shape[1] ** 0.25 / stable_gamma**0.5)
    if scaling == "weight_svd":
        largest, own = jnp.linalg.svd(w, compute_uv=False)[0], s[of_b][0]
        return a, b * jnp.where(own > 0, largest / own, 1.0)
    return (a / scale, b / scale) if scaling == "gd_scale" else (a, b)


def mean_gradients(
    loss: Callable[..., Float[Array, ""]], params: Any, batches: Iterable[Any], wanted: set[str]
) -> dict[str, Array]:
    """Return the mean over batches of ``∂loss(params, *batch)/∂W`` for the wanted paths."""
    leaves = {path: leaf for path, leaf in paths.flatten(params).items() if path in wanted}

    @jax.jit
    def one(leaves: Any, rest: Any, batch: Any) -> Any:
        return jax.grad(lambda own: loss(paths.replace(rest, own), *batch))(leaves)

    total, count = jax.tree.map(jnp.zeros_like, leaves), 0
    for batch in batches:
        total, count = jax.tree.map(jnp.add, total, one(leaves, params, tuple(batch))), count + 1
    return jax.tree.map(lambda leaf: leaf / count, total)
