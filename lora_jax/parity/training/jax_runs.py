"""JAX's run of a training, for ``trajectory``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from ...core import paths
from ..sides import jax_side
from ..sides.jax_order import reordered
from ..tensors import Tensors
from .trajectories import Run, Step

# Of the start of noisy runs; the orders of sums have their own.
NUDGE = 10_000


def jax_run(
    loss: Callable[[Any, Any, Any], Any],
    tx: optax.GradientTransformation,
    trained: Any,
    batches: Sequence[Any],
    *,
    frozen: Any = None,
) -> Run:
    """Return the training of ``loss(trained, frozen, batch)`` with ``tx``.

    Args:
        loss: returns a scalar.
        tx: the optimiser.
        trained: any pytree of arrays, adapters included.
        batches: pytrees of arrays, one a step, over again when they end.
        frozen: any pytree of arrays that ``loss`` takes and that must not move.

    >>> run = jax_run(
    ...     lambda w, _, x: jnp.sum(x * w["w"] ** 2), optax.sgd(0.1), {"w": np.ones(2, "f4")},
    ...     [np.ones(2, "f4")],
    ... )
    >>> steps = run(None)
    >>> next(steps).values, next(steps).loss
    ({'w': array([1., 1.], dtype=float32)}, 2.0)
    """

    def step(values: Any, state: Any, frozen: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(values, frozen, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, state = tx.update(gradients, state, values)
            return value, optax.apply_updates(values, updates), state

    def run(order: int | None) -> Iterator[Step]:
        start = {n: jnp.asarray(v) for n, v in nudged(jax_side.leaves(trained), order).items()}
        values, held = paths.replace(trained, start), jax.tree.map(jnp.asarray, frozen)
        state = tx.init(values)
        compiled = jax.jit(step if order is None else reordered(step, order))
        yield Step(jax_side.leaves(values), frozen=jax_side.leaves(held))
        for batch in cycle(batches):
            value, values, state = compiled(values, state, held, batch)
            yield Step(jax_side.leaves(values), float(value), jax_side.leaves(held))

    return run


def nudged(values: Tensors, order: int | None) -> Tensors:
    """Return values of which each is the next number up or down; the same where order is None.

    An optimiser that divides by the gradient's size hides the order of sums in its first steps,
    where all that one step rounds is the value that it stores.

    >>> nudged({"w": np.ones(1, "f4")}, 1)["w"] - 1
    array([-5.9604645e-08], dtype=float32)
    """
    if order is None:
        return values
    rng = np.random.default_rng(NUDGE + order)

    def nudge(value: NDArray[Any]) -> NDArray[Any]:
        away = rng.choice((-np.inf, np.inf), value.shape).astype(value.dtype)
        return np.nextafter(value, away)

    return {name: nudge(value) for name, value in values.items()}
