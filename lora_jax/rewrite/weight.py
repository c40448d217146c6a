"""``LoraWeight``: an adapted parameter on its way through the traced function.

It stands in for the parameter's array and carries A and B beside it. Structure (a transpose, a
reshape, one step of a scan) changes all three alike, so that a site finds A and B in the axis
order in which it reads the weight, and nothing weight-sized is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jax import lax

from .. import lowrank
from ..adapter import IN, OUT, STACKED, Adapter, a_shape, b_shape, is_number, pytree
from .registry import Unsupported

UNIT = "1"  # a size-1 axis that a reshape added: it belongs to no axis of the parameter
_SWAP = str.maketrans(IN + OUT, OUT + IN)


@dataclass(frozen=True)
class Leaf:
    """The parameter behind a ``LoraWeight``.

    Args:
        path: where it is in the parameters.
        ndim: how many axes it has there.
        letters: the adapter's ``axes``; None while planning, when they are being found out.
        dropout: the adapter's dropout rate.
    """

    path: str
    ndim: int
    letters: str | None = None
    dropout: float | int = 0.0


@pytree
@dataclass(frozen=True)
class LoraWeight:
    """A parameter as the traced function sees it at one point, and its A and B.

    Args:
        base: the frozen array, as the function has reshaped it so far.
        a: A in the same axis order, ``(*stacked, *in, r)``; None while planning.
        b: B likewise, ``(*stacked, r, *out)``.
        origin: for each axis of ``base``, the axes of the parameter it came from.
        looped: the parameter's axes that a scan has consumed.
        leaf: the parameter.
        scale: the adapter's scale.
    """

    base: Any
    a: Any
    b: Any
    origin: tuple[frozenset[int], ...] = field(metadata=dict(static=True))
    looped: frozenset[int] = field(metadata=dict(static=True))
    leaf: Leaf = field(metadata=dict(static=True))
    scale: Any = field(default=1.0, metadata=dict(static=is_number))

    @property
    def planning(self) -> bool:
        """Whether axes are still being found out, so that there is no A and B yet."""
        return self.leaf.letters is None

    @property
    def letters(self) -> str:
        """The adapter's letter for each axis of ``base``."""
        assert self.leaf.letters is not None
        return "".join(self.leaf.letters[min(axes)] if axes else UNIT for axes in self.origin)


def enter(path: str, base: Any, adapter: Adapter | None = None) -> LoraWeight:
    """Return the ``LoraWeight`` for a parameter; without an adapter, one for planning."""
    origin = tuple(frozenset({axis}) for axis in range(base.ndim))
    if adapter is None:
        return LoraWeight(base, None, None, origin, frozenset(), Leaf(path, base.ndim))
    leaf = Leaf(path, base.ndim, adapter.axes, adapter.dropout)
    return LoraWeight(base, adapter.a, adapter.b, origin, frozenset(), leaf, adapter.scale)


def transpose(weight: LoraWeight, permutation: Sequence[int]) -> LoraWeight:
    """Return the weight with its axes permuted, A and B with theirs."""
    base = lax.transpose(weight.base, permutation)
    origin = tuple(weight.origin[axis] for axis in permutation)
    moved = replace(weight, base=base, origin=origin)
    if weight.planning:
        return moved

    def follow(factor: Any, letter: str, rank_axis: int) -> Any:
        old = lowrank.positions(weight.letters, letter) | {-1: rank_axis}
        new = lowrank.positions(moved.letters, letter) | {-1: rank_axis}
        source = dict(enumerate(permutation)) | {-1: -1}
        order = sorted(new, key=lambda axis: new[axis])
        return lax.transpose(factor, [old[source[axis]] for axis in order])

    return replace(
        moved,
        a=follow(weight.a, IN, weight.a.ndim - 1),
        b=follow(weight.b, OUT, weight.letters.count(STACKED)),
    )


def reshape(weight: LoraWeight, shape: Sequence[int]) -> LoraWeight:
    """Return the weight with whole axes split, merged, or size-1 axes added or dropped.

    Raises:
        Unsupported: an axis of A and an axis of B would merge, or a parameter's own axis of
            size 1 would vanish.
    """
    shape = tuple(shape)
    origin: list[frozenset[int]] = []
    for old, new in _blocks(weight.base.shape, shape):
        labels = frozenset().union(*(weight.origin[axis] for axis in old))
        if not new and labels:
            raise Unsupported(f"the reshape drops axis {sorted(labels)}, which has size 1")
        if not weight.planning and len({weight.leaf.letters[n] for n in labels}) > 1:  # pyright: ignore
            raise Unsupported(f"the reshape merges axes {sorted(labels)} of A and of B")
        origin += [labels] * len(new)
    moved = replace(weight, base=lax.reshape(weight.base, shape), origin=tuple(origin))
    return moved if weight.planning else _with_factors(moved, moved.letters)


