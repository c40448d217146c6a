"""``optimizer_step``: an optax optimiser and PyTorch's on the same gradients, against the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from ...core.errors import ParityError, raise_all
from ..tensors import Tensors
from ..verdicts import UNIT_ROUNDOFF, TensorVerdict, judge, norm, rel_l2
from . import update_rules

# Roundings in one step of an optimiser, each tensor's own.
CHAIN = 8.0

# PyTorch's addition to the norm by which it clips.
TORCH_ADDED = 1e-6

Taken = tuple[Tensors, dict[str, Tensors]]
"""Values and moments by PyTorch's names, after one step."""


def optimizer_step(
    tx: optax.GradientTransformation,
    torch_optimizer: Callable[[Sequence[Any]], Any],
    values: Mapping[str, NDArray[Any]],
    gradients: Sequence[Mapping[str, NDArray[Any]]],
    *,
    scheduler: Callable[[Any], Any] | None = None,
    max_norm: float | None = None,
    accumulate: int = 1,
    rule: update_rules.Rule | None = None,
) -> tuple[TensorVerdict, ...]:
    """Hold every step of an optax optimiser to PyTorch's: the parameters and the moments.

    Parameters are compared by their change, in units of that change, with
    ``relL2(jax) ≤ 2 · relL2(torch) + u · cond``. In ``cond`` are the rounding of each stored
    value, what rounded gradients make of the result (measured), and, without x64, optax's bias
    correction, which forms ``1 − βᵗ`` in float32.

    Args:
        tx: optax's; schedules, clipping and accumulation of its own included.
        torch_optimizer: makes PyTorch's of a list of parameters.
        values: where both start, by name.
        gradients: one mapping of the same names for each call.
        scheduler: makes PyTorch's scheduler of its optimiser.
        max_norm: for ``torch.nn.utils.clip_grad_norm_`` before each of PyTorch's steps.
        accumulate: how many gradients PyTorch sums up for a step.
        rule: the truth; by default what PyTorch's optimiser is meant to be.

    Returns:
        A verdict for every tensor and moment after every step, such as ``"step 3 exp_avg w"``.

    Raises:
        ParityError: names, shapes or dtypes of the gradients do not fit; lists them all.

    >>> import torch
    >>> values = {"w": np.linspace(-1, 1, 12, dtype="f4").reshape(3, 4)}
    >>> ones = [{"w": np.ones((3, 4), "f4")}]
    >>> [one] = optimizer_step(optax.sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1), values, ones)
    >>> one.name, one.verdict.ok
    ('step 1 w', True)
    >>> [one] = optimizer_step(optax.sgd(0.2), lambda p: torch.optim.SGD(p, lr=0.1), values, ones)
    >>> one.verdict.value, one.further
    ('MISMATCH', 'jax')
    """
    _refuse(values, gradients, accumulate)
    from . import torch_steps

    found = torch_steps.take(
        torch_optimizer, values, gradients, scheduler, max_norm, accumulate, rule
    )
    ours = _ours(tx, values, gradients, accumulate, found.rule.moments)
    truths = list(_truth(found.rule, found.rates, values, gradients, max_norm, accumulate))
    unit = max(UNIT_ROUNDOFF[str(value.dtype)] for value in values.values())
    noisy = [_noisy(step, unit, seed) for seed, step in enumerate(gradients)]
    nearby = _truth(found.rule, found.rates, values, noisy, max_norm, accumulate)
    steps = zip(ours, found.taken, truths, nearby, strict=True)
    return tuple(
        one
        for number, step in enumerate(steps, 1)
        for one in _judged(number, *step, values, found.rule, unit, number == len(truths))
    )


def _judged(
    number: int,
    ours: Taken,
    theirs: Taken,
    truth: update_rules.State,
    near: update_rules.State,
    start: Mapping[str, NDArray[Any]],
    rule: update_rules.Rule,
    unit: float,
    last: bool,
) -> Iterator[TensorVerdict]:
    # A rounded setting, such as a learning rate in float32, is a factor of all elements alike, so
    # the slope is one rounding and no mean of many.
    common: Any = dict(unit_roundoff=unit, independent=1)
    for name, begin in start.items():
        wide = begin.astype(np.longdouble)
        change, nearby = truth.values[name] - wide, near.values[name] - wide
        # A first step of a warm-up has learning rate 0; if all have, nothing was shown.
        size = norm(wide) if not np.any(change) and not last else None
        length = size or norm(change)
        stored = number * norm(wide) / length if length else 0.0
        moved = rel_l2(nearby, change, length) / unit if length else 0.0
        yield judge(
            f"step {number} {name}",
            ours[0][name].astype(np.longdouble) - wide,
            theirs[0][name].astype(np.longdouble) - wide,
            change,
            cond=CHAIN + stored + moved + _correction(rule),
            size=size,
            **common,
        )
    for moment, tensors in truth.moments.items():
        for name, tensor in tensors.items():
            moved = rel_l2(near.moments[moment][name], tensor) / unit if np.any(tensor) else 0.0
            yield judge(
                f"step {number} {moment} {name}",
                ours[1][moment][name],
                theirs[1][moment][name],
                tensor,
                cond=CHAIN + moved,
                **common,
            )


