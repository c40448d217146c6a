"""Tracing a decoder: through the rewriter, with LoRA written by hand, and without LoRA.

A step traces a new function object from shapes alone: nothing is compiled and nothing runs. Its
result counts the equations, those of the low-rank paths apart, so that contestants agree only if
the rewriter adds exactly what a hand would write.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax

from lora_jax import __version__, lora, plan

from . import decoder
from .decoder import Sizes
from .harness import Case, Contestant, Step

SIZES = Sizes(layers=30, width=576, hidden=1536, heads=9, vocabulary=1000, rows=1, tokens=128)
R = 8
ROWS = (1, 2, 3, 4)

# x·A, the scale, (x·A)·B and the sum.
ADDED = 4

Traced = Callable[..., Any]


def contestant(make: Callable[[Sizes], Traced], sizes: Sizes, *, adapted: bool) -> Step:
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
        return float(rows * (len(traced.jaxpr.eqns) - ADDED * paths))

    return step


def rewritten(sizes: Sizes) -> Traced:
    """Return ``lora`` of the plain decoder."""
    return lora(decoder.decoder(sizes))


def _settings() -> Mapping[str, str]:
    return {"lora_jax": __version__}


def case(sizes: Sizes = SIZES) -> Case:
    """Return the case for a decoder of these sizes."""
    return Case(
        name="rewrite_trace",
        title=f"tracing a decoder of {sizes.layers} layers, LoRA r={R} on its seven linears",
        contestants=(
            Contestant(
                "lora_jax", lambda: contestant(rewritten, sizes, adapted=True), ("jax",), _settings
            ),
            Contestant("by hand", lambda: contestant(decoder.by_hand, sizes, adapted=True)),
            Contestant("no LoRA", lambda: contestant(decoder.decoder, sizes, adapted=False)),
        ),
        # Counts are equal or they are not.
        tolerance=0.0,
        warm_up=len(ROWS),
    )


CASE = case()
