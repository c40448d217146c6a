"""Tracing a decoder: through the rewriter, with LoRA written by hand, and without LoRA.

A step traces a new function object from shapes alone: nothing is compiled and nothing runs. Its
result counts the equations, those of the low-rank paths apart, so that contestants agree only if
the rewriter adds exactly what it should.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from lora_jax import lora, plan

from ..case import Case, Contestant, Work
from ..contestants.common import jax_settings
from . import decoder
from .decoder import Sizes

SIZES = Sizes(layers=30, width=576, hidden=1536, heads=9, vocabulary=1000, rows=1, tokens=128)
R = 8
ROWS = (1, 2, 3, 4)

# How many of a layer's low-rank paths share one x·A: q, k, v and gate, up.
SHARED, ALONE, NOTHING = (3, 2, 1, 1), (1,) * 7, ()

Traced = Callable[..., Any]


def contestant(make: Callable[[Sizes], Traced], sizes: Sizes, families: tuple[int, ...]) -> Work:
    """Return the step that traces ``make(sizes)``, with as many rows as it is the turn of."""
    params = decoder.shapes(sizes)
    fn, ids = decoder.decoder(sizes), decoder.tokens(sizes)
    adapters = plan(fn, params, decoder.config(R), ids).abstract()
    turns = itertools.cycle(ROWS)

    def step() -> float:
        rows = next(turns)
        ids = decoder.tokens(replace(sizes, rows=rows))
        arguments = (params, adapters, ids) if families else (params, ids)
        traced = jax.jit(make(sizes)).trace(*arguments)
        added = sum(equations(rows * sizes.tokens, size) for size in families)
        return float(rows * (len(traced.jaxpr.eqns) - added * sizes.layers))

    return Work(step)


def equations(rows: int, size: int) -> int:
    """Return how many equations a family of low-rank paths adds.

    It has the rows as one axis and x·A; with many rows A is transposed and fixed so. Several put
    their A's together, and take the product apart. Then each has the scale, (x·A)·B, the rows as
    they were and the sum.
    """
    return 2 + 2 * decoder.has_many(rows, size * R) + 2 * (size > 1) + 4 * size


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
                lambda: contestant(rewritten, sizes, SHARED),
                ("jax",),
                jax_settings,
            ),
            Contestant("by hand", lambda: contestant(decoder.by_hand, sizes, ALONE)),
            Contestant("no LoRA", lambda: contestant(decoder.decoder, sizes, NOTHING)),
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
