"""K adapters of one model trained at once, each on a batch of its own, against K separate runs.

A step is one of plain descent for every adapter, each with its own data and scale. With few
tokens each, reading the frozen weights is most of a step, and all adapters share one reading.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import lora, map_adapters, rescale, stack

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

SIZES = Sizes(width=512, hidden=1536)
R = 16
ADAPTERS, TOKENS = (1, 2, 4, 8, 16), (8, 512)
BATCHES = 4
LEARNING_RATE = 0.01

Trained = tuple[jax.Array, Mapping[str, Any]]


@dataclass(frozen=True)
class Given:
    """What all contestants get: a batch is ``(x, wanted)``, each ``(adapters, tokens, width)``."""

    params: Any
    adapters: tuple[Pairs, ...]
    batches: tuple[tuple[jax.Array, jax.Array], ...]


def given(many: int, tokens: int, sizes: Sizes = SIZES) -> Given:
    """Draw the weights, the adapters and the batches; every adapter has a scale of its own."""

    def with_scale(n: int) -> Pairs:
        pairs = model.adapters(sizes, R, seed=1 + n)
        return {path: replace(pair, scale=(1 + n) / many) for path, pair in pairs.items()}

    drawn = model.inputs((many, tokens, sizes.width), 2 * BATCHES)
    batches = tuple(zip(drawn[::2], drawn[1::2], strict=True))
    return Given(model.draw(sizes), tuple(map(with_scale, range(many))), batches)


def descend(adapters: Any, scales: Any, params: Any, x: jax.Array, wanted: jax.Array) -> Trained:
    """Return the loss of one run, and its adapters after one step."""

    def loss(adapters: Any) -> jax.Array:
        y = lora(model.forward)(params, rescale(adapters, scales), x)
        return jnp.mean((y - wanted) ** 2)

    value, gradients = jax.value_and_grad(loss)(adapters)
    return value, jax.tree.map(lambda a, g: a - LEARNING_RATE * g, adapters, gradients)


def together(adapters: Any, scales: Any, params: Any, x: jax.Array, wanted: jax.Array) -> Trained:
    """Return what ``descend`` does for all adapters at once, or as many as the rows ask for."""

    def one(adapters: Any, scales: Any, x: jax.Array, wanted: jax.Array) -> Trained:
        return descend(adapters, scales, params, x, wanted)

    return map_adapters(one, rows=x.shape[1])(adapters, scales, x, wanted)


def mapped(adapters: Any, scales: Any, params: Any, x: jax.Array, wanted: jax.Array) -> Trained:
    """Return the same by ``jax.vmap``, whatever the rows."""
    return jax.vmap(descend, in_axes=(0, 0, None, 0, 0))(adapters, scales, params, x, wanted)


def in_turn(adapters: Any, scales: Any, params: Any, x: jax.Array, wanted: jax.Array) -> Trained:
    """Return what ``descend`` does for one adapter after the other, in one program."""
    return jax.lax.map(
        lambda own: descend(own[0], own[1], params, *own[2:]), (adapters, scales, x, wanted)
    )


def stacked_work(step: Any, work: Given) -> Work:
    """Return the work of a program that takes all adapters on a leading axis."""
    whole = stack(work.adapters)
    adapters, batches = whole.adapters, itertools.cycle(work.batches)
    scales = {path: jnp.asarray(scale, jnp.float32) for path, scale in whole.scales.items()}
    program = compiled(step, adapters, scales, work.params, *work.batches[0], donate=(0,))

    def run() -> Trained:
        nonlocal adapters
        losses, adapters = jax.block_until_ready(
            program.call(adapters, scales, work.params, *next(batches))
        )
        return losses, adapters

    return program.work(run, read)


def read(trained: Trained) -> Arrays:
    """Return the losses and the factors, all with the adapters as the leading axis."""
    losses, adapters = trained
    return {"losses": np.asarray(losses, np.float64), **model.factors(adapters)}


def apart_work(work: Given) -> Work:
    """Return the work of as many runs as there are adapters: each step waits for its end."""
    scales = [
        {path: jnp.float32(pair.scale) for path, pair in one.items()} for one in work.adapters
    ]
    runs = [
        {path: replace(pair, scale=None) for path, pair in one.items()} for one in work.adapters
    ]
    separate = [[(x[k], wanted[k]) for k in range(len(runs))] for x, wanted in work.batches]
    batches = itertools.cycle(separate)
    program = compiled(descend, runs[0], scales[0], work.params, *separate[0][0], donate=(0,))

    def run() -> list[Any]:
        losses = []
        for k, batch in enumerate(next(batches)):
            loss, runs[k] = jax.block_until_ready(
                program.call(runs[k], scales[k], work.params, *batch)
            )
            losses.append(loss)
        return losses

    def arrays(losses: Sequence[jax.Array]) -> Arrays:
        return read((jnp.stack(losses), jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)))

    return program.work(run, arrays, calls=len(runs))


def peft_work(work: Given) -> Work:
    """Return the work of as many PEFT models, which share the frozen weights."""
    torch = torch_ready()
    weights = model.torch_weights(work.params)
    runs = [model.peft_model(weights, [one]) for one in work.adapters]
    trained = [[p for p in run.parameters() if p.requires_grad] for run in runs]
    optimizers = [torch.optim.SGD(own, lr=LEARNING_RATE) for own in trained]
    batches = itertools.cycle(
        [torch.tensor(np.asarray(value)) for value in batch] for batch in work.batches
    )

    def step() -> list[Any]:
        losses, (x, wanted) = [], next(batches)
        for k, run in enumerate(runs):
            loss = torch.nn.functional.mse_loss(run(x[k]), wanted[k])
            optimizers[k].zero_grad()
            loss.backward()
            optimizers[k].step()
            losses.append(loss.item())
        return losses

    def arrays(losses: Sequence[float]) -> Arrays:
        found = {"losses": np.array(losses)}
        for path in work.adapters[0]:
            own = [model.peft_factors(run, path, "0") for run in runs]
            for name, factors in zip("ab", zip(*own, strict=True), strict=True):
                found[f"{path}.{name}"] = np.stack([on_host(factor).T for factor in factors])
        return found

    return torch_work(step, arrays)


def needed(many: int, tokens: int, sizes: Sizes = SIZES) -> Needed:
    """Return the least: forwards and the inner gradient; weights and adapters moved once.

    With ``T = many · tokens`` tokens, N values in a matrix and ``S = width + hidden``::

        FLOPs = 2·T·N·(2·L + 2·L - 1) + 2·T·r·(3·S·2·L - width)
        bytes = 4·(2·L·N + 2·many·r·S·2·L)

    Nobody needs the gradient of the stack's own input.
    """
    rows, matrices, around = many * tokens, 2 * sizes.layers, sizes.width + sizes.hidden
    frozen = 2 * rows * sizes.weights * (2 * matrices - 1)
    low_rank = 2 * rows * R * (3 * around * matrices - sizes.width)
    moved = 4 * (matrices * sizes.weights + 2 * many * R * around * matrices)
    return Needed(frozen + low_rank, moved)


def case(many: int, tokens: int, sizes: Sizes = SIZES) -> Case:
    """Return the case for this many adapters, with this many tokens each."""

    def draw() -> Given:
        return given(many, tokens, sizes)

    return Case(
        name=f"many_{many}_at_{tokens}",
        title=(
            f"one gradient step of {many} adapters, {tokens} tokens each, on a stack "
            f"{sizes.width} to {sizes.hidden} to {sizes.width}, LoRA r={R}, float32"
        ),
        contestants=(
            Contestant(
                "lora_jax", lambda: stacked_work(together, draw()), ("jax", "jaxlib"), jax_settings
            ),
            Contestant("one after the other", lambda: apart_work(draw())),
            Contestant("vmap", lambda: stacked_work(mapped, draw())),
            Contestant("in turn, one program", lambda: stacked_work(in_turn, draw())),
            Contestant(
                "PEFT, one by one", lambda: peft_work(draw()), ("peft", "torch"), torch_settings
            ),
        ),
        # Rounding in another order, carried through the checked steps.
        tolerance=1e-5,
        needed=needed(many, tokens, sizes),
        sizes={"adapters": many},
        group=f"many at {tokens} tokens each",
    )


def cases() -> tuple[Case, ...]:
    """Return every number of adapters at every number of tokens."""
    return tuple(case(many, tokens) for tokens in TOKENS for many in ADAPTERS)
