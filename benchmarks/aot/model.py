"""The models that are compiled ahead of time: the decoder of ``cases.decoder`` in their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..cases import decoder
from ..cases.decoder import AS_IT_IS, Layout, Params, Sizes


def _sizes(layers: int, width: int, hidden: int, heads: int, kv_heads: int, **more: Any) -> Sizes:
    """Return the sizes of a model; how many tokens enter it is the step's business."""
    return Sizes(
        layers, width, hidden, heads, rows=1, tokens=1, kv_heads=kv_heads, eps=1e-5, **more
    )


MODELS: Mapping[str, Sizes] = {
    "tiny": _sizes(3, 64, 128, 4, 2, vocabulary=256, tied=True),
    "smollm2": _sizes(30, 576, 1536, 9, 3, vocabulary=49_152, theta=100_000.0, tied=True),
    "llama-8b": _sizes(32, 4096, 14_336, 32, 8, vocabulary=128_256, theta=500_000.0),
}


def shapes(sizes: Sizes, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Return the parameters' shapes, layers stacked."""
    return decoder.shapes(sizes, dtype, stacked=True)


def loss(sizes: Sizes, layout: Layout = AS_IT_IS) -> Callable[[Params, jax.Array], jax.Array]:
    """Return ``fn(params, ids)``, the mean loss of each token's successor.

    Gradients compute each layer again, and logits exist for a part of the vocabulary at a time.
    """

    def fn(params: Params, ids: jax.Array) -> jax.Array:
        whole = {
            name: layout.weight(params[name]) for name in ("embedding", "head") if name in params
        }
        params = {**params, **whole}
        states = decoder.states(sizes, params, ids, remat=(), layout=layout)
        return decoder.loss_by_parts(states[:, :-1], params, ids[:, 1:])

    return fn
