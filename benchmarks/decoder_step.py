"""One gradient step of a decoder's adapters: the rewriter against LoRA written by hand.

Same weights, adapters and tokens, in float32; B is random. The compiled programs should be the
same, so the ratio should be 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax import __version__, lora, plan

from . import decoder
from .decoder import Sizes
from .environment import cores
from .harness import Case, Contestant, Step

SIZES = Sizes(layers=4, width=256, hidden=768, heads=4, vocabulary=512, rows=1, tokens=128)
R = 16
BATCHES = 4
LEARNING_RATE = 0.1

Adapted = Callable[[Any, Any, jax.Array], jax.Array]


def rewritten(sizes: Sizes) -> Adapted:
    """Return ``lora`` of the plain decoder."""
    return lora(decoder.decoder(sizes))


def gradient_step(fn: Adapted) -> Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]:
    """Return the compiled step: the loss, and the adapters after one step of plain descent."""

    @jax.jit
    def step(adapters: Any, params: Any, ids: jax.Array) -> tuple[jax.Array, Any]:
        def loss(adapters: Any) -> jax.Array:
            return decoder.loss(fn(params, adapters, ids), ids)

        value, gradients = jax.value_and_grad(loss)(adapters)
        return value, jax.tree.map(lambda a, g: a - LEARNING_RATE * g, adapters, gradients)

    return step


def arguments(sizes: Sizes) -> tuple[Any, Any, list[jax.Array]]:
    """Return random adapters, parameters and batches."""
    params = decoder.draw(decoder.shapes(sizes), seed=0)
    found = plan(decoder.decoder(sizes), params, decoder.config(R), decoder.tokens(sizes))
    adapters = decoder.draw(found.abstract(), seed=1)
    shape = (sizes.rows, sizes.tokens)
    keys = jax.random.split(jax.random.key(0), BATCHES)
    ids = [jax.random.randint(key, shape, 0, sizes.vocabulary) for key in keys]
    return adapters, params, ids


def contestant(make: Callable[[Sizes], Adapted], sizes: Sizes) -> Step:
    """Return the step for ``make(sizes)``; the adapters move from call to call."""
    adapters, params, ids = arguments(sizes)
    train, batches = gradient_step(make(sizes)), itertools.cycle(ids)

    def step() -> float:
        nonlocal adapters
        loss, adapters = jax.block_until_ready(train(adapters, params, next(batches)))
        return float(loss)

    return step


def _settings() -> Mapping[str, str]:
    return {"lora_jax": __version__, "threads": str(cores())}


def case(sizes: Sizes = SIZES) -> Case:
    """Return the case for a decoder of these sizes."""
    return Case(
        name="decoder_step",
        title=(
            f"one gradient step of a decoder, {sizes.layers} layers of width {sizes.width}, "
            f"{sizes.rows * sizes.tokens} tokens, LoRA r={R} on its seven linears, float32"
        ),
        contestants=(
            Contestant(
                "lora_jax", lambda: contestant(rewritten, sizes), ("jax", "jaxlib"), _settings
            ),
            Contestant("by hand", lambda: contestant(decoder.by_hand, sizes)),
        ),
        # Rounding in another order.
        tolerance=1e-5,
        rounds=60,
    )


CASE = case()
