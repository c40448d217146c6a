"""A decoder in plain JAX, as an author would write it, and the same with LoRA written by hand.

RMSNorm, attention with rotary positions, SwiGLU. The layers are a list, and unrolled, or one
dictionary whose weights have them as their first axis, and then a ``lax.scan``. ``project`` is the
one place where a weight meets the data, so a hand-written LoRA is another ``project``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import Adapter, LoraConfig
from lora_jax.core.xla.bf16_slices import checkpoint_name
from lora_jax.optim.losses import linear_cross_entropy

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

# What the gradients need and cannot have for a few additions, by `jax.checkpoint`'s name.
KEPT = "kept"

Params = Mapping[str, Any]
Project = Callable[[str, jax.Array], jax.Array]
Place = Callable[[Any], Any]


@dataclass(frozen=True)
class Layout:
    """Where values lie while they are computed with; as they are, unless told.

    Args:
        weight: lays out a weight before it is used, such as gathered whole on every device.
        rows: lays out activations, whose first axis are the sequences.
    """

    weight: Place = lambda x: x
    rows: Place = lambda x: x


AS_IT_IS = Layout()


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder; ``rows`` sequences of ``tokens`` tokens enter it.

    Args:
        layers: how many.
        width: of the residual stream.
        hidden: width inside the SwiGLU.
        heads: of the queries.
        vocabulary: how many tokens there are.
        rows: sequences.
        tokens: of a sequence.
        kv_heads: of keys and values, each shared by a run of query heads; as many as those when
            None.
        theta: the base of the rotary wavelengths.
        eps: beside the mean of squares in the norms.
        tied: the embedding is the head, too.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    vocabulary: int
    rows: int
    tokens: int
    kv_heads: int | None = None
    theta: float = 10_000.0
    eps: float = 1e-6
    tied: bool = False

    @property
    def head(self) -> int:
        """The size of one head."""
        return self.width // self.heads

    @property
    def groups(self) -> int:
        """How many heads keys and values have."""
        return self.kv_heads or self.heads


def linears(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Return what the seven linears of a layer take in and give out."""
    d, h, kv = sizes.width, sizes.hidden, sizes.groups * sizes.head
    attention = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d)}
    return {**attention, "gate": (d, h), "up": (d, h), "down": (h, d)}


def shapes(sizes: Sizes, dtype: Any = jnp.float32, *, stacked: bool = False) -> dict[str, Any]:
    """Return the parameters' shapes, the layers as a list, or as the first axis of each weight."""

    def matrix(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    d, n = sizes.width, (sizes.layers,) * stacked
    layer = {"norm1": matrix(*n, d), "norm2": matrix(*n, d)}
    layer |= {name: matrix(*n, *shape) for name, shape in linears(sizes).items()}
    head = {} if sizes.tied else {"head": matrix(d, sizes.vocabulary)}
    return {
        "embedding": matrix(sizes.vocabulary, d),
        "layers": layer if stacked else [dict(layer) for _ in range(sizes.layers)],
        "norm": matrix(d),
        **head,
    }


def draw(tree: Any, seed: int) -> Any:
    """Return a tree of random float32 arrays of these shapes; nothing of it is zero."""
    rng = np.random.default_rng(seed)

    def one(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0]), jnp.float32)

    return jax.tree.map(one, tree)


def tokens(sizes: Sizes) -> jax.ShapeDtypeStruct:
    """Return the shape of the input."""
    return jax.ShapeDtypeStruct((sizes.rows, sizes.tokens), jnp.int32)


def config(r: int) -> LoraConfig:
    """Return the configuration that adapts the seven linears of every layer."""
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS)


def decoder(sizes: Sizes) -> Callable[[Params, jax.Array], jax.Array]:
    """Return ``fn(params, ids)``, the logits."""

    def forward(params: Params, ids: jax.Array) -> jax.Array:
        return states(sizes, params, ids) @ head(params)

    return forward


def plain(x: jax.Array, adapter: Adapter) -> jax.Array:
    """Return ``s·(x·A)·B``, as the formula has it."""
    scale: Any = adapter.scale
    return (x @ adapter.a * scale) @ adapter.b


def has_many(rows: int, r: int) -> bool:
    """Tell whether a product has so many rows that ``arranged`` transposes A for it."""
    return rows >= 8 * r


def arranged(x: jax.Array, adapter: Adapter) -> jax.Array:
    """Return the same, written by a hand that knows what XLA makes of the gradients on a CPU."""
    scale: Any = adapter.scale
    rows = x.reshape(-1, x.shape[-1])
    if has_many(rows.shape[0], adapter.a.shape[-1]):
        a = jax.lax.optimization_barrier(adapter.a.T)
        hidden = jax.lax.dot_general(rows, a, (((1,), (1,)), ((), ())))
    else:
        hidden = rows @ adapter.a
    return (hidden * scale @ adapter.b).reshape(*x.shape[:-1], -1)


