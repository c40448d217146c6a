"""A and B from the weight alone: PiSSA, OLoRA and MiCA, each a function of one matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

Matrix = Float[Array, "in_ out"]
Pair = tuple[Float[Array, "in_ r"], Float[Array, "r out"]]
Scale = int | float


def pissa(w: Matrix, r: int, scale: Scale) -> Pair:
    """Return the r largest singular directions of W: ``A = U_r√(S_r/s)``, ``B = √(S_r/s)V_rᵀ``.

    Source: PiSSA, arXiv 2404.02948; PEFT 0.21.2 ``init_lora_weights="pissa"``.

    >>> a, b = pissa(jnp.diag(jnp.array([3.0, 2.0, 1.0])), 1, 0.5)
    >>> bool(abs(0.5 * a @ b - jnp.diag(jnp.array([3.0, 0, 0]))).max() < 1e-6)
    True
    """
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return halves(u, s, vt, r, scale)


def pissa_niter(w: Matrix, r: int, scale: Scale, key: Key[Array, ""], niter: int) -> Pair:
    """Return ``pissa`` from a randomised SVD: ``niter`` rounds of subspace iteration.

    Every round multiplies what lies outside the r largest directions by ``(S_{r+1}/S_r)²``.

    Source: Halko et al., arXiv 0909.4061, algorithms 4.4 and 5.1; PEFT 0.21.2 ``"pissa_niter_N"``.

    >>> a, b = pissa_niter(jnp.diag(jnp.array([3.0, 1.0, 1.0])), 1, 1.0, jax.random.key(0), 8)
    >>> bool(abs(a @ b - jnp.diag(jnp.array([3.0, 0, 0]))).max() < 1e-5)
    True
    """
    q = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], r), w.dtype))[0]
    q = lax.fori_loop(0, niter, lambda _, q: jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0], q)
    u, s, vt = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return halves(q @ u, s, vt, r, scale)


def olora(w: Matrix, r: int, scale: Scale) -> Pair:
    """Return ``B = Q_rᵀ`` and ``A = R_rᵀ`` of ``Wᵀ = Q·R``: rows of B are orthonormal.

    ``s·A·B`` is taken out of the base as it is, whatever the scale.

    Source: OLoRA, arXiv 2406.01775; PEFT 0.21.2 ``init_lora_weights="olora"``.

    >>> a, b = olora(jnp.arange(12.0).reshape(4, 3) + jnp.eye(4, 3), 2, 1.0)
    >>> a.shape, bool(abs(b @ b.T - jnp.eye(2)).max() < 1e-6)
    ((4, 2), True)
    """
    q, upper = jnp.linalg.qr(w.T)
    return upper[:r].T, q[:, :r].T


def mica(w: Matrix, r: int, scale: Scale) -> Pair:
    """Return ``A = 0`` and B, the r smallest singular directions of W's outputs.

    MiCA trains A alone: ``lora_jax.optim.optimizers.freeze(optimizer, "b")``. The base stays.

    Source: MiCA, arXiv 2604.01694; PEFT 0.21.2 ``init_lora_weights="mica"``.

    >>> a, b = mica(jnp.diag(jnp.array([3.0, 2.0, 1.0])), 1, 1.0)
    >>> a.tolist(), abs(b).tolist()
    ([[0.0], [0.0], [0.0]], [[0.0, 0.0, 1.0]])
    """
    vt = jnp.linalg.svd(w, full_matrices=False)[2]
    return jnp.zeros((w.shape[0], r), w.dtype), vt[-r:]


def halves(
    u: Float[Array, "in_ k"], s: Float[Array, "k"], vt: Float[Array, "k out"], r: int, scale: Scale
) -> Pair:
    """Return ``A = U_r√(S_r/s)`` and ``B = √(S_r/s)V_rᵀ``, so that ``s·A·B = U_r·S_r·V_rᵀ``."""
    root = jnp.sqrt(s[:r] / scale)
    return u[:, :r] * root, root[:, None] * vt[:r]
