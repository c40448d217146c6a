"""``checkpoint_name`` and ``device_put``: rules for what changes none of a weight's values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..interpret import Call, base_of
from ..registry import rule
from ..weight import LoraWeight


@rule("name")
def name(call: Call, weight: LoraWeight) -> LoraWeight:
    """Keep the base's name for the policies of ``jax.checkpoint``; A and B have none."""
    return replace(weight, base=call.plain(weight.base))


@rule("device_put")
def device_put(call: Call, *operands: Any) -> list[Any]:
    """Move the base, as from a host's memory to the device; A and B are where the user has them."""
    moved = call.plain(*map(base_of, operands))
    return [
        replace(old, base=new) if isinstance(old, LoraWeight) else new
        for old, new in zip(operands, moved, strict=True)
    ]