def cast(weight: LoraWeight, dtype: Any) -> LoraWeight:
    """Return the weight with its base in another dtype; A and B keep their own."""
    return replace(weight, base=weight.base.astype(dtype))


def split(weight: LoraWeight) -> tuple[Any, Any, Any]:
    """Return base, A and B for a scan over the weight's leading axis.

    Raises:
        Unsupported: that axis is not stacked in the adapter.
    """
    if not weight.planning and weight.letters[0] != STACKED:
        raise Unsupported("the scan runs over an axis that its adapter does not stack")
    return weight.base, weight.a, weight.b


def step(weight: LoraWeight, base: Any, a: Any, b: Any) -> LoraWeight:
    """Return what one step of a scan over the leading axis sees of the weight."""
    labels = weight.origin[0]
    return replace(
        weight, base=base, a=a, b=b, origin=weight.origin[1:], looped=weight.looped | labels
    )


def use(weight: LoraWeight, contracted: Sequence[int], batch: Sequence[int]) -> str:
    """Return the letters that a product with these axes gives the parameter.

    Raises:
        Unsupported: one axis would need two letters, nothing is summed or nothing kept, or the
            adapter was made for another use.
    """
    letters: dict[int, str] = dict.fromkeys(weight.looped, STACKED)
    for axis, labels in enumerate(weight.origin):
        letter = IN if axis in contracted else STACKED if axis in batch else OUT
        for label in labels:
            if letters.setdefault(label, letter) != letter:
                raise Unsupported(f"only a part of axis {label} is summed over")
    found = "".join(letters[label] for label in range(weight.leaf.ndim))
    if IN not in found or OUT not in found:
        raise Unsupported("no axis is summed over" if IN not in found else "no axis is kept")
    if not weight.planning and not same_use(found, weight.leaf.letters or ""):
        raise Unsupported(f"used with axes {found!r}, the adapter has {weight.leaf.letters!r}")
    return found


def same_use(first: str, second: str) -> bool:
    """Tell whether two uses fit one A and B: the same letters, or in and out exchanged.

    >>> same_use("sio", "soi"), same_use("sio", "iio")
    (True, False)
    """
    return first in (second, second.translate(_SWAP))


def adapter_at(weight: LoraWeight, contracted: Sequence[int], batch: Sequence[int]) -> Adapter:
    """Return the adapter for the weight as it stands, added size-1 axes taking their part."""
    summed = next(weight.letters[n] for n in contracted if weight.letters[n] != UNIT)

    def letter(axis: int) -> str:
        if weight.letters[axis] != UNIT:
            return weight.letters[axis]
        kept = summed.translate(_SWAP)
        return STACKED if axis in batch else summed if axis in contracted else kept

    letters = "".join(letter(axis) for axis in range(len(weight.origin)))
    whole = _with_factors(weight, letters)
    return Adapter(whole.a, whole.b, weight.scale, letters, weight.leaf.dropout)


def change(weight: LoraWeight, a: Any, b: Any) -> Any:
    """Return ``s·A·B`` in the shape of ``weight.base``, for these A and B."""
    letters = weight.letters.replace(UNIT, "")
    return lowrank.delta(Adapter(a, b, weight.scale, letters)).reshape(weight.base.shape)


def _with_factors(weight: LoraWeight, letters: str) -> LoraWeight:
    shape, r = weight.base.shape, weight.a.shape[-1]
    a, b = weight.a, weight.b
    return replace(
        weight,
        a=lax.reshape(a, a_shape(shape, letters, r)),
        b=lax.reshape(b, b_shape(shape, letters, r)),
    )


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair the shortest runs of old and new axes that hold the same elements, in row-major order.

    >>> _blocks((384, 12, 32), (384, 384)), _blocks((3, 4), (3, 1, 4))
    ([([0], [0]), ([1, 2], [1])], [([0], [0]), ([], [1]), ([1], [2])])
    """
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        k, m = i, j
        if i < len(old) and (j == len(new) or (old[i] == 1 and new[j] != 1)):
            k += 1
        elif j < len(new) and (i == len(old) or (new[j] == 1 and old[i] != 1)):
            m += 1
        else:
            k, m = i + 1, j + 1
            while math.prod(old[i:k]) != math.prod(new[j:m]):
                if math.prod(old[i:k]) < math.prod(new[j:m]):
                    k += 1
                else:
                    m += 1
        blocks.append((list(range(i, k)), list(range(j, m))))
        i, j = k, m
    return blocks
