"""Weights that are one on one side and several on the other, and their adapters; pure functions.

A fused weight is its parts over the output axis: ``B = [B₁ … Bₙ]`` by rows of the file. Where the
parts share A, as those read from a fused file do, fused and parts are the same numbers, and both
ways are exact in bits. Otherwise ``[A₁ … Aₙ]`` and a block-diagonal B of rank Σr are the same
``ΔW``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...core import paths
from ...core.adapter import IN, OUT, STACKED, Adapter, Entry, Full, pick
from ...core.errors import AdapterError, raise_all
from ...rewrite import LeafPlan, Plan
from ..names.naming import Fused, Names, Place, places


@dataclass(frozen=True)
class Group:
    """A whole and its parts: the file's whole and JAX's parts, or the other way round.

    Args:
        name: the PyTorch module of the whole, or JAX's path.
        whole: JAX's whole; None where the file has it.
        parts: JAX's parts in order; empty where the file has them.
        names: the file's module of each part.
        rows: which outputs of the whole each part is.
        bias: whether it is trained in full and has one axis.
    """

    name: str
    whole: LeafPlan | None
    parts: tuple[LeafPlan, ...]
    names: tuple[str, ...]
    rows: tuple[np.ndarray, ...]
    bias: bool

    @property
    def leaves(self) -> tuple[LeafPlan, ...]:
        """JAX's side."""
        return (self.whole,) if self.whole else self.parts

    @property
    def size(self) -> int:
        """How many outputs the whole has."""
        return sum(map(len, self.rows))


def rows(sizes: Sequence[int], heads: int = 1) -> tuple[np.ndarray, ...]:
    """Return which rows of a fused weight each part is, where heads follow each other.

    >>> [part.tolist() for part in rows((2, 2, 2), heads=2)]
    [[0, 3], [1, 4], [2, 5]]
    """
    order = np.arange(sum(sizes)).reshape(heads, -1)
    ends = np.cumsum([size // heads for size in sizes])[:-1]
    return tuple(part.reshape(-1) for part in np.split(order, ends, axis=1))


def groups(plan: Plan, names: Names) -> tuple[Group, ...]:
    """Return every group of weights, or of biases, that has something to save.

    Raises:
        AdapterError: lists every group that lacks a part, whose parts do not fit each other, or
            whose heads are not known.
    """
    found: dict[tuple[str, bool], list[tuple[Place, LeafPlan]]] = {}
    split = []
    for leaf in plan.leaves:
        own = places(names, leaf.path)
        bias = paths.leaf_name(leaf.path) in paths.BIAS_NAMES
        if not own or own[0].fused is None or not (leaf.axes or bias):
            continue
        if own[0].jax_is_fused:
            split.append((leaf, own, bias))
        else:
            found.setdefault((own[0].name, bias), []).append((own[0], leaf))
    problems: list[str] = []
    made = [_split(plan, leaf, own, bias, problems) for leaf, own, bias in split]
    made += [_joined(plan, name, bias, own, problems) for (name, bias), own in found.items()]
    raise_all(AdapterError, "these fused weights do not fit their row of names", problems)
    return tuple(group for group in made if group is not None)


def _split(
    plan: Plan, leaf: LeafPlan, own: Sequence[Place], bias: bool, problems: list[str]
) -> Group | None:
    fused = own[0].fused
    assert fused is not None
    if not _is_held(plan, leaf):
        return None
    size, widths = math.prod(_outs(leaf)), fused.widths or (1,) * len(own)
    heads, unit = _heads(fused, [leaf]), sum(widths)
    if bad := _odd(leaf) or heads is None or size % (unit * heads):
        want = bad if isinstance(bad, str) else f"heads={heads} and widths {widths}"
        problems.append(f"{leaf.path}: got outputs {_outs(leaf)}, wanted them to fit {want}")
        return None
    sizes = [size // unit * width for width in widths]
    modules = tuple(place.name for place in own)
    return Group(leaf.path, leaf, (), modules, rows(sizes, heads or 1), bias)


def _joined(
    plan: Plan, name: str, bias: bool, own: list[tuple[Place, LeafPlan]], problems: list[str]
) -> Group | None:
    if not any(_is_held(plan, leaf) for _, leaf in own):
        return None
    by_part = {place.part: leaf for place, leaf in own}
    parts = tuple(leaf for _, leaf in sorted(by_part.items()))
    fused, count = own[0][0].fused, own[0][0].parts
    assert fused is not None
    sizes = [math.prod(_outs(leaf)) for leaf in parts]
    heads = _heads(fused, parts)
    wrong = [f"{leaf.path}: {odd}" for leaf in parts if (odd := _odd(leaf))]
    shapes = {leaf.path: _others(leaf) for leaf in parts}
    if len(parts) != count or len(own) != count:
        wrong = [f"{name}: got {', '.join(shapes)}, wanted {count} parts that the function uses"]
    elif len(set(shapes.values())) > 1:
        wrong += [f"{name}: got other axes than the output's of sizes {shapes}, wanted the same"]
    elif heads is None or any(size % heads for size in sizes):
        wrong += [f"{name}: got outputs {sizes}, wanted them to fit heads={heads}"]
    elif bias and paths.leaf_name(name) == paths.IN_PROJ:
        wrong += [f"{name}: its bias is trained in full, which PEFT does not know; freeze it"]
    elif bias and not all(_is_held(plan, leaf) for leaf in parts):
        wrong += [f"{name}: got biases trained in part, wanted all {count}, or none"]
    problems += wrong
    return None if wrong else Group(name, None, parts, (name,), rows(sizes, heads or 1), bias)


def _is_held(plan: Plan, leaf: LeafPlan) -> bool:
    return leaf.adapted or leaf.path in plan.full


def _outs(leaf: LeafPlan) -> tuple[int, ...]:
    return pick(leaf.shape, leaf.axes, OUT) if leaf.axes else leaf.shape


def _others(leaf: LeafPlan) -> tuple[Any, ...]:
    """Return the sizes that all parts share: those of the stack, and how many inputs."""
    if not leaf.axes:
        return ()
    return (*stack(leaf), math.prod(pick(leaf.shape, leaf.axes, IN)))


def stack(leaf: LeafPlan) -> tuple[int, ...]:
    """Return the sizes of a leaf's stacked axes."""
    return pick(leaf.shape, leaf.axes, STACKED) if leaf.axes else ()


def _odd(leaf: LeafPlan) -> str:
    """Return what a fused row cannot hold of a leaf."""
    if leaf.window or leaf.looked_up or leaf.columns is not None:
        return "a matrix, no convolution, embedding or range of columns"
    return "A and B, not modules_to_save" if leaf.axes and leaf.why.startswith("trained") else ""


def _heads(fused: Fused, leaves: Sequence[LeafPlan]) -> int | None:
    if fused.order == "blocks":
        return 1
    apart = [outs[0] for leaf in leaves if len(outs := _outs(leaf)) > 1]
    return fused.heads or (min(apart) if len(apart) == len(leaves) else None)


@dataclass(frozen=True)
class Flat:
    """An adapter with one in axis and one out axis, as the file has them, in numpy.

    Args:
        a: A, shape ``(*stacked, in, r)``.
        b: B, shape ``(*stacked, r, out)``.
        scale: as in ``Adapter``.
        dropout: likewise.
        magnitude: DoRA's m, shape ``(*stacked, out)``; None without it.
    """

    a: np.ndarray
    b: np.ndarray
    scale: Any
    dropout: int | float = 0.0
    magnitude: np.ndarray | None = None


def flat(adapter: Adapter, leaf: LeafPlan) -> Flat:
    """Return an adapter of a leaf with its in axes made one, and its out axes."""
    own, r, m = stack(leaf), adapter.a.shape[-1], adapter.magnitude
    return Flat(
        np.asarray(adapter.a).reshape(*own, -1, r),
        np.asarray(adapter.b).reshape(*own, r, -1),
        adapter.scale,
        adapter.dropout,
        None if m is None else np.asarray(m).reshape(*own, -1),
    )


def shaped(one: Flat, leaf: LeafPlan) -> Adapter:
    """Return the adapter with the axes of a leaf: ``flat``, undone."""
    m = one.magnitude
    return leaf.adapter(
        jnp.asarray(one.a.reshape(leaf.a_shape)),
        jnp.asarray(one.b.reshape(leaf.b_shape)),
        one.dropout,
        None if m is None else jnp.asarray(m.reshape(leaf.magnitude_shape)),
    )


def split(whole: Flat, rows: Sequence[np.ndarray]) -> list[Flat]:
    """Return the parts of a flat adapter: A for each, and its rows of B.

    >>> whole = Flat(np.ones((4, 1)), np.arange(6.0).reshape(1, 6), 1.0)
    >>> [part.b.tolist() for part in split(whole, [np.array([0, 3]), np.array([1, 2, 4, 5])])]
    [[[0.0, 3.0]], [[1.0, 2.0, 4.0, 5.0]]]
    """
    m = whole.magnitude
    return [
        replace(whole, b=whole.b[..., own], magnitude=None if m is None else m[..., own])
        for own in rows
    ]


def join(parts: Sequence[Flat | None], rows: Sequence[np.ndarray], scale: Any) -> Flat:
    """Return the flat adapter of this scale whose parts these are; None changes nothing.

    One A where all parts have the same one; otherwise ``[A₁ … Aₙ]`` and a block-diagonal B.

    >>> one = Flat(np.ones((4, 1)), np.ones((1, 2)), 1.0)
    >>> two = Flat(np.zeros((4, 2)), np.ones((2, 1)), 3.0)
    >>> whole = join([one, two], [np.array([0, 2]), np.array([1])], 1.0)
    >>> whole.a.shape, whole.b.tolist()
    ((4, 3), [[1.0, 0.0, 1.0], [0.0, 3.0, 0.0], [0.0, 3.0, 0.0]])
    """
    own = [part for part in parts if part is not None]
    first, size = own[0], sum(map(len, rows))
    one_a = share_a([part.a for part in own])
    r = first.a.shape[-1] if one_a else sum(part.a.shape[-1] for part in own)
    layers = first.b.shape[:-2]
    dtype = np.result_type(*(part.b.dtype for part in own))
    b = np.zeros((*layers, r, size), dtype)
    m = None if first.magnitude is None else np.zeros((*layers, size), first.magnitude.dtype)
    start = 0
    for part, outputs in zip(parts, rows, strict=True):
        if part is None:
            continue
        k = part.a.shape[-1]
        own_b = part.b if part.scale == scale else part.b * dtype.type(part.scale / scale)
        b[..., start : start + k, :][..., outputs] = own_b
        if m is not None:
            m[..., outputs] = part.magnitude
        start += 0 if one_a else k
    a = first.a if one_a else np.concatenate([part.a for part in own], axis=-1)
    return replace(first, a=a, b=b, scale=scale, magnitude=m)


def share_a(many: Sequence[Any]) -> bool:
    """Tell whether all of these A are the same numbers."""
    return all(np.array_equal(one, many[0]) for one in many)


def flat_biases(values: Sequence[Any], group: Group) -> list[np.ndarray]:
    """Return the other side's biases of a group: one of the whole, or those of the parts."""
    flats = [np.asarray(value).reshape(-1) for value in values]
    if len(flats) == 1:
        return [flats[0][outputs] for outputs in group.rows]
    whole = np.zeros(group.size, flats[0].dtype)
    for value, outputs in zip(flats, group.rows, strict=True):
        whole[outputs] = value
    return [whole]


def restored(group: Group, own: Sequence[Any]) -> tuple[dict[str, Entry], list[str]]:
    """Return JAX's entries of a group from the file's, or what does not fit.

    Args:
        group: what they are.
        own: the file's entries in order; None for a part that the file leaves out.
    """
    if group.bias:
        values = flat_biases([one.value for one in own], group)
        return {
            leaf.path: Full(jnp.asarray(value.reshape(leaf.shape)))
            for leaf, value in zip(group.leaves, values, strict=True)
        }, []
    flats = [None if one is None else _file_flat(one) for one in own]
    if group.whole is None:
        assert flats[0] is not None
        parts = split(flats[0], group.rows)
        return {
            leaf.path: shaped(part, leaf) for leaf, part in zip(group.parts, parts, strict=True)
        }, []
    if None in flats and any(one.magnitude is not None for one in flats if one):
        return {}, [f"{group.name}: the file has DoRA of some parts, wanted all of them"]
    whole = join(flats, group.rows, group.whole.scale)
    if (r := whole.a.shape[-1]) != group.whole.r:
        return {}, [
            f"{group.name}: the file's parts make rank {r}, the plan has {group.whole.r}; plan "
            "with load_config(…, names=…)"
        ]
    return {group.name: shaped(whole, group.whole)}, []


def _file_flat(one: Adapter) -> Flat:
    m = one.magnitude
    m = None if m is None else np.asarray(m)
    return Flat(np.asarray(one.a), np.asarray(one.b), one.scale, one.dropout, m)


def fused_from(group: Group, entries: Mapping[str, Entry | None]) -> tuple[list[Flat], int] | str:
    """Return the file's adapters of a group and which of its leaves has their scale; or why not."""
    own = [entries[leaf.path] for leaf in group.leaves]
    flats = [
        flat(one, leaf) if isinstance(one, Adapter) else None
        for one, leaf in zip(own, group.leaves, strict=True)
    ]
    there = [n for n, one in enumerate(flats) if one is not None]
    first = next((n for n in there if (one := flats[n]) and one.scale), there[0])
    chosen = flats[first]
    assert chosen is not None
    if group.whole:
        return split(chosen, group.rows), first
    if chosen.magnitude is not None and len(there) < len(flats):
        return f"{group.name}: DoRA of some parts alone, wanted all parts, or none"
    return [join(flats, group.rows, chosen.scale)], first
