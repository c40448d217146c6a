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
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float, Inexact

from . import paths
from . import token_indices as indices
from .errors import AdapterError, raise_all
from .serialization import register, tell_flax

T = TypeVar("T")

STACKED, IN, OUT = "s", "i", "o"


def is_number(scale: Any) -> bool:
    """Tell a scale that is static from one that is an array, and so a leaf.

    >>> is_number(2.0), is_number(None), is_number(np.ones(()))
    (True, True, False)
    """
    return scale is None or isinstance(scale, int | float)


def pytree(cls: type[T]) -> type[T]:
    """Register a dataclass whose array fields are checked when users make one, not when JAX does.

    Transformations put shapes, axes numbers and flags in the leaves' places. A field is static
    whose metadata say ``static=True``, or ``static=f`` with an ``f`` that is true of its value.
    """
    static = {f.name: f.metadata.get("static", False) for f in fields(cls)}  # pyright: ignore

    def is_static(tree: T, name: str) -> bool:
        rule = static[name]
        return bool(rule(getattr(tree, name)) if callable(rule) else rule)

    def flatten(tree: T) -> tuple[list[Any], tuple[Any, ...]]:
        # Kept with the tree, as every call of a compiled function asks for it. What JAX put in a
        # leaf's place stays a leaf, a number too.
        aux = vars(tree).get("_aux")
        if aux is None:
            arrays = tuple(name for name in static if not is_static(tree, name))
            rest = tuple((name, getattr(tree, name)) for name in static if name not in arrays)
            aux = arrays, rest
            object.__setattr__(tree, "_aux", aux)
        values = vars(tree)
        return [values[name] for name in aux[0]], aux

    def flatten_with_keys(tree: T) -> tuple[list[Any], tuple[Any, ...]]:
        leaves, aux = flatten(tree)
        return [*zip(map(jax.tree_util.GetAttrKey, aux[0]), leaves, strict=True)], aux

    def unflatten(aux: tuple[Any, ...], leaves: Iterable[Any]) -> T:
        arrays, rest = aux
        tree = object.__new__(cls)
        # At once, as the class is frozen.
        vars(tree).update(zip(arrays, leaves, strict=True), _aux=aux)
        vars(tree).update(rest)
        return tree

    def getstate(tree: T) -> dict[str, Any]:
        return {name: value for name, value in vars(tree).items() if name != "_aux"}

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    # What another version keeps beside the fields may differ.
    cls.__getstate__ = getstate  # pyright: ignore[reportAttributeAccessIssue]
    return cls


@register
@pytree
@dataclass(frozen=True)
class Adapter:
    """The trained pair of one weight, ``ΔW = scale · A · B``.

    With a magnitude m it is DoRA's (arXiv 2402.09353): the weight becomes
    ``m · (W + ΔW) / ‖W + ΔW‖``, the norm over the in axes and without a gradient.

    With a bias b (PEFT's ``lora_bias``) every product with the weight gets ``scale · b``, too.

    A and B are leaves. So is a scale that is an array: it gets no gradient, but an optimizer's
    weight decay would move it, so it has no place in a tree that is trained (see ``stack``).

    Args:
        a: A, shape ``(*stacked, *in, r)``, in the order in which the weight has these axes.
        b: B, shape ``(*stacked, r, *out)``.
        scale: ``alpha / r`` or what the configuration makes of them: a number, which is static,
            or a scalar array; ``None`` where it is kept apart, as ``stack`` does.
        axes: one letter for each axis of the weight, see the legend of this module.
        dropout: probability of dropping an input of the low-rank path, where a key is given.
        materialize: whether ``W + scale·A·B`` may be formed where a use of W has no rule.
        columns: the range of the weight's first ``o`` axis that B covers; None for all of it.
        magnitude: DoRA's m, shape ``(*stacked, *out)``; None without it.
        bias: b, shape ``(*stacked, *out)``; None without it.
        masked: whether it acts only where ``lora(fn)(..., active=mask)`` says, as an aLoRA does.
    """

    a: Inexact[Array, "*stacked_in r"]
    b: Inexact[Array, "*stacked_r_out"]
    scale: int | float | Float[Array | np.ndarray, "*mapped"] | None = field(
        metadata=dict(static=is_number)
    )
    axes: str = field(default="io", metadata=dict(static=True))
    dropout: int | float = field(default=0.0, metadata=dict(static=True))
    materialize: bool = field(default=False, metadata=dict(static=True))
    columns: tuple[int, int] | None = field(default=None, metadata=dict(static=True))
    magnitude: Float[Array, "*stacked_out"] | None = field(
        default=None, metadata=dict(static=lambda magnitude: magnitude is None)
    )
    bias: Float[Array, "*stacked_out"] | None = field(
        default=None, metadata=dict(static=lambda bias: bias is None)
    )
    masked: bool = field(default=False, metadata=dict(static=True))

    def __post_init__(self) -> None:
        tell_flax()


@register
@pytree
@dataclass(frozen=True)
class Full:
    """A leaf trained in full, not by a low-rank pair: PEFT's ``modules_to_save`` and ``bias``.

    Args:
        value: what takes the place of the frozen leaf, same shape.
    """

    value: Inexact[Array, "..."]

    def __post_init__(self) -> None:
        tell_flax()


