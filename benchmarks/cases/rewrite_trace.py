"""Tracing a decoder: through the rewriter, with LoRA written by hand, and without LoRA.

A step traces a new function object from shapes alone: nothing is compiled and nothing runs. Its
result counts the equations, those of the low-rank paths apart, so that contestants agree only if
the rewriter adds exactly what a hand would write.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from lora_jax import lora, plan

from ..case import Case, Contestant, Work
from ..contestants import jax_settings
from . import decoder
from .decoder import Sizes

SIZES = Sizes(layers=30, width=576, hidden=1536, heads=9, vocabulary=1000, rows=1, tokens=128)
R = 8
ROWS = (1, 2, 3, 4)

# The rows as one axis, x·A, the scale, (x·A)·B, the rows as they were and the sum; and with many
# rows A transposed and fixed so.
ADDED, WITH_MANY_ROWS = 6, 8

Traced = Callable[..., Any]


def contestant(make: Callable[[Sizes], Traced], sizes: Sizes, *, adapted: bool) -> Work:
    """Return the step that traces ``make(sizes)``, with as many rows as it is the turn of."""
    params = decoder.shapes(sizes)
    fn, ids = decoder.decoder(sizes), decoder.tokens(sizes)
    adapters = plan(fn, params, decoder.config(R), ids).abstract()
    turns = itertools.cycle(ROWS)
    paths = len(adapters) if adapted else 0

    def step() -> float:
        rows = next(turns)
        ids = decoder.tokens(replace(sizes, rows=rows))
        arguments = (params, adapters, ids) if adapted else (params, ids)
        traced = jax.jit(make(sizes)).trace(*arguments)
        added = WITH_MANY_ROWS if decoder.has_many(rows * sizes.tokens, R) else ADDED
        return float(rows * (len(traced.jaxpr.eqns) - added * paths))

    return Work(step)


def rewritten(sizes: Sizes) -> Traced:
    """Return ``lora`` of the plain decoder."""
    return lora(decoder.decoder(sizes))


def case(sizes: Sizes = SIZES) -> Case:
    """Return the case for a decoder of these sizes."""
    return Case(
        name="rewrite_trace",
        title=f"tracing a decoder of {sizes.layers} layers, LoRA r={R} on its seven linears",
        contestants=(
            Contestant(
                "lora_jax",
                lambda: contestant(rewritten, sizes, adapted=True),
                ("jax",),
                jax_settings,
            ),
            Contestant("by hand", lambda: contestant(decoder.by_hand, sizes, adapted=True)),
            Contestant("no LoRA", lambda: contestant(decoder.decoder, sizes, adapted=False)),
        ),
        # Counts are equal or they are not.
        tolerance=0.0,
        sizes={"layers": sizes.layers},
        group="rewrite_trace",
        warm_up=len(ROWS),
    )


def cases() -> tuple[Case, ...]:
    """Return the case."""
    return (case(),)
