"""PyTorch's run of a training, for ``trajectory``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import jax

from .. import tensors as names
from ..sides import jax_side
from ..sides.torch_order import Reordered
from ..sides.torch_side import to_numpy, to_torch, torch
from ..tensors import Mapped, Tensors
from .jax_runs import nudged
from .trajectories import Run, Step

# Below 1, between float32 numbers.
HALF_SPACING = 2.0**-25


def torch_run(
    loss: Callable[[Any, Any, Any], Any],
    make: Callable[[Sequence[Any]], Any],
    trained: Any,
    batches: Sequence[Any],
    *,
    frozen: Any = None,
    mapping: Mapped | None = None,
    scheduler: Callable[[Any], Any] | None = None,
    max_norm: float | None = None,
    wide: bool = False,
) -> Run:
    """Return the training of ``loss(trained, frozen, batch)`` with PyTorch's optimiser.

    Args:
        loss: takes mappings from PyTorch's names to tensors, and a batch of tensors; returns a
            scalar tensor.
        make: makes the optimiser of a list of parameters.
        trained: the pytree that JAX's run starts with.
        batches: those of JAX's run.
        frozen: that of JAX's run.
        mapping: PyTorch's names and layouts by JAX's, for both trees, where they differ.
        scheduler: makes a scheduler of the optimiser.
        max_norm: for ``torch.nn.utils.clip_grad_norm_``.
        wide: whether to run in float64: a truth where the mathematics are known to agree.

    >>> import numpy as np
    >>> run = torch_run(
    ...     lambda w, _, x: (x * w["w"] ** 2).sum(), lambda p: torch.optim.SGD(p, lr=0.1),
    ...     {"w": np.ones(2, "f4")}, [np.ones(2, "f4")],
    ... )
    >>> steps = run(None)
    >>> next(steps).values, next(steps).loss
    ({'w': array([1., 1.], dtype=float32)}, 2.0)
    """
    leaves, held_leaves = jax_side.leaves(trained), jax_side.leaves(frozen)
    to = {path: names.to(mapping, path) for path in (*leaves, *held_leaves)}

    def tensors(values: Tensors) -> dict[str, torch.Tensor]:
        return {to[n].name: to_torch(to[n].there(value), wide) for n, value in values.items()}

    def arrays(like: Tensors, found: Mapping[str, torch.Tensor]) -> Tensors:
        return {n: to[n].back(to_numpy(found[to[n].name]), v.shape) for n, v in like.items()}

    def run(order: int | None) -> Iterator[Step]:
        start = tensors(nudged(leaves, order))
        parameters = {name: torch.nn.Parameter(tensor) for name, tensor in start.items()}
        held = tensors(held_leaves)
        optimizer = make(list(parameters.values()))
        decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
        schedule = scheduler(optimizer) if scheduler else None

        def now(value: float) -> Step:
            found, kept = arrays(leaves, parameters), arrays(held_leaves, held)
            return Step(found, value, kept)

        def step(batch: Any) -> float:
            optimizer.zero_grad()
            value = loss(parameters, held, batch)
            value.backward()
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
            if order is not None:
                _round_otherwise(optimizer, decays, order)
            optimizer.step()
            if schedule:
                schedule.step()
            return value.item()

        yield now(float("nan"))
        for batch in cycle(batches):
            with nullcontext() if order is None else Reordered(order):
                value = step(jax.tree.map(lambda leaf: to_torch(leaf, wide), batch))
            yield now(value)

    return run


def _round_otherwise(optimizer: torch.optim.Optimizer, decays: Sequence[float], order: int) -> None:
    """Let AdamW's decay be one that it cannot tell from its own.

    It multiplies by ``1 − ηλ`` in float32: what that rounds is no noise, but the same factor at
    every step, and no order of sums shows it.
    """
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        if group.get("decoupled_weight_decay") and (rate := float(group["lr"])):
            group["weight_decay"] = decay + (-1) ** order * HALF_SPACING / rate