def _correction(rule: update_rules.Rule) -> float:
    """Return what optax loses where it forms ``1 − βᵗ`` in float32: ``β`` is near to 1."""
    if not isinstance(rule, update_rules.Adam) or jax.config.jax_enable_x64:  # pyright: ignore
        return 0.0
    b1, b2 = rule.betas
    return 1 / (1 - b1) + 0.5 / (1 - b2)


def _ours(
    tx: optax.GradientTransformation,
    values: Mapping[str, NDArray[Any]],
    gradients: Sequence[Mapping[str, NDArray[Any]]],
    accumulate: int,
    moments: Sequence[str],
) -> Iterator[Taken]:
    @jax.jit
    def step(gradients: Any, state: Any, values: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, state = tx.update(gradients, state, values)
            return optax.apply_updates(values, updates), state

    current: Any = {name: jnp.asarray(value) for name, value in values.items()}
    state = tx.init(current)
    for number, one in enumerate(gradients, 1):
        current, state = step({name: jnp.asarray(one[name]) for name in values}, state, current)
        if number % accumulate == 0:
            kept = {moment: _moment(state, moment) for moment in moments}
            yield {name: np.asarray(value) for name, value in current.items()}, kept


def _moment(state: Any, moment: str) -> Tensors:
    from .like_torch import MOMENTS

    found: Any = optax.tree_utils.tree_get(state, MOMENTS[moment])
    if found is None:
        raise ParityError(
            f"{moment}: optax's state has no {MOMENTS[moment]!r}, wanted one like PyTorch's"
        )
    return {name: np.asarray(value) for name, value in found.items()}


def _truth(
    rule: update_rules.Rule,
    rates: Sequence[float],
    values: Mapping[str, NDArray[Any]],
    gradients: Sequence[Mapping[str, NDArray[Any]]],
    max_norm: float | None,
    accumulate: int,
) -> Iterator[update_rules.State]:
    state = update_rules.start(rule, values)
    for number, rate in enumerate(rates):
        several = gradients[number * accumulate : (number + 1) * accumulate]
        summed = {n: sum(one[n].astype(np.longdouble) for one in several) for n in values}
        if max_norm is not None:
            summed = update_rules.clip(summed, max_norm, TORCH_ADDED)  # pyright: ignore
        state = update_rules.update(rule, state, summed, rate)  # pyright: ignore
        yield state


def _noisy(gradients: Mapping[str, NDArray[Any]], unit: float, seed: int) -> Tensors:
    """Return gradients of which every element is off by a few roundings."""
    rng = np.random.default_rng(seed)
    return {
        name: g.astype(np.longdouble) * (1 + 4 * unit * rng.choice((-1, 1), g.shape))
        for name, g in gradients.items()
    }


def _refuse(
    values: Mapping[str, NDArray[Any]],
    gradients: Sequence[Mapping[str, NDArray[Any]]],
    accumulate: int,
) -> None:
    problems = []
    if not gradients or accumulate < 1 or len(gradients) % accumulate:
        problems.append(f"got {len(gradients)} gradients, wanted a multiple of {accumulate}")
    for number, one in enumerate(gradients):
        problems += [f"gradient {number}: {n} has no value" for n in one.keys() - values.keys()]
        problems += [f"gradient {number}: no {n}" for n in values.keys() - one.keys()]
        problems += [
            f"gradient {number}: {n} is {g.dtype}{list(g.shape)}, its value "
            f"{values[n].dtype}{list(values[n].shape)}"
            for n, g in one.items()
            if n in values and (g.shape, g.dtype) != (values[n].shape, values[n].dtype)
        ]
    raise_all(ParityError, "these gradients do not fit the values", problems)
