"""PyTorch's side of ``optimizer_step``: values, moments and learning rates of every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ..sides.torch_side import to_numpy, to_torch, torch
from ..tensors import Tensors
from .like_torch import rule_like_torch
from .update_rules import Rule


@dataclass(frozen=True)
class Steps:
    """What PyTorch's optimiser did.

    Args:
        rule: its settings.
        rates: the rule's learning rate at each step, as PyTorch's scheduler changes it.
        taken: values and moments after each step.
    """

    rule: Rule
    rates: Sequence[float]
    taken: Sequence[tuple[Tensors, dict[str, Tensors]]]


def take(
    make: Callable[[Sequence[Any]], Any],
    values: Mapping[str, NDArray[Any]],
    gradients: Sequence[Mapping[str, NDArray[Any]]],
    scheduler: Callable[[Any], Any] | None,
    max_norm: float | None,
    accumulate: int,
    rule: Rule | None,
) -> Steps:
    """Run PyTorch's optimiser on these gradients, one step for every ``accumulate`` of them."""
    parameters = {name: torch.nn.Parameter(to_torch(value)) for name, value in values.items()}
    optimizer = make(list(parameters.values()))
    rule, base = rule or rule_like_torch(optimizer), float(optimizer.param_groups[0]["lr"])
    schedule = scheduler(optimizer) if scheduler else None
    rates, taken = [], []
    for number, one in enumerate(gradients, 1):
        for name, parameter in parameters.items():
            gradient = to_torch(one[name])
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if number % accumulate:
            continue
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
        scheduled = float(optimizer.param_groups[0]["lr"])
        rates.append(rule.lr * (scheduled / base) if base else rule.lr)
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
        now = {name: to_numpy(parameter) for name, parameter in parameters.items()}
        moments = {
            moment: {name: to_numpy(optimizer.state[p][moment]) for name, p in parameters.items()}
            for moment in rule.moments
        }
        taken.append((now, moments))
    return Steps(rule, rates, taken)
