"""Initial A and B, by PEFT's names; every one takes the fan-in as a number, never from a layout.

Two conventions of ``kaiming_uniform_(a=sqrt(5))`` are in use, and both are named here: PEFT
draws on ``(r, in)``, so the bound is ``1/sqrt(in)``; the reference layer draws on ``(in, r)``,
so its bound is ``1/sqrt(r)``.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from .adapter import IN, OUT, STACKED, a_shape, b_shape, pick
from .torch_rng import TorchGenerator

Pair = tuple[Float[Array, "stacked in_ r"], Float[Array, "stacked r out"]]
Initializer = Callable[[Key[Array, ""], int, int, int, int], Pair]


def kaiming_uniform(key: Key[Array, ""], stacked: int, fan_in: int, r: int, out: int) -> Pair:
    """Return ``A ~ U(±1/sqrt(in))`` and ``B = 0``: PEFT's ``init_lora_weights=True``.

    >>> a, b = kaiming_uniform(jax.random.key(0), 1, 100, 4, 7)
    >>> a.shape, bool(abs(a).max() <= 0.1), bool((b == 0).all())
    ((1, 100, 4), True, True)
    """
    return _uniform(key, (stacked, fan_in, r), fan_in), jnp.zeros((stacked, r, out), jnp.float32)


def kaiming_uniform_rank(key: Key[Array, ""], stacked: int, fan_in: int, r: int, out: int) -> Pair:
    """Return ``A ~ U(±1/sqrt(r))`` and ``B = 0``: the reference layer's ``(in, r)`` convention."""
    return _uniform(key, (stacked, fan_in, r), r), jnp.zeros((stacked, r, out), jnp.float32)


def torch_kaiming_uniform(key: Key[Array, ""], stacked: int, fan_in: int, r: int, out: int) -> Pair:
    """Return PyTorch's own ``kaiming_uniform_(A, a=sqrt(5))`` on ``(r, in)``, and ``B = 0``.

    Bit for bit what PyTorch draws after ``manual_seed(seed)``, with the lowest 32 bits of the key
    for the seed; matrices that are stacked come one after the other. numpy draws them on the
    host. For the adapters of a whole model see ``lora_jax.parity.suite.torch_random``.

    >>> a, b = torch_kaiming_uniform(jax.random.key(0), 1, 100, 4, 7)
    >>> bool((a[0].T == TorchGenerator(0).kaiming_uniform((4, 100))).all())
    True
    """

    def drawn(words: Array | np.ndarray) -> np.ndarray:
        generator = TorchGenerator(int(np.asarray(words)[-1]))
        each = [generator.kaiming_uniform((r, fan_in)).T for _ in range(stacked)]
        return np.stack(each)

    shape = jax.ShapeDtypeStruct((stacked, fan_in, r), jnp.float32)
    words = jax.random.key_data(key).reshape(-1)
    a = jax.pure_callback(drawn, shape, words, vmap_method="sequential")
    return a, jnp.zeros((stacked, r, out), jnp.float32)


def gaussian(key: Key[Array, ""], stacked: int, fan_in: int, r: int, out: int) -> Pair:
    """Return ``A ~ N(0, 1/r²)`` and ``B = 0``: PEFT's ``"gaussian"``."""
    return jax.random.normal(key, (stacked, fan_in, r), jnp.float32) / r, jnp.zeros(
        (stacked, r, out), jnp.float32
    )


def both_random(key: Key[Array, ""], stacked: int, fan_in: int, r: int, out: int) -> Pair:
    """Return A and B as two fresh ``nn.Linear`` layers have them: PEFT's ``False``."""
    for_a, for_b = jax.random.split(key)
    return _uniform(for_a, (stacked, fan_in, r), fan_in), _uniform(for_b, (stacked, r, out), r)


