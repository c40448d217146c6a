"""Sites, where weights are used, and the parts of a weight that are used as they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.adapter import IN, OUT, STACKED, pick
from ..core.xla.product_layout import Size
from .registry import Unsupported
from .weight import LoraWeight, dense, use


@dataclass(frozen=True)
class Site:
    """One use of a parameter by one primitive.

    Args:
        primitive: the primitive's name.
        letters: the letter that this use gives each axis of the parameter.
        dense_gradient: whether an author's derivative around it forms the full ``dW``.
        window: the parameter's axes that slide over the input.
        rows: how many vectors the weight meets here, in all steps of the loops around it.
        groups: how many groups of channels a convolution keeps apart.
        whole: whether all of the parameter's in axes, and nothing else, are summed over here.
        work: the multiplications for one vector: with the weight, and for each of the ranks with
            A and with B. Inside of shards and of a slice they are those of the part.
    """

    primitive: str
    letters: str
    dense_gradient: bool = False
    window: frozenset[int] = frozenset()
    rows: Size = 0
    groups: int = 1
    whole: bool = True
    work: tuple[Size, Size, Size] = (0, 0, 0)


Place = tuple[int, ...]
"""Where an equation stands: its number in its jaxpr, after those of the calls around it."""

LOOKUP = "gather"
"""The name of a site at which rows are looked up."""


def work(
    weight: LoraWeight, letters: str, contracted: Sequence[int], batch: Sequence[int], leaf: int
) -> tuple[Size, Size, Size]:
    """Return a site's ``work`` for one of a weight's parameters, which has these letters there.

    Where stacked axes are kept, x meets every A of the stack; where they are summed over, every B.
    """
    if len(weight.leaves) > 1:
        shape = weight.leaves[leaf].shape
        summed, kept = (math.prod(pick(shape, letters, letter)) for letter in (IN, OUT))
        return summed * kept, summed, kept
    stacked = {(leaf, n) for n, letter in enumerate(letters) if letter == STACKED}

    def size(axes: Iterable[int], *, stacks: bool = False) -> Size:
        sizes = ((weight.base.shape[n], weight.origin[n]) for n in axes)
        return math.prod(n for n, labels in sizes if not stacks or labels & stacked)

    free = [n for n in range(len(weight.origin)) if n not in (*contracted, *batch)]
    summed, kept = size(contracted), size(free)
    return summed * kept, summed * size(free, stacks=True), kept * size(contracted, stacks=True)


def bias_problem(primitive: str, swapped: bool, whole: bool) -> str:
    """Return why ``lora_bias`` has no rule for a use, empty where it has one.

    Args:
        primitive: that uses the weight.
        swapped: whether in and out are exchanged in comparison with the adapter.
        whole: as ``Site`` has it.
    """
    if primitive == LOOKUP:
        return "lora_bias has no rule for rows that are looked up"
    if swapped:
        return "lora_bias has no rule for a weight that is used the other way round"
    return "" if whole else "lora_bias would be added for each part of what is summed over"


def formed(record: Any, value: Any, place: Place = ()) -> Any:
    """Return the value of a weight where it may be formed, anything else as it is.

    That is of rows that the data has chosen, and of all of ``W + s·A·B`` where the plan says so.

    Args:
        record: of the interpretation.
        value: any operand.
        place: where it is used as it is.
    """
    if not isinstance(value, LoraWeight) or value.bias is not None:  # no weight holds it
        return value
    if (axis := row_axis(value)) is not None:
        return _looked_up(record, value, axis, place)
    if not all(leaf.materialize for leaf in value.leaves):
        return value
    record.formed.update(value.paths)
    return dense(value)


def row_axis(weight: LoraWeight) -> int | None:
    """Return the axis of a matrix of which the data has chosen an index or a range, or None."""
    one_matrix = [leaf.ndim for leaf in weight.leaves] == [2]
    if not one_matrix or weight.base.ndim != 2:
        return None
    found = [n for n, labels in enumerate(weight.origin) if labels and labels <= weight.chosen]
    return found[0] if len(found) == 1 else None


def _looked_up(record: Any, weight: LoraWeight, axis: int, place: Place) -> Any:
    """Return ``W[i] + s·A[i]·B`` as an array, of the row or the rows i."""
    (leaf,) = weight.leaves
    try:
        letters = use(weight, [axis])[leaf.path]
    except Unsupported:
        return weight
    if leaf.masked and not weight.planning:  # an aLoRA, which has a rule for products alone
        return weight
    rows, kept = record.times * weight.base.shape[axis], weight.base.shape[1 - axis]
    site = Site(LOOKUP, letters, rows=rows, work=(0, 0, kept))
    record.sites.setdefault(leaf.path, {})[place] = site
    return weight.base if weight.planning else dense(weight)
