"""The JAX side of the SmolLM2-shaped cases: the layers unrolled, or as a scan."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax import Adapter, lora, merge
from lora_jax.optim.adam import adamw

from ..case import Arrays, Work, as_arrays
from ..contestants.common import compiled
from . import decoder, smollm_model
from .decoder import Params, Sizes, tokens
from .smollm_model import LEARNING_RATE, WEIGHT_DECAY, Task

# Of the states (rows, tokens, width), the parameters and the labels (rows, tokens).
Loss = Callable[[jax.Array, Params, jax.Array], jax.Array]
Step = Callable[..., tuple[Any, Any, jax.Array]]

# As PyTorch's, whose defaults the other decays are.
_ADAMW = adamw(LEARNING_RATE, WEIGHT_DECAY)


def all_logits(states: jax.Array, params: Params, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy of the logits, which are formed whole, in float32."""
    return decoder.cross_entropy((states @ decoder.head(params)).astype(jnp.float32), labels)


def model(sizes: Sizes, loss: Loss) -> Callable[[Params, jax.Array], jax.Array]:
    """Return ``fn(params, ids)``, the mean loss of each token's successor."""

    def fn(params: Params, ids: jax.Array) -> jax.Array:
        states = decoder.states(sizes, params, ids, remat=(decoder.KEPT,))
        return loss(states[:, :-1], params, ids[:, 1:])

    return fn


def start(trained: Any) -> tuple[Any, Any]:
    """Return what is trained and AdamW's state, of which nothing shares memory."""
    return trained, jax.tree.map(jnp.copy, _ADAMW.init(trained))


def train_step(value: Callable[..., jax.Array]) -> Step:
    """Return ``step(trained, state, *args)`` for ``value(trained, *args)``.

    Returns:
        What is trained, and the optimizer's state, after the step; and the value before it.
    """

    def step(trained: Any, state: Any, *args: Any) -> tuple[Any, Any, jax.Array]:
        found, gradients = jax.value_and_grad(value)(trained, *args)
        updates, state = _ADAMW.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, found

    return step


def lora_step(sizes: Sizes, loss: Loss = decoder.loss_by_parts) -> Step:
    """Return ``step(adapters, state, params, ids)``; the weights are frozen."""
    adapted = lora(model(sizes, loss))
    return train_step(lambda adapters, params, ids: adapted(params, adapters, ids))


def training(task: Task, *, scan: bool, loss: Loss = decoder.loss_by_parts) -> Work:
    """Return the training step; adapters and the optimizer's state are donated."""
    adapters, state = start(_adapters(task, scan=scan))
    params, ids = smollm_model.in_jax(task, scan=scan), _batches(task)
    step_of = lora_step(task.sizes, loss)
    program = compiled(step_of, adapters, state, params, tokens(task.sizes), donate=(0, 1))

    def step() -> jax.Array:
        nonlocal adapters, state
        adapters, state, value = jax.block_until_ready(
            program.call(adapters, state, params, next(ids))
        )
        return value

    def read(value: jax.Array) -> Arrays:
        trees = {"adapters": adapters, "mean gradient": state.mu}
        return smollm_model.results(
            value, {kind: smollm_model.by_linear(tree) for kind, tree in trees.items()}
        )

    return program.work(step, read)


def forward(task: Task, *, scan: bool) -> Work:
    """Return the forward step, from tokens to all logits."""
    params, adapters = smollm_model.in_jax(task, scan=scan), _adapters(task, scan=scan)
    program = compiled(lora(decoder.decoder(task.sizes)), params, adapters, tokens(task.sizes))
    ids = _batches(task)

    def step() -> jax.Array:
        return jax.block_until_ready(program.call(params, adapters, next(ids)))

    return program.work(step, lambda logits: as_arrays(logits[:, -1]))


def full(task: Task, *, loss: Loss = decoder.loss_by_parts) -> Work:
    """Return full fine-tuning's step by a scan, from the weights with the adapters merged in."""
    (trained, state), ids = start(merged(task)), _batches(task)
    step_of = train_step(model(task.sizes, loss))
    program = compiled(step_of, trained, state, tokens(task.sizes), donate=(0, 1))

    def step() -> jax.Array:
        nonlocal trained, state
        trained, state, value = jax.block_until_ready(program.call(trained, state, next(ids)))
        return value

    return program.work(step)


def merged(task: Task) -> Any:
    """Return the weights, layers stacked, with the adapters merged in."""
    found = merge(smollm_model.in_jax(task, scan=True), _adapters(task, scan=True))
    return jax.tree.map(jnp.array, found)


def compiling(task: Task, *, scan: bool) -> Work:
    """Return the step that compiles the training step anew and takes it once, from the start."""
    found, params = smollm_model.planned(task, scan=scan), smollm_model.in_jax(task, scan=scan)
    ids = _batches(task)

    def operands() -> tuple[Any, ...]:
        return *start(smollm_model.adapters(task, found)), params

    shape = tokens(task.sizes)
    once = compiled(lora_step(task.sizes), *operands(), shape, donate=(0, 1))

    def step() -> jax.Array:
        given = operands()
        # A new function object, of which nothing is cached.
        lowered = jax.jit(lora_step(task.sizes), donate_argnums=(0, 1)).lower(*given, shape)
        return jax.block_until_ready(lowered.compile()(*given, next(ids)))[2]

    return Work(step, compile_seconds=once.seconds, flops=once.flops)


def _adapters(task: Task, *, scan: bool) -> dict[str, Adapter]:
    return smollm_model.adapters(task, smollm_model.planned(task, scan=scan))


def _batches(task: Task) -> Iterator[jax.Array]:
    return itertools.cycle([jnp.asarray(ids) for ids in smollm_model.batches(task.sizes)])