@register
@pytree
@dataclass(frozen=True)
class Rows:
    """Some rows of a leaf, trained as they are: PEFT's ``trainable_token_indices``.

    The weight becomes W with ``values`` in the rows ``indices``. ``merge`` puts them in exactly;
    in the function they act as ``W + P·(values − W[indices])``, P one column for each row with a
    single 1, so that a row is off by the rounding of that sum: ``u·(|v| + |v − W|)``.

    Args:
        values: the rows, shape ``(n, *rest)``, the other axes in the order of the weight.
        indices: which rows, each once, in the order of ``values``.
        axes: one letter for each axis of the weight, see the legend of this module.
        axis: the axis of the weight that the indices count along.
    """

    values: Inexact[Array, "..."]
    indices: tuple[int, ...] = field(metadata=dict(static=True))
    axes: str = field(default="io", metadata=dict(static=True))
    axis: int = field(default=0, metadata=dict(static=True))

    def __post_init__(self) -> None:
        tell_flax()


Entry = Adapter | Full | Rows
Adapters = Mapping[str, Entry]


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


def magnitude_shape(shape: tuple[int, ...], axes: str) -> tuple[int, ...]:
    """Return the shape of DoRA's magnitude, and of a bias, for a weight of this shape.

    >>> magnitude_shape((6, 384, 12, 32), "sioo")
    (6, 12, 32)
    """
    return pick(shape, axes, STACKED) + pick(shape, axes, OUT)


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


def rows_shape(shape: tuple[int, ...], axis: int, n: int) -> tuple[int, ...]:
    """Return the shape of n rows along an axis of a weight of this shape.

    >>> rows_shape((50257, 768), 0, 3)
    (3, 768)
    """
    return (n, *shape[:axis], *shape[axis + 1 :])


def count(adapters: Adapters) -> int:
    """Return the number of trained values."""
    trained = [
        leaf
        for entry in adapters.values()
        for leaf in jax.tree.leaves(
            replace(entry, scale=1.0) if isinstance(entry, Adapter) else entry
        )
    ]
    return sum(math.prod(leaf.shape) for leaf in trained)


def check_fit(params: Any, adapters: Adapters) -> None:
    """Raise unless every adapter belongs to a leaf of ``params`` and fits its shape.

    Raises:
        AdapterError: lists every path that is unknown and every shape that does not fit.
    """
    leaves = paths.flatten(params)
    problems = []
    parted = {paths.parameter_of(name) for name in adapters if name != paths.parameter_of(name)}
    for name, adapter in adapters.items():
        path = paths.parameter_of(name)
        if isinstance(adapter, Rows) and path in parted:
            problems.append(f"{path}: got rows beside adapters of its columns, wanted one of them")
        if path not in leaves:
            problems.append(f"{path}: no such parameter")
        else:
            problems += _misfits(name, adapter, tuple(leaves[path].shape))
            problems += _unreal(path, adapter, leaves[path])
    raise_all(AdapterError, "these adapters do not fit the parameters", problems)


def _misfits(path: str, adapter: Entry, shape: tuple[int, ...]) -> list[str]:
    if isinstance(adapter, Full):
        got = tuple(adapter.value.shape)
        return [] if got == shape else [f"{path}: got {got}, wanted {shape}"]
    if isinstance(adapter, Rows):
        return _misfitting_rows(path, adapter, shape)
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
    if adapter.magnitude is not None:
        wanted["magnitude"] = magnitude_shape(shape, adapter.axes)
        got["magnitude"] = tuple(adapter.magnitude.shape)
    if adapter.bias is not None:
        wanted["bias"] = magnitude_shape(shape, adapter.axes)
        got["bias"] = tuple(adapter.bias.shape)
    problems = [f"{path}: {k} got {got[k]}, wanted {wanted[k]}" for k in got if got[k] != wanted[k]]
    if adapter.bias is not None and (adapter.columns or adapter.magnitude is not None):
        beside = "columns" if adapter.columns else "a magnitude"
        problems.append(f"{path}: got a bias beside {beside}, wanted one of the two")
    if adapter.scale is None:
        problems.append(f"{path}: got no scale, put it in with rescale(adapters, scales)")
    elif np.ndim(adapter.scale):
        shape = np.shape(adapter.scale)
        problems.append(f"{path}: scale got {shape}, wanted (); map over many with jax.vmap")
    return problems


def _unreal(path: str, adapter: Entry, leaf: Any) -> list[str]:
    """Return that a complex change would lose its imaginary part in a real weight."""
    value = adapter.a if isinstance(adapter, Adapter) else jax.tree.leaves(adapter)[0]
    if not np.iscomplexobj(value) or np.iscomplexobj(leaf):
        return []
    return [f"{path}: got {value.dtype} values, wanted real ones for {leaf.dtype}"]


def _misfitting_rows(path: str, rows: Rows, shape: tuple[int, ...]) -> list[str]:
    letters = set(rows.axes)
    if len(rows.axes) != len(shape) or letters != {IN, OUT} or not 0 <= rows.axis < len(shape):
        return [
            f"{path}: got axes {rows.axes!r} and rows along axis {rows.axis}, wanted an 'i' or "
            f"'o' for each of {shape}, both among them"
        ]
    if rows.axes.count(rows.axes[rows.axis]) > 1:
        return [f"{path}: got rows along one of the axes {rows.axes!r}, wanted no other like it"]
    wrong = indices.problems(rows.indices, shape[rows.axis])
    got, wanted = tuple(rows.values.shape), rows_shape(shape, rows.axis, len(rows.indices))
    problems = [f"{path}: rows: {problem}" for problem in wrong]
    return problems + ([f"{path}: rows got {got}, wanted {wanted}"] if got != wanted else [])
