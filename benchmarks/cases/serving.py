"""One batch whose rows have adapters of their own, forwards only.

Two questions, two kinds of case. ``serving_K_at_T``: are K really different adapters, in another
order at every step, done right, and faster than row by row and than PEFT's mixed batch?
``serving_or_one_at_T``: what do as many adapters as rows cost beside one adapter for all? Both
sides must give the same results there, so the adapters are different factors and scales of one
and the same ``ΔW``: for orthogonal Q::

    s_k · (A·Q_k) · (s / s_k · Q_kᵀ·B) = s · A·B

The program is the one of ``serving_32_at_T``, and no implementation can use that they agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import lora, per_example, select, stack

from ..case import Case, Contestant, Needed, Work
from ..contestants.common import compiled, jax_settings, torch_ready, torch_settings, torch_work
from . import stack as model
from .stack import Pairs, Sizes

SIZES = Sizes(width=512, hidden=1536)
R, ROWS = 16, 32
ADAPTERS, TOKENS = (1, 8, 32), (1, 64)
BATCHES = 4


@dataclass(frozen=True)
class Given:
    """What all contestants get: a batch is ``(rows, tokens, width)``, an index ``(rows,)``."""

    params: Any
    adapters: tuple[Pairs, ...]
    batches: tuple[jax.Array, ...]
    indices: tuple[np.ndarray, ...]


def given(adapters: Sequence[Pairs], rows: int, tokens: int, sizes: Sizes) -> Given:
    """Draw the weights and the batches; every adapter has rows in each, in another order."""
    rng = np.random.default_rng(3)
    batches = model.inputs((rows, tokens, sizes.width), BATCHES)
    order = np.arange(rows) % len(adapters)
    indices = tuple(rng.permutation(order) for _ in batches)
    return Given(model.draw(sizes), tuple(adapters), tuple(batches), indices)


def different(many: int, sizes: Sizes) -> tuple[Pairs, ...]:
    """Return adapters that have nothing in common; every one has a scale of its own."""

    def one(n: int) -> Pairs:
        pairs = model.adapters(sizes, R, seed=1 + n)
        return {path: replace(pair, scale=(1 + n) / many) for path, pair in pairs.items()}

    return tuple(map(one, range(many)))


def agreeing(many: int, sizes: Sizes) -> tuple[Pairs, ...]:
    """Return adapters with different factors and scales, but one ``ΔW`` for each path."""
    rng, first = np.random.default_rng(4), model.adapters(sizes, R)

    def one(n: int) -> Pairs:
        turned = {}
        for path, pair in first.items():
            turn = jnp.asarray(np.linalg.qr(rng.normal(size=(R, R)))[0], jnp.float32)
            old, new = pair.scale, (1 + n) / many
            b = turn.T @ pair.b * jnp.float32(old / new)  # pyright: ignore
            turned[path] = replace(pair, a=pair.a @ turn, b=b, scale=new)
        return turned

    return (first, *map(one, range(1, many)))


def mixed(stacked: Any, index: jax.Array, params: Any, x: jax.Array) -> jax.Array:
    """Return the output of a batch whose rows have the adapters that the index names."""
    run = per_example(lora(model.forward), rows=x.shape[1])
    return run(params, select(stacked, index), x)


def mixed_work(work: Given) -> Work:
    """Return the work of choosing and applying an adapter for every row, in one program."""
    turns = itertools.cycle(zip(work.batches, map(jnp.asarray, work.indices), strict=True))
    stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stack(work.adapters))
    program = compiled(mixed, stacked, work.indices[0], work.params, work.batches[0])

    def step() -> jax.Array:
        x, index = next(turns)
        return jax.block_until_ready(program.call(stacked, index, work.params, x))

    return program.work(step)


def one_work(work: Given) -> Work:
    """Return the work of the first adapter alone for the whole batch."""
    fn, turns = lora(model.forward), itertools.cycle(work.batches)
    program = compiled(fn, work.params, work.adapters[0], work.batches[0])

    def step() -> jax.Array:
        return jax.block_until_ready(program.call(work.params, work.adapters[0], next(turns)))

    return program.work(step)


def rows_work(work: Given) -> Work:
    """Return the work of one call after the other, with one row and its adapter each."""
    traced = [
        {path: replace(pair, scale=jnp.float32(pair.scale)) for path, pair in one.items()}
        for one in work.adapters
    ]
    split = [[x[n : n + 1] for n in range(x.shape[0])] for x in work.batches]
    program = compiled(lora(model.forward), work.params, traced[0], split[0][0])
    turns = itertools.cycle(zip(split, work.indices, strict=True))

    def step() -> list[jax.Array]:
        rows, index = next(turns)
        outs = [
            program.call(work.params, traced[k], row) for k, row in zip(index, rows, strict=True)
        ]
        return jax.block_until_ready(outs)

    def read(outs: list[jax.Array]) -> dict[str, np.ndarray]:
        return {"result": np.asarray(jnp.concatenate(outs), np.float64)}

    return program.work(step, read, calls=len(split[0]))


def peft_work(work: Given) -> Work:
    """Return the work of PEFT's mixed batch, ``adapter_names``."""
    torch = torch_ready()
    net = model.peft_model(model.torch_weights(work.params), work.adapters).eval()
    batches = [torch.tensor(np.asarray(x)) for x in work.batches]
    names = [[str(k) for k in index] for index in work.indices]
    turns = itertools.cycle(zip(batches, names, strict=True))

    def step() -> Any:
        x, adapters = next(turns)
        with torch.inference_mode():
            return net(x, adapter_names=adapters)

    return torch_work(step)


def needed(many: int, rows: int, tokens: int, sizes: Sizes) -> Needed:
    """Return the least: each product once; weights, adapters, input and output moved once.

    With ``T = rows · tokens``, N values in a matrix and ``S = width + hidden``::

        FLOPs = 2·T·(N + r·S)·2·L
        bytes = 4·((N + many·r·S)·2·L + 2·T·width)
    """
    count, matrices = rows * tokens, 2 * sizes.layers
    pair = R * (sizes.width + sizes.hidden)
    moved = (sizes.weights + many * pair) * matrices + 2 * count * sizes.width
    return Needed(2 * count * (sizes.weights + pair) * matrices, 4 * moved)


def case(many: int, tokens: int, rows: int = ROWS, sizes: Sizes = SIZES) -> Case:
    """Return the case of this many different adapters in one batch."""

    def draw() -> Given:
        return given(different(many, sizes), rows, tokens, sizes)

    return Case(
        name=f"serving_{many}_at_{tokens}",
        title=f"forward of {_batch(rows, tokens, sizes)}, {many} different adapters",
        contestants=(
            Contestant("lora_jax", lambda: mixed_work(draw()), ("jax", "jaxlib"), jax_settings),
            Contestant("row by row", lambda: rows_work(draw())),
            Contestant("PEFT mixed", lambda: peft_work(draw()), ("peft", "torch"), torch_settings),
        ),
        # Rounding in another order.
        tolerance=1e-5,
        needed=needed(many, rows, tokens, sizes),
        sizes={"adapters": many},
        group=f"serving at {tokens} tokens a row",
    )


def or_one(tokens: int, rows: int = ROWS, sizes: Sizes = SIZES) -> Case:
    """Return the case of as many adapters as rows against one adapter for all."""

    def set_up(work: Callable[[Given], Work]) -> Callable[[], Work]:
        return lambda: work(given(agreeing(rows, sizes), rows, tokens, sizes))

    return Case(
        name=f"serving_or_one_at_{tokens}",
        title=f"forward of {_batch(rows, tokens, sizes)}, an adapter for each row or one for all",
        contestants=(
            Contestant("lora_jax", set_up(mixed_work), ("jax", "jaxlib"), jax_settings),
            Contestant("one adapter", set_up(one_work)),
        ),
        # Rounding in another order, and of the turned factors.
        tolerance=1e-5,
        needed=needed(1, rows, tokens, sizes),
    )


def _batch(rows: int, tokens: int, sizes: Sizes) -> str:
    return (
        f"{rows} rows of {tokens} tokens through a stack {sizes.width} to {sizes.hidden} to "
        f"{sizes.width}, LoRA r={R}, float32"
    )


def cases() -> tuple[Case, ...]:
    """Return every number of adapters, and as many as rows against one, at every length."""
    return tuple(
        one
        for tokens in TOKENS
        for one in (*(case(many, tokens) for many in ADAPTERS), or_one(tokens))
    )
