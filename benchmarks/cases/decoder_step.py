"""One gradient step of a decoder's adapters: the rewriter against LoRA written by hand.

Same weights, adapters and tokens, in float32; B is random. The program of the hand that arranges
the products as the rewriter does should be the same, so its ratio should be 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax

from lora_jax import lora, plan

from ..case import Case, Contestant, Work
from ..contestants.common import jax_settings
from . import decoder
from .decoder import Sizes

SIZES = Sizes(layers=4, width=256, hidden=768, heads=4, vocabulary=512, rows=1, tokens=128)
R = 16
BATCHES = 4
LEARNING_RATE = 0.1

Adapted = Callable[[Any, Any, jax.Array], jax.Array]


def rewritten(sizes: Sizes) -> Adapted:
    """Return ``lora`` of the plain decoder."""
    return lora(decoder.decoder(sizes))


def plain_hand(sizes: Sizes) -> Adapted:
    """Return the decoder with LoRA written as its formula has it."""
    return decoder.by_hand(sizes, decoder.plain)


def gradient_step(fn: Adapted) -> Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]:
    """Return the compiled step: the loss, and the adapters after one step of plain descent."""

    @jax.jit
    def step(adapters: Any, params: Any, ids: jax.Array) -> tuple[jax.Array, Any]:
        def loss(adapters: Any) -> jax.Array:
            return decoder.loss(fn(params, adapters, ids), ids)

        value, gradients = jax.value_and_grad(loss)(adapters)
        return value, jax.tree.map(lambda a, g: a - LEARNING_RATE * g, adapters, gradients)

    return step


def arguments(sizes: Sizes, r: int = R) -> tuple[Any, Any, list[jax.Array]]:
    """Return random adapters, parameters and batches."""
    params = decoder.draw(decoder.shapes(sizes), seed=0)
    found = plan(decoder.decoder(sizes), params, decoder.config(r), decoder.tokens(sizes))
    adapters = decoder.draw(found.abstract(), seed=1)
    shape = (sizes.rows, sizes.tokens)
    keys = jax.random.split(jax.random.key(0), BATCHES)
    ids = [jax.random.randint(key, shape, 0, sizes.vocabulary) for key in keys]
    return adapters, params, ids


def contestant(make: Callable[[Sizes], Adapted], sizes: Sizes, r: int = R) -> Work:
    """Return the step for ``make(sizes)``; the adapters move from call to call."""
    adapters, params, ids = arguments(sizes, r)
    train, batches = gradient_step(make(sizes)), itertools.cycle(ids)

    def step() -> float:
        nonlocal adapters
        loss, adapters = jax.block_until_ready(train(adapters, params, next(batches)))
        return float(loss)

    return Work(step)


def case(sizes: Sizes = SIZES, r: int = R) -> Case:
    """Return the case for a decoder of these sizes and adapters of this rank."""
    return Case(
        name="decoder_step",
        title=(
            f"one gradient step of a decoder, {sizes.layers} layers of width {sizes.width}, "
            f"{sizes.rows * sizes.tokens} tokens, LoRA r={r} on its seven linears, float32"
        ),
        contestants=(
            Contestant(
                "lora_jax", lambda: contestant(rewritten, sizes, r), ("jax", "jaxlib"), jax_settings
            ),
            Contestant("by hand", lambda: contestant(decoder.by_hand, sizes, r)),
            Contestant("by hand, plain", lambda: contestant(plain_hand, sizes, r)),
        ),
        # Rounding in another order.
        tolerance=1e-5,
        sizes={"layers": sizes.layers, "width": sizes.width, "rank": r},
        group="decoder_step",
        rounds=60,
    )


def cases() -> tuple[Case, ...]:
    """Return the case."""
    return (case(),)
