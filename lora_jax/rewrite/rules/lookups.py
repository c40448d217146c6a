"""``gather``: rows of an embedding, and the matrices of a stack, by indices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core import contractions, delta, lowrank
from ...core.adapter import OUT, STACKED
from ..interpret import Call
from ..registry import Unsupported, rule
from ..weight import LoraWeight, adapter_at, mirror


@rule("gather")
def gather(call: Call, weight: Any, indices: Any) -> Any:
    """``W[ids] + s·A[ids]·B`` for the rows of a matrix; of a stack of matrices, those at ids."""
    if not isinstance(weight, LoraWeight):
        raise Unsupported("the weight's values are used as indices")
    lookup = _lookup(call, weight.base.shape, indices)
    return (_rows if weight.base.ndim == 2 else _matrices)(call, weight, lookup)


def _rows(call: Call, weight: LoraWeight, lookup: _Lookup) -> Any:
    axis, *others = lookup.axes
    if others:
        raise Unsupported("other parts than whole rows are looked up")
    call.site(weight, [axis])
    y = lookup.of_base(weight.base)
    if weight.planning:
        return y
    call.refuse_masked(weight)
    adapter, batch = adapter_at(weight, [axis]), lookup.ids.ndim - 1

    def take(factor: Any, at: int) -> Any:
        found = lookup.of(factor, {axis: at})
        return jnp.moveaxis(found, batch + at, batch) if axis in lookup.kept else found

    addend = contractions.take(adapter, axis, take)
    # The author's result has its own places for the axes, the addend the kept one at the end.
    last = addend.ndim - 1
    sources = {
        place: last - (n == axis) for n, place in zip(lookup.kept, lookup.places, strict=True)
    }
    own = iter(range(batch))
    order = [sources[place] if place in sources else next(own) for place in range(y.ndim)]
    y = lowrank.add(y, lax.transpose(addend, order))
    if weight.gain is None:
        return y
    if (fill := call.params["fill_value"]) and not np.isnan(fill):
        raise Unsupported("DoRA would scale what stands for an index beyond the end")
    if adapter.axes[axis] == OUT:
        raise Unsupported("DoRA scales the axis that is looked up")
    place = lookup.places[lookup.kept.index(1 - axis)]
    return delta.gained(y, weight.gain, adapter.axes, {1 - axis: place})


def _matrices(call: Call, weight: LoraWeight, lookup: _Lookup) -> LoraWeight:
    """Return the weight that a stack's matrices at these indices are."""
    batch = lookup.ids.ndim - 1
    if lookup.places != tuple(range(batch, batch + len(lookup.kept))):
        raise Unsupported("the looked-up axis does not come first in the result")
    if not weight.planning and {weight.letters[axis] for axis in lookup.axes} != {STACKED}:
        raise Unsupported("an axis is looked up that its adapter does not stack")
    moved = replace(mirror(weight, lookup.of), base=lookup.of_base(weight.base))
    labels = frozenset().union(*(weight.origin[axis] for axis in lookup.axes))
    origin = (labels,) * batch + tuple(weight.origin[n] for n in lookup.kept)
    return replace(moved, origin=origin, looped=weight.looped | labels)


@dataclass(frozen=True)
class _Lookup:
    """A ``gather`` that takes indices, or ranges that begin there, of some axes of a weight.

    Args:
        call: the equation.
        indices: as it reads them.
        axes: the axes that are not taken whole.
        ids: where in these axes, ``(*batch, axis)``.
        kept: the weight's axes that the result has; one of ``axes`` among them is a range.
        places: where these are in the result.
    """

    call: Call
    indices: Any
    axes: tuple[int, ...]
    ids: Any
    kept: tuple[int, ...]
    places: tuple[int, ...]

    def of_base(self, base: Any) -> Any:
        """Look up as the author does."""
        return self.call.plain(base, self.indices)

    def of(self, array: Any, at: Mapping[int, int]) -> Any:
        """Look the same up in an array that has ``axes`` in the places ``at``: the ids come first.

        What the author puts in for an index beyond the end is the base's alone.
        """
        params, batch = self.call.params, self.ids.ndim - 1
        sizes = {at[axis]: params["slice_sizes"][axis] for axis in self.axes}
        collapsed = sorted(at[axis] for axis in self.axes if axis not in self.kept)
        # Without those that start at 0 the indices may be neither unique nor in order.
        same = self.ids.shape == self.indices.shape
        return lax.gather(
            array,
            self.ids,
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(batch, batch + array.ndim - len(collapsed))),
                collapsed_slice_dims=tuple(collapsed),
                start_index_map=tuple(at[axis] for axis in self.axes),
            ),
            slice_sizes=tuple(sizes.get(n, size) for n, size in enumerate(array.shape)),
            unique_indices=same and params["unique_indices"],
            indices_are_sorted=same and params["indices_are_sorted"],
            mode=params["mode"],
            fill_value=0,
        )


# Where an index beyond the end is moved inside, or is none: an axis taken whole starts at 0.
_INSIDE = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def _lookup(call: Call, shape: tuple[int, ...], indices: Any) -> _Lookup:
    """Return what a ``gather`` looks up."""
    numbers, sizes = call.params["dimension_numbers"], call.params["slice_sizes"]
    mapped, collapsed = map(int, numbers.start_index_map), numbers.collapsed_slice_dims
    mapped, collapsed = tuple(mapped), tuple(collapsed)
    axes = tuple(n for n in mapped if n in collapsed or sizes[n] != shape[n])
    cut = {n for n, size in enumerate(shape) if n in collapsed or sizes[n] != size}
    inside = call.params["mode"] in _INSIDE
    if numbers.operand_batching_dims or cut != {*axes} or not (axes and (inside or axes == mapped)):
        raise Unsupported("other parts than whole rows are looked up")
    ids = indices
    if axes != mapped:
        columns = [mapped.index(axis) for axis in axes]
        ids = jnp.concatenate([indices[..., n : n + 1] for n in columns], axis=-1)
    kept = tuple(n for n in range(len(shape)) if n not in collapsed)
    return _Lookup(call, indices, axes, ids, kept, tuple(map(int, numbers.offset_dims)))
