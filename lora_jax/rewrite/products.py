"""Rules for products: the sites, where a weight meets the data."""

from __future__ import annotations

from typing import Any

from .. import lowrank
from .interpret import Call, base_of
from .registry import Unsupported, rule
from .weight import LoraWeight, adapter_at


@rule("dot_general")
def dot_general(call: Call, lhs: Any, rhs: Any) -> Any:
    """``x·W + s·(x·A)·B``, the axes read from ``dimension_numbers``, W on either side."""
    if isinstance(lhs, LoraWeight) and isinstance(rhs, LoraWeight):
        if not lhs.planning:
            raise Unsupported("two adapted weights are multiplied with each other")
        # While planning every matrix is followed, and either may be the data of the other.
        dot_general(call, lhs, rhs.base)
        return dot_general(call, lhs.base, rhs)
    weight_first = isinstance(lhs, LoraWeight)
    weight, x = (lhs, rhs) if weight_first else (rhs, lhs)
    contract, batch = call.params["dimension_numbers"]
    if weight_first:
        contract, batch = contract[::-1], batch[::-1]
    call.site(weight, contract[1], batch[1])
    y = call.plain(base_of(lhs), base_of(rhs))
    if weight.planning:
        return y
    adapter = adapter_at(weight, contract[1], batch[1])
    key = call.dropout_key(weight)
    if key is not None:
        x, adapter = lowrank.drop(x, adapter, key)
    addend = lowrank.dot(
        x,
        adapter,
        contract,
        batch,
        weight_first=weight_first,
        precision=call.params["precision"],
    )
    return lowrank.add(y, addend)
