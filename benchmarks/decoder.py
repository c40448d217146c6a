"""A decoder in plain JAX, as an author would write it, and the same with LoRA written by hand.

RMSNorm, attention with rotary positions, SwiGLU; the layers are unrolled. ``project`` is the one
place where a weight meets the data, so a hand-written LoRA is another ``project``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import Adapter, LoraConfig

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder; ``rows`` sequences of ``tokens`` tokens enter it."""

    layers: int
    width: int
    hidden: int
    heads: int
    vocabulary: int
    rows: int
    tokens: int

    @property
    def head(self) -> int:
        """The size of one head."""
        return self.width // self.heads


def shapes(sizes: Sizes) -> dict[str, Any]:
    """Return the parameters' shapes, in float32."""

    def matrix(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    d, h = sizes.width, sizes.hidden
    layer = {
        "norm1": matrix(d),
        "norm2": matrix(d),
        **{name: matrix(d, d) for name in ("q", "k", "v", "o")},
        **{"gate": matrix(d, h), "up": matrix(d, h), "down": matrix(h, d)},
    }
    return {
        "embedding": matrix(sizes.vocabulary, d),
        "layers": [dict(layer) for _ in range(sizes.layers)],
        "norm": matrix(d),
        "head": matrix(d, sizes.vocabulary),
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
        return _forward(sizes, lambda n, name, x: x @ params["layers"][n][name], params, ids)

    return forward


def by_hand(
    sizes: Sizes,
) -> Callable[[Params, Mapping[str, Adapter], jax.Array], jax.Array]:
    """Return ``fn(params, adapters, ids)`` with ``x·W + s·(x·A)·B`` written into every linear."""

    def forward(params: Params, adapters: Mapping[str, Adapter], ids: jax.Array) -> jax.Array:
        def project(n: int, name: str, x: jax.Array) -> jax.Array:
            adapter = adapters[f"layers.{n}.{name}"]
            scale: Any = adapter.scale
            return x @ params["layers"][n][name] + (x @ adapter.a * scale) @ adapter.b

        return _forward(sizes, project, params, ids)

    return forward


def loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the cross-entropy of each token's successor."""
    chosen = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(chosen, ids[:, 1:, None], axis=-1))


def _forward(
    sizes: Sizes, project: Callable[[int, str, jax.Array], jax.Array], params: Params, ids: Any
) -> jax.Array:
    x = params["embedding"][ids]
    for n, layer in enumerate(params["layers"]):
        x = x + _attention(sizes, n, project, _norm(x, layer["norm1"]))
        h = _norm(x, layer["norm2"])
        x = x + project(n, "down", jax.nn.silu(project(n, "gate", h)) * project(n, "up", h))
    return _norm(x, params["norm"]) @ params["head"]


def _attention(sizes: Sizes, n: int, project: Any, x: jax.Array) -> jax.Array:
    split = (*x.shape[:2], sizes.heads, sizes.head)
    q, k, v = (project(n, name, x).reshape(split) for name in ("q", "k", "v"))
    scores = jnp.einsum("bqhk,bshk->bhqs", _rotate(q), _rotate(k)) / np.sqrt(sizes.head)
    seen = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
    return project(n, "o", jnp.einsum("bhqs,bshk->bqhk", weights, v).reshape(x.shape))


def _rotate(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    speed = 10_000.0 ** (-jnp.arange(half, dtype=x.dtype) / half)
    angle = jnp.arange(x.shape[1], dtype=x.dtype)[:, None] * speed
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    one, two = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale
