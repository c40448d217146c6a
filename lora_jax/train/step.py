"""One training step over the adapters alone, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..core.adapter import Adapters
from .data import Batch

# apply(params, adapters, *batch.inputs) -> logits
Apply = Callable[..., Float[Array, "b classes"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What training changes; the frozen parameters are not in it.

    Args:
        adapters: what is trained.
        opt_state: the optimizer's moments, for the adapters only.
        step: how many steps have been taken, a scalar.
    """

    adapters: Adapters
    opt_state: Any
    step: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """What one batch showed, each a scalar.

    Args:
        loss: the mean cross-entropy of the rows that count.
        correct: how many of them have their largest logit at the label.
        rows: how many rows count.
        finite: whether the loss and, in training, gradients and update are finite.
    """

    loss: Any
    correct: Any
    rows: Any
    finite: Any


Step = Callable[[State, Any, Batch], tuple[State, Metrics]]
Evaluate = Callable[[Any, Adapters, Batch], Metrics]


def cross_entropy(
    logits: Float[Array, "b classes"],
    labels: Int[Array | np.ndarray, "b"],
    weights: Float[Array | np.ndarray, "b"],
) -> Float[Array, ""]:
    """Return ``−Σ wᵢ·log softmax(logitsᵢ)[labelᵢ] / Σ wᵢ``, computed in float32.

    >>> logits = jnp.array([[0.0, 0.0], [9.0, -9.0]])
    >>> cross_entropy(logits, jnp.array([1, 1]), jnp.array([1.0, 0.0])).round(4)
    Array(0.6931, dtype=float32)
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def schedule(
    learning_rate: int | float = 1e-3, warmup: int | float = 0.06, *, total_steps: int
) -> optax.Schedule:
    """Return the learning rate by step: linear from 0 to its peak, then linear to 0.

    Args:
        learning_rate: the peak.
        warmup: the part of the steps that it takes to get there, rounded up to whole steps.
        total_steps: the step at which the rate is 0 again.

    Source: ``get_linear_schedule_with_warmup`` of transformers 4.57.6.
    """
    rising = math.ceil(warmup * total_steps)
    up = optax.linear_schedule(0.0, learning_rate, rising)
    down = optax.linear_schedule(learning_rate, 0.0, total_steps - rising)
    return optax.join_schedules([up, down], [rising])


def optimizer(
    learning_rate: int | float = 1e-3,
    weight_decay: int | float = 0.01,
    warmup: int | float = 0.06,
    clip: int | float = 1.0,
    *,
    total_steps: int,
) -> optax.GradientTransformation:
    """Return clipping by the global norm, then AdamW with PyTorch's defaults, on ``schedule``.

    Initialise and update it with adapters alone: norm, decay and moments then cover nothing
    else.

    Args:
        learning_rate: the peak.
        weight_decay: AdamW's decoupled decay, relative to the learning rate.
        warmup: see ``schedule``.
        clip: the largest global norm of a gradient.
        total_steps: see ``schedule``.

    Source: AdamW, arXiv 1711.05101; the defaults of ``torch.optim.AdamW``.
    """
    rate = schedule(learning_rate, warmup, total_steps=total_steps)
    adamw = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip), adamw)


def start(tx: optax.GradientTransformation, adapters: Adapters) -> State:
    """Return the state before the first step, which holds a copy of ``adapters``."""
    own = jax.tree.map(jnp.copy, dict(adapters))
    return State(own, tx.init(own), jnp.zeros((), jnp.int32))


def make_step(apply: Apply, tx: optax.GradientTransformation) -> Step:
    """Return ``step(state, params, batch) -> (state, metrics)``, compiled.

    ``state`` is donated: only the returned one can be used. ``params`` are neither donated
    nor differentiated. Where the loss, a gradient or the update is not finite, the returned
    state is the old one and ``metrics.finite`` is false.

    Args:
        apply: ``apply(params, adapters, *batch.inputs)`` returns logits.
        tx: the optimizer.
    """

    def loss(adapters: Adapters, params: Any, batch: Batch) -> tuple[Array, Array]:
        logits = apply(params, adapters, *batch.inputs)
        return cross_entropy(logits, batch.labels, batch.weights), logits

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, params: Any, batch: Batch) -> tuple[State, Metrics]:
        differentiate = jax.value_and_grad(loss, has_aux=True)
        (value, logits), gradients = differentiate(state.adapters, params, batch)
        trained: Any = state.adapters
        # optax raises floats to the integer step, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(gradients, state.opt_state, trained)
        adapters: Any = optax.apply_updates(trained, updates)
        finite = _finite(value, gradients, updates)
        new = State(adapters, opt_state, state.step + 1)
        kept = jax.tree.map(partial(jnp.where, finite), new, state)
        return kept, Metrics(value, *_count(logits, batch), finite)

    return step


def make_evaluate(apply: Apply) -> Evaluate:
    """Return ``evaluate(params, adapters, batch) -> metrics``, compiled; nothing is donated.

    Args:
        apply: as in ``make_step``.
    """

    @jax.jit
    def evaluate(params: Any, adapters: Adapters, batch: Batch) -> Metrics:
        logits = apply(params, adapters, *batch.inputs)
        value = cross_entropy(logits, batch.labels, batch.weights)
        return Metrics(value, *_count(logits, batch), _finite(value))

    return evaluate


def _count(logits: Float[Array, "b classes"], batch: Batch) -> tuple[Array, Array]:
    hits = jnp.argmax(logits, axis=-1) == batch.labels
    return jnp.sum(jnp.where(hits, batch.weights, 0.0)), jnp.sum(batch.weights)


def _finite(*trees: PyTree) -> Array:
    # A norm is finite only if every value is, and the clipping has computed one already.
    return jnp.isfinite(jnp.stack([optax.tree.norm(tree) for tree in trees])).all()
