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
        raise Unsupported("two adapted weights are multiplied with each other")
    weight_first = isinstance(lhs, LoraWeight)
    weight, x = (lhs, rhs) if weight_first else (rhs, lhs)
    contract, batch = call.params["dimension_numbers"]
    if weight_first:
        contract, batch = contract[::-1], batch[::-1]
    call.site(weight, contract[1], batch[1])
    y = call.plain(base_of(lhs), base_of(rhs))
    if weight.planning:
        return y
    addend = lowrank.dot(
        x,
        adapter_at(weight, contract[1], batch[1]),
        contract,
        batch,
        weight_first=weight_first,
        precision=call.params["precision"],
    )
    return lowrank.add(y, addend)