def orthogonal(key: Key[Array, ""], stacked: int, fan_in: int, r: int, out: int) -> Pair:
    """Return random A and B with ``A · B = 0``: PEFT's ``"orthogonal"``, for an even r.

    The rows of one random orthogonal matrix are dealt out in turn, so that the column space
    of B's left factor is orthogonal to the row space of A's right factor.
    """
    for_q, for_a, for_b = jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(for_q, (stacked, r, r), jnp.float32))[0]
    left = jax.random.normal(for_a, (stacked, fan_in, r // 2), jnp.float32)
    right = jax.random.normal(for_b, (stacked, r // 2, out), jnp.float32)
    return left @ q[:, 0::2] / 10, q[:, 1::2].swapaxes(1, 2) @ right / 10


def embedding(key: Key[Array, ""], stacked: int, fan_in: int, r: int, out: int) -> Pair:
    """Return ``A = 0`` and ``B ~ N(0, 1)``: what PEFT gives a weight whose rows are looked up."""
    b = jax.random.normal(key, (stacked, r, out), jnp.float32)
    return jnp.zeros((stacked, fan_in, r), jnp.float32), b


def embedding_both(key: Key[Array, ""], stacked: int, fan_in: int, r: int, out: int) -> Pair:
    """Return A and B from ``N(0, 1)``: PEFT's ``False`` for a weight whose rows are looked up."""
    for_a, for_b = jax.random.split(key)
    a = jax.random.normal(for_a, (stacked, fan_in, r), jnp.float32)
    return a, jax.random.normal(for_b, (stacked, r, out), jnp.float32)


INITIALIZERS: dict[bool | str, Initializer] = {
    True: kaiming_uniform,
    False: both_random,
    "kaiming_uniform": kaiming_uniform,
    "kaiming_uniform_rank": kaiming_uniform_rank,
    "torch": torch_kaiming_uniform,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "embedding": embedding,
    "embedding_both": embedding_both,
}


# What reads the weight, the data or the gradient is not drawn: `lora_jax.initialise`.
_CHANGE_BASE = ("olora", "pissa", "corda", "lora_ga", "loftq")
_KEEP_BASE = ("mica", "eva")
_NITER = re.compile(r"pissa_niter_([1-9]\d*)")


def changes_base(init: bool | str) -> bool:
    """Tell whether an ``init_lora_weights`` takes something out of the base weight.

    >>> changes_base("pissa_niter_4"), changes_base("mica")
    (True, False)
    """
    return init in _CHANGE_BASE or niter(init) is not None


def reads_more(init: bool | str) -> bool:
    """Tell whether an ``init_lora_weights`` reads more than the weight's shape."""
    return changes_base(init) or init in _KEEP_BASE


def niter(init: bool | str) -> int | None:
    """Return N of ``"pissa_niter_N"``, None for others."""
    found = _NITER.fullmatch(init) if isinstance(init, str) else None
    return int(found[1]) if found else None


def for_lookup(init: bool | str) -> str:
    """Return the initialiser of a weight whose rows are looked up, whatever the others get."""
    return "embedding_both" if init is False else "embedding"


def draw(
    key: Key[Array, ""],
    init: bool | str,
    shape: Sequence[int],
    axes: str,
    r: int,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "*stacked_in r"], Float[Array, "*stacked_r_out"]]:
    """Return fresh A and B for a weight; they are drawn in float32 and cast.

    Args:
        key: the random key.
        init: a name in ``INITIALIZERS``.
        shape: of the weight.
        axes: one letter for each axis of the weight, see ``lora_jax.core.adapter``.
        r: the rank.
        dtype: of A and B.

    >>> a, b = draw(jax.random.key(0), True, (3, 4, 5), "sio", r=2)
    >>> a.shape, b.shape, bool((b == 0).all())
    ((3, 4, 2), (3, 2, 5), True)
    """
    shape = tuple(shape)
    stacked, fan_in, out = (math.prod(pick(shape, axes, letter)) for letter in (STACKED, IN, OUT))
    a, b = INITIALIZERS[init](key, stacked, fan_in, r, out)
    a, b = a.reshape(a_shape(shape, axes, r)), b.reshape(b_shape(shape, axes, r))
    return a.astype(dtype), b.astype(dtype)


def draw_bias(
    key: Key[Array, ""],
    init: bool | str,
    shape: Sequence[int],
    r: int,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*stacked_out"]:
    """Return a fresh bias beside B: 0, or ``U(±1/sqrt(r))`` where B is a fresh ``nn.Linear``'s.

    Args:
        key: the random key of A and B.
        init: True, False, or a name of what starts at ``B = 0``.
        shape: ``(*stacked, *out)``.
        r: the rank, B's fan-in.
        dtype: of the bias.

    Source: PEFT 0.21.2, whose B is an ``nn.Linear(r, out, bias=lora_bias)``.

    >>> draw_bias(jax.random.key(0), True, (3,), r=4).tolist()
    [0.0, 0.0, 0.0]
    >>> bool(abs(draw_bias(jax.random.key(0), False, (300,), r=4)).max() <= 0.5)
    True
    """
    if init is not False:
        return jnp.zeros(shape, dtype)
    return _uniform(fold_in_path(key, "bias"), tuple(shape), r).astype(dtype)


def init_problems(init: bool | str, r: int, *, drawn: bool = True) -> list[str]:
    """Return what is wrong with an ``init_lora_weights`` for this rank.

    Args:
        init: the name.
        r: the rank.
        drawn: whether only those serve that are drawn, as in a layer of its own.

    >>> init_problems("orthogonal", 3)
    ["r: got 3, init_lora_weights='orthogonal' wants an even one"]
    """
    if reads_more(init) and not drawn:
        return []
    if init not in INITIALIZERS:
        more = () if drawn else (*_CHANGE_BASE, "pissa_niter_N", *_KEEP_BASE)
        wanted = ", ".join(map(repr, (*INITIALIZERS, *more)))
        return [f"init_lora_weights: got {init!r}, wanted one of {wanted}"]
    if init == "orthogonal" and r % 2:
        return [f"r: got {r}, init_lora_weights='orthogonal' wants an even one"]
    return []


def kind_problem(init: bool | str, looked_up: bool, window: bool) -> str | None:
    """Return why an ``init_lora_weights`` cannot be made for a weight of this kind.

    PEFT has ``"mica"`` for embeddings; for the others it falls back to its default or fails.

    >>> kind_problem("pissa", True, False)
    "'pissa' wants the weight of a product, but its rows are looked up; ..."
    >>> kind_problem("mica", True, False)
    """
    if not reads_more(init) or not (window or (looked_up and init != "mica")):
        return None
    kind = "its rows are looked up" if looked_up else "it is a convolution's kernel"
    return (
        f"{init!r} wants the weight of a product, but {kind}; leave it out, or, to load a file "
        "that is finished, plan with init_lora_weights=True"
    )


def fold_in_path(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """Return the key of one parameter, which no other parameter's presence changes."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _uniform(key: Key[Array, ""], shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, minval=-bound, maxval=bound)
