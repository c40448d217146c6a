"""How base, A and B move together: what the rules of ``structure`` call."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ..core import delta, lowrank
from ..core.adapter import IN, OUT, STACKED
from .registry import Unsupported
from .weight import STACK, Label, LoraWeight, factor_axes, mirror, turn, with_letters


def transpose(weight: LoraWeight, permutation: Sequence[int]) -> LoraWeight:
    """Return the weight with its axes permuted, A and B with theirs."""
    base = lax.transpose(weight.base, permutation)
    origin = tuple(weight.origin[axis] for axis in permutation)
    moved = replace(weight, base=base, origin=origin)
    if weight.planning:
        return moved

    def follow(factor: Any, letter: str, rank_axis: int) -> Any:
        old = factor_axes(weight, letter) | {-1: rank_axis}
        new = factor_axes(moved, letter) | {-1: rank_axis}
        source = dict(enumerate(permutation)) | {-1: -1}
        order = sorted(new, key=lambda axis: new[axis])
        return lax.transpose(factor, [old[source[axis]] for axis in order])

    rank_axis = weight.letters.count(STACKED)
    return replace(
        moved,
        a=follow(weight.a, IN, weight.a.ndim - 1),
        b=follow(weight.b, OUT, rank_axis),
        gain=None if weight.gain is None else follow(weight.gain, OUT, rank_axis),
        bias=None if weight.bias is None else follow(weight.bias, OUT, rank_axis),
    )


def reshape(weight: LoraWeight, shape: Sequence[int], base: Any = None) -> LoraWeight:
    """Return the weight with whole axes split, merged, or size-1 axes added or dropped.

    A size-1 axis that is dropped is one that an index or a slice has left over: the adapter
    stacks it. ``base`` is the frozen array where the author says how it is sharded then.

    Raises:
        Unsupported: an axis of A and an axis of B would merge, or a size-1 axis that the
            adapter does not stack would vanish.
    """
    shape = tuple(shape)
    origin: list[frozenset[Label]] = []
    blocks = _blocks(weight.base.shape, shape)
    weight = _repeats_as_own(weight, [old for old, _ in blocks])
    looped = weight.looped
    kept = frozenset().union(*(weight.origin[axis] for old, new in blocks if new for axis in old))
    for old, new in blocks:
        labels = frozenset().union(*(weight.origin[axis] for axis in old))
        # One index of a part of an axis, as of one head among (heads, head), leaves the rest.
        if not new and labels - kept:
            if labels <= weight.chosen and weight.leaves[0].ndim == 2:
                raise Unsupported("rows are looked up in a way that has no rule")
            if not weight.planning and weight.letter(labels) != STACKED:
                raise Unsupported("one index of an axis is taken that its adapter does not stack")
            looped |= labels
        if not weight.planning:
            weight.letter(labels)  # refuses an axis of A merged with one of B
        origin += [labels] * len(new)
    base = lax.reshape(weight.base, shape) if base is None else base
    moved = replace(weight, base=base, origin=tuple(origin), looped=looped)
    return moved if weight.planning else with_letters(moved, moved.letters)


def _repeats_as_own(weight: LoraWeight, blocks: Sequence[Sequence[int]]) -> LoraWeight:
    """Return the weight with the repetitions that merge with an axis as a part of that axis.

    ``jnp.repeat`` of a weight's heads is such: the factor that has the axis is repeated along it.
    """
    origin, sizes = list(weight.origin), weight.base.shape
    for block in blocks:
        labels = frozenset().union(*(weight.origin[axis] for axis in block))
        for axis in block:
            if labels and not origin[axis] and sizes[axis] > 1:
                origin[axis] = labels
    grown = replace(weight, origin=tuple(origin))
    if weight.planning or grown.origin == weight.origin:
        return grown
    return replace(with_letters(weight, grown.letters), origin=grown.origin)


def broadcast(
    weight: LoraWeight, shape: Sequence[int], axes: Sequence[int], base: Any = None
) -> LoraWeight:
    """Return the weight repeated along axes; ``axes`` are those that its own become.

    ``base`` is the frozen array where the author says how it is sharded then.
    """
    sizes = zip(axes, weight.base.shape, weight.origin, strict=True)
    grown = [n for n, (axis, size, own) in enumerate(sizes) if own and shape[axis] != size]
    weight = cut(weight, lambda array, at, n: jnp.repeat(array, shape[axes[n]], at), grown)
    own = dict(zip(axes, weight.origin, strict=True))
    origin = tuple(own.get(axis, frozenset()) for axis in range(len(shape)))
    base = lax.broadcast_in_dim(weight.base, shape, axes) if base is None else base
    return replace(weight, base=base, origin=origin)


def cut(
    weight: LoraWeight, take: Callable[[Any, int, int], Any], axes: Sequence[int]
) -> LoraWeight:
    """Return the weight with a part of some axes, or with them in another order.

    Args:
        weight: what is cut.
        take: ``take(array, at, axis)`` cuts the array's axis ``at`` as base's ``axis`` is cut.
        axes: the axes of base that change.
    """

    def act(array: Any, at: Mapping[int, int]) -> Any:
        for axis in axes:
            if axis in at:
                array = take(array, at[axis], axis)
        return array

    return mirror(weight, act)


def concatenate(parts: Sequence[Any], axis: int) -> LoraWeight:
    """Return one weight for several, and arrays among them, joined along an axis.

    Joined along an in or out axis, the ranks add up: ``[W₁ W₂] + [A₁ A₂]·diag(B₁, B₂)``. Joined
    along a stacked axis, the ranks are filled up with zeros.

    Raises:
        Unsupported: the parts give an axis different letters, or one of them is DoRA's or has a
            bias and the axis is an in axis.
    """
    weights = [part for part in parts if isinstance(part, LoraWeight)]
    base = lax.concatenate([_base(part) for part in parts], axis)
    if axis_is_new := not any(weight.origin[axis] for weight in weights):
        weights = [_stacked(weight, axis) for weight in weights]
    weights = alike(weights, base.dtype)
    joined = join_labels(weights)
    whole = replace(weights[0], base=base, **joined)
    if whole.planning:
        return whole
    weights, scale = _of_one_scale(weights)
    letter = weights[0].letters[axis]
    if axis_is_new:
        weights = [with_letters(w, w.letters) for w in weights]
    own = iter(weights)
    whole_parts = [next(own) if isinstance(part, LoraWeight) else part for part in parts]
    a = _join(whole_parts, weights, axis, IN, block=letter == IN)
    b = _join(whole_parts, weights, axis, OUT, block=letter == OUT)
    gain, bias = (_join_thin(whole_parts, weights[0], axis, name) for name in _ABSENT)
    return replace(whole, a=a, b=b, scale=scale, gain=gain, bias=bias)


def add(weights: Sequence[LoraWeight], base: Any) -> LoraWeight:
    """Return one weight for a sum of several: ``[A₁ A₂]·[B₁; B₂]``, with this base.

    Raises:
        Unsupported: they give an axis different letters.
    """
    weights = alike(list(weights), base.dtype)
    whole = replace(weights[0], base=base, **join_labels(weights))
    if whole.planning:
        return whole
    weights, scale = _of_one_scale(weights)
    rank = weights[0].letters.count(STACKED)
    a = lax.concatenate([weight.a for weight in weights], weights[0].a.ndim - 1)
    b = lax.concatenate([weight.b for weight in weights], rank)
    return replace(whole, a=a, b=b, scale=scale)


def _of_one_scale(weights: list[LoraWeight]) -> tuple[list[LoraWeight], Any]:
    """Return weights of the same letters with one scale, and that."""
    if len({weight.letters for weight in weights}) > 1:
        raise Unsupported(
            f"weights with the axes {sorted({w.letters for w in weights})} are joined"
        )
    scale = delta.common_scale(weights)
    if scale is None:
        return [replace(w, a=lowrank.scaled(w.a, w)) for w in weights], 1.0
    return weights, scale


def _base(part: Any) -> Any:
    return part.base if isinstance(part, LoraWeight) else part


def alike(weights: list[LoraWeight], dtype: DTypeLike) -> list[LoraWeight]:
    """Return the weights with A and B of one dtype: complex if one's are, else the widest."""
    if any(weight.turned for weight in weights):
        return [turn(weight, dtype) for weight in weights]
    if weights[0].planning or len({weight.a.dtype for weight in weights}) == 1:
        return weights
    wide = functools.reduce(lowrank.wider, (weight.a.dtype for weight in weights))
    return [replace(w, a=w.a.astype(wide), b=w.b.astype(wide)) for w in weights]


def _stacked(weight: LoraWeight, axis: int) -> LoraWeight:
    """Return the weight with an added axis as one that the adapter stacks."""
    if weight.base.shape[axis] != 1:
        raise Unsupported("a repeated weight is joined along the axis of its repetition")
    origin = list(weight.origin)
    origin[axis] = frozenset({STACK})
    return replace(weight, origin=tuple(origin))


def join_labels(weights: Sequence[LoraWeight]) -> dict[str, Any]:
    """Return leaves, origin, looped and shards of several weights as one."""
    leaves, origins, looped, shards = [], [], frozenset(), frozenset()
    for weight in weights:
        shift = len(leaves)

        def moved(labels: frozenset[Label], shift: int = shift) -> frozenset[Label]:
            return frozenset((n + shift, axis) if n >= 0 else STACK for n, axis in labels)

        leaves += weight.leaves
        looped |= moved(weight.looped)
        shards |= {(*moved(frozenset({label})), name) for label, name in weight.shards}
        origins.append([moved(labels) for labels in weight.origin])
    origin = tuple(frozenset().union(*column) for column in zip(*origins, strict=True))
    return dict(leaves=tuple(leaves), origin=origin, looped=looped, shards=shards)


def _join(
    parts: Sequence[Any], weights: Sequence[LoraWeight], axis: int, letter: str, *, block: bool
) -> Any:
    """Return A (``i``) or B (``o``) of the joined weight.

    ``block``: the factor has the joined axis, and each part's columns have a rank of their own.
    """
    like = weights[0]
    at = factor_axes(like, letter)
    factor_of = (lambda w: w.a) if letter == IN else (lambda w: w.b)
    rank_axis = factor_of(like).ndim - 1 if letter == IN else like.letters.count(STACKED)
    ranks = [weight.a.shape[-1] for weight in weights]
    stacked = like.letters[axis] == STACKED
    if axis not in at:  # the other factor has the axis: ranks stand side by side
        return lax.concatenate([factor_of(weight) for weight in weights], rank_axis)
    total = max(ranks) if stacked else sum(ranks)
    pieces, before, own = [], 0, iter(ranks)
    for part in parts:
        if isinstance(part, LoraWeight):
            factor, r = factor_of(part), next(own)
            start = 0 if stacked else before
            widths = [(0, 0)] * factor.ndim
            widths[rank_axis] = (start, total - start - r)
            pieces.append(jnp.pad(factor, widths))
            before += r
        else:
            shape = list(factor_of(like).shape)
            shape[rank_axis], shape[at[axis]] = total, part.shape[axis]
            pieces.append(jnp.zeros(shape, factor_of(like).dtype))
    assert block or stacked
    return lax.concatenate(pieces, at[axis])


# What a part that has no gain, or no bias, gives the joined weight.
_ABSENT = {"gain": 1.0, "bias": 0.0}


def _join_thin(parts: Sequence[Any], like: LoraWeight, axis: int, name: str) -> Any:
    """Return DoRA's gain, or the bias, of the joined weight; None where no part has one."""
    own = [getattr(part, name) if isinstance(part, LoraWeight) else None for part in parts]
    known = next((one for one in own if one is not None), None)
    if known is None:
        return None
    at = factor_axes(like, OUT)
    if axis not in at:
        whose = "weights of DoRA's" if name == "gain" else "weights with lora_bias"
        raise Unsupported(f"{whose} are joined along an axis that is summed over")

    def absent(part: Any) -> Any:
        shape = list(known.shape)
        shape[at[axis]] = _base(part).shape[axis]
        return jnp.full(shape, _ABSENT[name], known.dtype)

    pieces = [absent(p) if one is None else one for p, one in zip(parts, own, strict=True)]
    return lax.concatenate(pieces, at[axis])


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
