"""Merging the adapters of a whole stack into its weights.

Ours and the formula return a new tree; PEFT's ``merge_and_unload`` changes its model, which it
gets anew before each step, outside the clock. Every step gets another adapter in turn.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import merge
from lora_jax.core import paths

from ..case import Arrays, Case, Contestant, Needed, Work
from ..contestants.common import (
    compiled,
    jax_settings,
    on_host,
    torch_ready,
    torch_settings,
    torch_work,
)
from . import stack as model
from .stack import Pairs, Sizes

SIZES = Sizes(width=576, hidden=1536, layers=12)
R, TURNS = 16, 2


def drawn(sizes: Sizes) -> tuple[Any, list[Pairs]]:
    """Return the weights and the adapters of all turns."""
    return model.draw(sizes), [model.adapters(sizes, R, seed=1 + n) for n in range(TURNS)]


def by_formula(params: Any, adapters: Pairs) -> Any:
    """Return ``W + s·A·B`` for every path, as one would write it."""
    leaves = paths.flatten(params)

    def one(weight: jax.Array, pair: Any) -> jax.Array:
        return weight + pair.scale * (pair.a @ pair.b)

    return {path: one(leaves[path], pair) for path, pair in adapters.items()}


def jax_merging(fn: Callable[[Any, Pairs], Any], sizes: Sizes) -> Work:
    """Return the work of a program that returns the merged weights."""
    params, adapters = drawn(sizes)
    program, turns = compiled(fn, params, adapters[0]), itertools.cycle(adapters)

    def step() -> Any:
        return jax.block_until_ready(program.call(params, next(turns)))

    return program.work(step, _read)


def peft_merging(sizes: Sizes) -> Work:
    """Return the work of ``merge_and_unload``."""
    torch = torch_ready()
    params, adapters = drawn(sizes)
    weights = model.torch_weights(params)
    turns = itertools.cycle([model.peft_model(weights, [pairs]) for pairs in adapters])
    ready: list[Any] = []

    def prepare() -> None:
        ready.append(copy.deepcopy(next(turns)))

    def step() -> Any:
        with torch.no_grad():
            return ready.pop().merge_and_unload()

    def read(merged: Any) -> Arrays:
        return {
            f"{name.removesuffix('.weight')}.kernel": on_host(value).T
            for name, value in merged.state_dict().items()
        }

    return torch_work(step, read, prepare)


def case(sizes: Sizes = SIZES) -> Case:
    """Return the case for a stack of these sizes."""
    matrices, around = 2 * sizes.layers, sizes.width + sizes.hidden
    values = matrices * sizes.weights
    return Case(
        name="merging",
        title=(f"merge of {matrices} matrices {sizes.width} x {sizes.hidden}, LoRA r={R}, float32"),
        contestants=(
            Contestant(
                "lora_jax", lambda: jax_merging(merge, sizes), ("jax", "jaxlib"), jax_settings
            ),
            Contestant("formula", lambda: jax_merging(by_formula, sizes)),
            Contestant(
                "PEFT merge_and_unload",
                lambda: peft_merging(sizes),
                ("peft", "torch"),
                torch_settings,
            ),
        ),
        # Rounding in another order.
        tolerance=1e-6,
        # W read and written, A and B read.
        needed=Needed(2 * R * values, 4 * (2 * values + R * around * matrices)),
    )


def _read(merged: Any) -> Mapping[str, np.ndarray]:
    return {path: np.asarray(leaf, np.float64) for path, leaf in paths.flatten(merged).items()}


def cases() -> Sequence[Case]:
    """Return the case."""
    return (case(),)
