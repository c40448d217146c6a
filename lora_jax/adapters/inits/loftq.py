"""LoftQ: a quantised base, and A and B that make up for what quantising lost."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from .weights import Matrix, Scale, pissa

NF4_BLOCK = 64

# The quantiles of N(0, 1) that NormalFloat takes, scaled to [-1, 1]: QLoRA, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def loftq(
    w: Matrix, r: int, scale: Scale, *, bits: int = 4, iterations: int = 1
) -> tuple[Float[Array, "in_ r"], Float[Array, "r out"], Matrix]:
    """Return ``(A, B, Q)`` with ``Q + s·A·B ≈ W``, Q on the grid of ``quantised``.

    ``Q = quantised(W - s·A·B)``, then ``s·A·B`` is the best rank r of ``W - Q``; ``iterations``
    times, from ``A·B = 0``. PEFT leaves s out of its A and B, which is right for s = 1 alone.

    Source: LoftQ, arXiv 2310.08659, algorithm 1; PEFT 0.21.2 ``init_lora_weights="loftq"``.

    >>> w = jnp.outer(jnp.arange(1.0, 9), jnp.array([1.0, 0.3]))
    >>> a, b, q = loftq(w, 1, 2.0)
    >>> bool(abs(q + 2 * a @ b - w).max() < abs(q - w).max())
    True
    """
    rest, pair = w, (jnp.zeros((w.shape[0], r)), jnp.zeros((r, w.shape[1])))
    q = w
    for _ in range(iterations):
        q = quantised(rest, bits)
        pair = pissa(w - q, r, scale)
        rest = w - scale * (pair[0] @ pair[1])
    return *pair, q


def quantised(w: Matrix, bits: int) -> Matrix:
    """Return W rounded to NF4 (``bits=4``) or int8 (``bits=8``), as numbers of W's dtype.

    NF4 scales every 64 numbers of PyTorch's ``(out, in)`` order by their largest magnitude,
    int8 those of one output: as bitsandbytes does, which rounds to float16 before int8.

    >>> quantised(jnp.array([[1.0], [0.24], [-0.5]]), 4).T.tolist()[0]
    [1.0, 0.24611230194568634, -0.5250730514526367]
    """
    return GRIDS[bits](w)


def _nf4(w: Matrix) -> Matrix:
    flat = w.T.reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % NF4_BLOCK)).reshape(-1, NF4_BLOCK)
    largest = abs(blocks).max(axis=1, keepdims=True)
    grid = jnp.asarray(NF4, w.dtype)
    middles = (grid[1:] + grid[:-1]) / 2
    places = jnp.searchsorted(middles, blocks / jnp.where(largest > 0, largest, 1))
    values = grid[places] * largest
    return values.reshape(-1)[: flat.size].reshape(w.T.shape).T


def _int8(w: Matrix) -> Float[Array, "in_ out"]:
    largest = abs(w).max(axis=0, keepdims=True)
    step = jnp.where(largest > 0, largest, 1) / 127
    return jnp.round(w / step) * step


# PEFT 0.21.2 has these two; it left 2 bits out with its own NormalFloat.
GRIDS: dict[int, Callable[[Matrix], Matrix]] = {4: _nf4, 8: _int8}
