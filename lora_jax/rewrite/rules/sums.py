"""``add``, ``sub``, ``reduce_sum`` of weights: the sum of two low-rank changes has both ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from ...core.adapter import STACKED
from .. import weight_moves
from ..interpret import Call, base_of
from ..registry import Unsupported, rule
from ..weight import LoraWeight, with_letters


@rule("add", "add_any")
def add(call: Call, left: Any, right: Any) -> LoraWeight:
    """``W₁ + W₂ + s·[A₁ A₂]·[B₁; B₂]``; an array of parameters or constants leaves A and B."""
    return sum_of(call, left, right)


@rule("sub")
def sub(call: Call, left: Any, right: Any) -> LoraWeight:
    """``W₁ − W₂ + s·[A₁ A₂]·[B₁; −B₂]``."""
    return sum_of(call, left, _negated(right))


@rule("reduce_sum")
def reduce_sum(call: Call, weight: LoraWeight) -> LoraWeight:
    """``Σ W_e + s·[A₁ A₂ …]·[B₁; B₂; …]`` over an axis that the adapter stacks, such as experts."""
    axes = set(map(int, call.params["axes"]))
    if weight.base.ndim - len(axes) < 2:
        raise Unsupported("the weight's elements are used one by one, not in a product")
    _refuse_extras(weight)
    kept = tuple(labels for axis, labels in enumerate(weight.origin) if axis not in axes)
    summed = frozenset().union(*(weight.origin[axis] for axis in axes))
    whole = replace(
        weight, base=call.plain(weight.base), origin=kept, looped=weight.looped | summed
    )
    if weight.planning:
        return whole
    if any(weight.origin[n] and weight.letters[n] != STACKED for n in axes):
        raise Unsupported("the weight is summed over an axis that its adapter does not stack")
    # Weights that were repeated along such an axis have it in A and B from here on.
    letters = "".join(STACKED if n in axes else s for n, s in enumerate(weight.letters))
    spread = with_letters(weight, letters)
    order = [n for n, s in enumerate(letters) if s == STACKED]
    moved = [place for place, n in enumerate(order) if n in axes]
    return replace(whole, a=_a_of_sum(spread.a, moved), b=_b_of_sum(spread.b, moved, len(order)))


def _a_of_sum(a: Any, stacked: list[int]) -> Any:
    """Return A with these stacked axes made part of its last, the rank."""
    last = tuple(range(a.ndim - 1 - len(stacked), a.ndim - 1))
    a = jnp.moveaxis(a, stacked, last)
    return a.reshape(*a.shape[: last[0]], math.prod(a.shape[last[0] :]))


def _b_of_sum(b: Any, stacked: list[int], rank: int) -> Any:
    """Return B with these stacked axes made part of the rank, which comes after all of them."""
    first = rank - len(stacked)
    b = jnp.moveaxis(b, stacked, tuple(range(first, rank)))
    return b.reshape(*b.shape[:first], math.prod(b.shape[first : rank + 1]), *b.shape[rank + 1 :])


def sum_of(call: Call, left: Any, right: Any) -> LoraWeight:
    """Return the weight that an equation makes as a sum of weights, or of one and an array."""
    base = call.plain(base_of(left), base_of(right))
    weights = [one for one in (left, right) if isinstance(one, LoraWeight)]
    for weight in weights:
        _refuse_extras(weight)
    if len(weights) == 2:
        return weight_moves.add(weights, base)
    place = 1 if isinstance(left, LoraWeight) else 0
    if not call.record.alone(call.eqn.invars[place]):
        raise Unsupported("the data is added to it")
    return replace(weights[0], base=base)


def _negated(weight: Any) -> Any:
    """Return what ``−W`` adds to a sum whose base is formed by itself."""
    if not isinstance(weight, LoraWeight) or weight.planning:
        return weight
    return replace(weight, b=-weight.b)


def _refuse_extras(weight: LoraWeight) -> None:
    if weight.gain is not None:
        raise Unsupported("DoRA scales the weight, and something is added to it")
    if weight.bias is not None:
        raise Unsupported("lora_bias has no rule for a sum of weights")
