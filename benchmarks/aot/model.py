"""A Llama-shaped decoder in plain JAX: grouped heads, layers stacked for one scan, remat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

Params = Mapping[str, Any]
Place = Callable[[Any], Any]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder; ``tied`` takes the embedding as the output head."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    theta: float
    tied: bool = False

    @property
    def head(self) -> int:
        """The size of one head."""
        return self.width // self.heads


MODELS: Mapping[str, Sizes] = {
    "tiny": Sizes(3, 64, 128, 4, 2, 256, 10_000.0, tied=True),
    "smollm2": Sizes(30, 576, 1536, 9, 3, 49_152, 100_000.0, tied=True),
    "llama-8b": Sizes(32, 4096, 14_336, 32, 8, 128_256, 500_000.0),
}


@dataclass(frozen=True)
class Layout:
    """Where values lie while they are computed with; as they are, unless told.

    Args:
        weight: lays out a weight before it is used, such as gathered whole on every device.
        rows: lays out activations, whose first axis are the sequences.
    """

    weight: Place = lambda x: x
    rows: Place = lambda x: x


def shapes(sizes: Sizes, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Return the parameters' shapes."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    n, d, h, kv = sizes.layers, sizes.width, sizes.hidden, sizes.kv_heads * sizes.head
    layers = {
        "norm1": array(n, d),
        "norm2": array(n, d),
        **{"q": array(n, d, d), "k": array(n, d, kv), "v": array(n, d, kv), "o": array(n, d, d)},
        **{"gate": array(n, d, h), "up": array(n, d, h), "down": array(n, h, d)},
    }
    head = {} if sizes.tied else {"head": array(d, sizes.vocabulary)}
    return {"embedding": array(sizes.vocabulary, d), "layers": layers, "norm": array(d), **head}


def decoder(sizes: Sizes, layout: Layout = Layout()) -> Callable[[Params, jax.Array], jax.Array]:
    """Return ``fn(params, ids)``, the logits of ``ids`` (sequences, tokens), in float32."""

    def block(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        layer = {name: layout.weight(w) for name, w in layer.items()}
        x = x + _attention(sizes, layer, _norm(x, layer["norm1"]))
        h = _norm(x, layer["norm2"])
        x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
        return layout.rows(x), None

    def forward(params: Params, ids: jax.Array) -> jax.Array:
        embedding = layout.weight(params["embedding"])
        x, _ = jax.lax.scan(jax.checkpoint(block), layout.rows(embedding[ids]), params["layers"])
        x = _norm(x, params["norm"])
        head = embedding.T if sizes.tied else layout.weight(params["head"])
        return layout.rows(jnp.matmul(x, head, preferred_element_type=jnp.float32))

    return forward


def loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the cross-entropy of each token's successor."""
    chosen = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(chosen, ids[:, 1:, None], axis=-1))


def _attention(sizes: Sizes, layer: Params, x: jax.Array) -> jax.Array:
    rows, length, _ = x.shape
    groups = sizes.heads // sizes.kv_heads
    q = _rotate(sizes, (x @ layer["q"]).reshape(rows, length, sizes.heads, sizes.head))
    q = q.reshape(rows, length, sizes.kv_heads, groups, sizes.head)
    k = _rotate(sizes, (x @ layer["k"]).reshape(rows, length, sizes.kv_heads, sizes.head))
    v = (x @ layer["v"]).reshape(rows, length, sizes.kv_heads, sizes.head)
    scores = jnp.einsum("bqhgk,bshk->bhgqs", q, k, preferred_element_type=jnp.float32)
    seen = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores / np.float32(np.sqrt(sizes.head)), -1e30))
    mixed = jnp.einsum("bhgqs,bshk->bqhgk", weights.astype(x.dtype), v)
    return mixed.reshape(x.shape) @ layer["o"]


def _rotate(sizes: Sizes, x: jax.Array) -> jax.Array:
    half = sizes.head // 2
    speed = sizes.theta ** (-np.arange(half, dtype=np.float32) / half)
    angle = np.arange(x.shape[1], dtype=np.float32)[:, None] * speed
    cos, sin = (jnp.asarray(f(angle)[:, None], x.dtype) for f in (np.cos, np.sin))
    one, two = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return (wide * inverse).astype(x.dtype) * scale
