"""Initial A and B, by PEFT's names; every one takes the fan-in as a number, never from a layout.

Two conventions of ``kaiming_uniform_(a=sqrt(5))`` are in use, and both are named here: PEFT
draws on ``(r, in)``, so the bound is ``1/sqrt(in)``; the reference layer draws on ``(in, r)``,
so its bound is ``1/sqrt(r)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Pair = tuple[Float[Array, "stacked in_ r"], Float[Array, "stacked r out"]]
Initializer = Callable[[Key[Array, ""], int, int, int, int], Pair]


def kaiming_uniform(key: Key[Array, ""], stacked: int, fan_in: int, r: int, out: int) -> Pair:
    """Return ``A ~ U(±1/sqrt(in))`` and ``B = 0``: PEFT's ``init_lora_weights=True``.

    >>> a, b = kaiming_uniform(jax.random.key(0), 1, 100, 4, 7)
    >>> a.shape, bool(abs(a).max() <= 0.1), bool((b == 0).all())
    ((1, 100, 4), True, True)
    """
    return _uniform(key, (stacked, fan_in, r), fan_in), jnp.zeros((stacked, r, out))


def kaiming_uniform_rank(key: Key[Array, ""], stacked: int, fan_in: int, r: int, out: int) -> Pair:
    """Return ``A ~ U(±1/sqrt(r))`` and ``B = 0``: the reference layer's ``(in, r)`` convention."""
    return _uniform(key, (stacked, fan_in, r), r), jnp.zeros((stacked, r, out))


def gaussian(key: Key[Array, ""], stacked: int, fan_in: int, r: int, out: int) -> Pair:
    """Return ``A ~ N(0, 1/r²)`` and ``B = 0``: PEFT's ``"gaussian"``."""
    return jax.random.normal(key, (stacked, fan_in, r)) / r, jnp.zeros((stacked, r, out))


def both_random(key: Key[Array, ""], stacked: int, fan_in: int, r: int, out: int) -> Pair:
    """Return A and B as two fresh ``nn.Linear`` layers have them: PEFT's ``False``."""
    for_a, for_b = jax.random.split(key)
    return _uniform(for_a, (stacked, fan_in, r), fan_in), _uniform(for_b, (stacked, r, out), r)


def orthogonal(key: Key[Array, ""], stacked: int, fan_in: int, r: int, out: int) -> Pair:
    """Return random A and B with ``A · B = 0``: PEFT's ``"orthogonal"``, for an even r.

    The rows of one random orthogonal matrix are dealt out in turn, so that the column space
    of B's left factor is orthogonal to the row space of A's right factor.

    Raises:
        ValueError: r is odd.
    """
    if r % 2:
        raise ValueError(f"init_lora_weights='orthogonal' wants an even r, got {r}")
    for_q, for_a, for_b = jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(for_q, (stacked, r, r)))[0]
    left = jax.random.normal(for_a, (stacked, fan_in, r // 2))
    right = jax.random.normal(for_b, (stacked, r // 2, out))
    return left @ q[:, 0::2] / 10, q[:, 1::2].swapaxes(1, 2) @ right / 10


INITIALIZERS: dict[bool | str, Initializer] = {
    True: kaiming_uniform,
    False: both_random,
    "kaiming_uniform": kaiming_uniform,
    "kaiming_uniform_rank": kaiming_uniform_rank,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
}


def _uniform(key: Key[Array, ""], shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