def by_hand(
    sizes: Sizes, low_rank: Callable[[jax.Array, Adapter], jax.Array] = arranged
) -> Callable[[Params, Mapping[str, Adapter], jax.Array], jax.Array]:
    """Return ``fn(params, adapters, ids)`` with ``low_rank`` written beside every linear."""

    def forward(params: Params, adapters: Mapping[str, Adapter], ids: jax.Array) -> jax.Array:
        def project(n: int, name: str, x: jax.Array) -> jax.Array:
            return x @ params["layers"][n][name] + low_rank(x, adapters[f"layers.{n}.{name}"])

        x = params["embedding"][ids]
        for n, layer in enumerate(params["layers"]):
            x = _layer(sizes, layer, functools.partial(project, n), x)
        return _norm(x, params["norm"], sizes.eps) @ head(params)

    return forward


def states(
    sizes: Sizes,
    params: Params,
    ids: jax.Array,
    *,
    remat: Sequence[str] | None = None,
    layout: Layout = AS_IT_IS,
) -> jax.Array:
    """Return what the head multiplies, ``(rows, tokens, width)``: unrolled, or by a scan.

    Args:
        sizes: of the decoder.
        params: its weights.
        ids: ``(rows, tokens)``.
        remat: the names of what is kept for the gradients, while the rest of a layer is computed
            again: ``(KEPT,)`` is what the linears give. All is kept when None.
        layout: of a layer's weights, and of what a layer gives.
    """

    def one(x: jax.Array, layer: Params) -> jax.Array:
        layer = {name: layout.weight(weight) for name, weight in layer.items()}
        return layout.rows(_layer(sizes, layer, lambda name, x: x @ layer[name], x))

    x, layers = layout.rows(params["embedding"][ids]), params["layers"]
    scanned = isinstance(layers, Mapping)
    if remat is not None:
        kept = jax.checkpoint_policies.save_only_these_names(*remat)
        one = jax.checkpoint(one, policy=kept, prevent_cse=not scanned)
    if scanned:
        x, _ = jax.lax.scan(lambda x, layer: (one(x, layer), None), x, layers)
    else:
        for layer in layers:
            x = one(x, layer)
    return _norm(x, params["norm"], sizes.eps)


def head(params: Params) -> jax.Array:
    """Return the head, ``(width, vocabulary)``; the embedding where it is tied."""
    return params["head"] if "head" in params else params["embedding"].T


def loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the cross-entropy of each token's successor."""
    return cross_entropy(logits[:, :-1], ids[:, 1:])


def loss_by_parts(states: jax.Array, params: Params, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy of logits that exist for a part of the vocabulary at a time."""
    tied = "head" not in params
    return linear_cross_entropy(
        states, params["embedding" if tied else "head"], labels, transposed=tied
    )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean of ``-log softmax(logits)[label]``."""
    chosen = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(chosen, labels[..., None], axis=-1))


def _layer(sizes: Sizes, layer: Params, project: Project, x: jax.Array) -> jax.Array:
    attended = _attention(sizes, project, _norm(x, layer["norm1"], sizes.eps))
    x = x + checkpoint_name(attended, KEPT)
    h = _norm(x, layer["norm2"], sizes.eps)
    gate, up = (checkpoint_name(project(name, h), KEPT) for name in ("gate", "up"))
    return x + project("down", jax.nn.silu(gate) * up)


def _attention(sizes: Sizes, project: Project, x: jax.Array) -> jax.Array:
    """Query head h reads the keys and values of head ``h // (heads / kv_heads)``."""
    rows, tokens, _ = x.shape

    def heads(name: str, count: int) -> jax.Array:
        return project(name, x).reshape(rows, tokens, count, sizes.head).swapaxes(1, 2)

    q = _rotate(heads("q", sizes.heads), sizes.theta)
    k, v = _rotate(heads("k", sizes.groups), sizes.theta), heads("v", sizes.groups)
    q, k, v = (checkpoint_name(each, KEPT) for each in (q, k, v))
    # The queries of all heads of a group are rows of one product.
    grouped = q.reshape(rows, sizes.groups, -1, sizes.head)
    scores = jnp.einsum(
        "bgqk,bgsk->bgqs", grouped, k, preferred_element_type=jnp.float32
    ) / math.sqrt(sizes.head)
    seen = jnp.tril(jnp.ones((tokens, tokens), bool))
    masked = jnp.where(seen, scores.reshape(rows, sizes.heads, tokens, tokens), -1e30)
    weights = jax.nn.softmax(masked).astype(x.dtype).reshape(scores.shape)
    y = jnp.einsum("bgqs,bgsk->bgqk", weights, v).reshape(q.shape)
    return project("o", y.swapaxes(1, 2).reshape(x.shape))


def _rotate(x: jax.Array, theta: float) -> jax.Array:
    """Turn pairs of a half's distance; the angles are in float32, x ``(…, tokens, head)``."""
    half = x.shape[-1] // 2
    speed = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[-2], dtype=jnp.float32)[:, None] * speed
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    one, two = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def _norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Normalise in float32, and scale in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale
