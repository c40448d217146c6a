"""The adapters: what LoRA trains, as a pytree that is an argument of every function.

Letters of ``axes``, one for each axis of the adapted weight:

====== ======================================================= =========== ===========
letter meaning                                                 axis of A   axis of B
====== ======================================================= =========== ===========
``s``  stacked: one low-rank pair for each index of the axis   yes         yes
``i``  in: the model sums over this axis                       yes         no
``o``  out: the model keeps this axis                          no          yes
====== ======================================================= =========== ===========

A Flax kernel is ``io``, a PyTorch weight ``oi``, layers stacked for ``scan`` are ``sio``,
DenseGeneral's query kernel ``(d, heads, head)`` is ``ioo``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import jax
from jaxtyping import Array, Float, Inexact

from . import paths
from .errors import AdapterError, raise_all

T = TypeVar("T")

STACKED, IN, OUT = "s", "i", "o"


def _pytree(cls: type[T]) -> type[T]:
    """Register a dataclass whose array fields are checked when users make one, not when JAX does.

    Transformations put shapes, axes numbers and flags in the leaves' places.
    """
    static = [f.name for f in fields(cls) if f.metadata.get("static")]  # pyright: ignore
    arrays = [f.name for f in fields(cls) if f.name not in static]  # pyright: ignore

    def flatten(tree: T) -> tuple[list[Any], tuple[Any, ...]]:
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in arrays]
        return keyed, tuple(getattr(tree, name) for name in static)

    def unflatten(aux: tuple[Any, ...], leaves: Iterable[Any]) -> T:
        tree = object.__new__(cls)
        for name, value in [*zip(arrays, leaves, strict=True), *zip(static, aux, strict=True)]:
            object.__setattr__(tree, name, value)
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


@_pytree
@dataclass(frozen=True)
class Adapter:
    """The trained pair of one weight, ``ΔW = scale · A · B``; only A and B are leaves.

    Args:
        a: A, shape ``(*stacked, *in, r)``, in the order in which the weight has these axes.
        b: B, shape ``(*stacked, r, *out)``.
        scale: ``alpha / r`` or what the configuration makes of them.
        axes: one letter for each axis of the weight, see the legend of this module.
        dropout: probability of dropping an input of the low-rank path, where a key is given.
        materialize: whether ``W + scale·A·B`` may be formed where a use of W has no rule.
        columns: the range of the weight's first ``o`` axis that B covers; None for all of it.
    """

    a: Float[Array, "*stacked_in r"]
    b: Float[Array, "*stacked_r_out"]
    scale: int | float = field(metadata=dict(static=True))
    axes: str = field(default="io", metadata=dict(static=True))
    dropout: int | float = field(default=0.0, metadata=dict(static=True))
    materialize: bool = field(default=False, metadata=dict(static=True))
    columns: tuple[int, int] | None = field(default=None, metadata=dict(static=True))


@_pytree
@dataclass(frozen=True)
class Full:
    """A leaf trained in full, not by a low-rank pair: PEFT's ``modules_to_save`` and ``bias``.

    Args:
        value: what takes the place of the frozen leaf, same shape.
    """

    value: Inexact[Array, "..."]


Adapters = Mapping[str, Adapter | Full]


def a_shape(shape: tuple[int, ...], axes: str, r: int) -> tuple[int, ...]:
    """Return A's shape for a weight of this shape.

    >>> a_shape((6, 384, 12, 32), "sioo", 8)
    (6, 384, 8)
    """
    return (*pick(shape, axes, STACKED), *pick(shape, axes, IN), r)


def b_shape(shape: tuple[int, ...], axes: str, r: int) -> tuple[int, ...]:
    """Return B's shape for a weight of this shape.

    >>> b_shape((6, 384, 12, 32), "sioo", 8)
    (6, 8, 12, 32)
    """
    return (*pick(shape, axes, STACKED), r, *pick(shape, axes, OUT))


def part_shape(
    shape: tuple[int, ...], axes: str, columns: tuple[int, int] | None
) -> tuple[int, ...]:
    """Return a weight's shape with only these columns of its first ``o`` axis.

    >>> part_shape((30, 96), "io", (32, 96))
    (30, 64)
    """
    if columns is None:
        return shape
    axis = axes.index(OUT)
    size = columns[1] - columns[0] if columns[1] <= shape[axis] else 0
    return (*shape[:axis], size, *shape[axis + 1 :])


def pick(shape: tuple[int, ...], axes: str, letter: str) -> tuple[int, ...]:
    """Return the sizes of the axes that carry this letter."""
    return tuple(size for size, axis in zip(shape, axes, strict=True) if axis == letter)


def rank(adapter: Adapter) -> int:
    """Return r, the size that A and B share."""
    return adapter.a.shape[-1]


def count(adapters: Adapters) -> int:
    """Return the number of trained values."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(dict(adapters)))


def check_fit(params: Any, adapters: Adapters) -> None:
    """Raise unless every adapter belongs to a leaf of ``params`` and fits its shape.

    Raises:
        AdapterError: lists every path that is unknown and every shape that does not fit.
    """
    leaves = paths.flatten(params)
    problems = []
    for name, adapter in adapters.items():
        path = paths.parameter_of(name)
        if path not in leaves:
            problems.append(f"{path}: no such parameter")
        else:
            problems += _misfits(name, adapter, tuple(leaves[path].shape))
    raise_all(AdapterError, "these adapters do not fit the parameters", problems)


def _misfits(path: str, adapter: Adapter | Full, shape: tuple[int, ...]) -> list[str]:
    if isinstance(adapter, Full):
        got = tuple(adapter.value.shape)
        return [] if got == shape else [f"{path}: got {got}, wanted {shape}"]
    if len(adapter.axes) != len(shape) or set(adapter.axes) - {STACKED, IN, OUT}:
        return [f"{path}: got axes {adapter.axes!r}, wanted a letter of 'sio' for each of {shape}"]
    shape = part_shape(shape, adapter.axes, adapter.columns)
    if min(shape, default=1) < 1 or path != paths.part_name(
        paths.parameter_of(path), adapter.columns
    ):
        return [f"{path}: got columns {adapter.columns}, which do not fit the name or the weight"]
    r = rank(adapter)
    wanted = {"A": a_shape(shape, adapter.axes, r), "B": b_shape(shape, adapter.axes, r)}
    got = {"A": tuple(adapter.a.shape), "B": tuple(adapter.b.shape)}
    return [f"{path}: {k} got {got[k]}, wanted {wanted[k]}" for k in got if got[k] != wanted[k]]
