"""What ``shard_map`` makes of a weight, and the rule for what joins its shards again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jax.sharding import PartitionSpec

from ...core import lowrank
from ...core.adapter import IN, OUT
from ...core.sharding import names_of
from .. import weight_moves
from ..interpret import Call
from ..registry import Unsupported, rule
from ..weight import Label, LoraWeight, with_parts


def local(weight: LoraWeight, arrays: Sequence[Any], spec: PartitionSpec) -> LoraWeight:
    """Return what the shards' function sees of a weight that is sharded so."""
    parts = {
        (label, name)
        for labels, entry in zip(weight.origin, spec, strict=False)
        for label in labels
        for name in names_of(entry)
    }
    return replace(with_parts(weight, arrays), shards=weight.shards | parts)


@rule("all_gather", "all_gather_invariant")
def all_gather(call: Call, weight: LoraWeight) -> LoraWeight:
    """Join the shards of W, and of A and B where they have the axis that is sharded."""
    names, axis = names_of(call.params["axis_name"]), call.params["all_gather_dimension"]
    parted = frozenset(label for label, name in weight.shards if name in names)
    rest = frozenset(pair for pair in weight.shards if pair[1] not in names)
    joined = _along if call.params["tiled"] else _stacked
    return replace(joined(call, weight, axis, parted), shards=rest)


def _along(call: Call, weight: LoraWeight, axis: int, parted: frozenset[Label]) -> LoraWeight:
    """Return the weight with the shards of an axis joined, as FSDP has them."""
    if not parted <= weight.origin[axis]:
        raise Unsupported("shards of one axis are joined along another")
    return weight_moves.cut(weight, lambda array, at, _: _gathered(call, array, at), [axis])


def _stacked(call: Call, weight: LoraWeight, axis: int, parted: frozenset[Label]) -> LoraWeight:
    """Return the weight with a new axis that counts the shards, a part of the one they are of."""
    around = [eqn.params.get("newly_manual_axes", ()) for eqn in call.record.calls]
    if not set(names_of(call.params["axis_name"])) <= {*frozenset().union(*around)}:
        raise Unsupported("it is not known which axis these are the shards of")
    origin = (*weight.origin[:axis], parted, *weight.origin[axis:])
    whole = replace(weight, base=_gathered(call, weight.base, axis), origin=origin)
    if weight.planning:
        return whole

    def follow(factor: Any, letter: str) -> Any:
        place = lowrank.positions(whole.letters, letter).get(axis)
        return factor if factor is None or place is None else _gathered(call, factor, place)

    thin = {name: follow(getattr(weight, name), OUT) for name in ("b", "gain", "bias")}
    return replace(whole, a=follow(weight.a, IN), **thin)


def _gathered(call: Call, array: Any, axis: int) -> Any:
    return call.eqn.primitive.bind(array, **{**call.params, "all_gather_dimension": axis})
