"""``LoraWeight``: an adapted parameter on its way through the traced function.

It stands in for the parameter's array and carries A and B beside it. Structure (a transpose, a
slice, one step of a scan) changes all three alike, see ``weight_moves``, so that a site finds A and
B in the axis order in which it reads the weight, and nothing weight-sized is ever formed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from ..core import delta, lowrank, sharding
from ..core.adapter import IN, OUT, STACKED, Adapter, a_shape, b_shape, is_number, pick, pytree
from .registry import Unsupported

Label = tuple[int, int]
"""An axis of a parameter: the parameter's place among ``LoraWeight.leaves``, and the axis."""

STACK: Label = (-1, -1)
"""The axis that ``jnp.stack`` made of several parameters; it is stacked in the adapter."""

UNIT = "1"  # the letter of an axis that belongs to no axis of the parameter
_SWAP = {IN: OUT, OUT: IN}


@dataclass(frozen=True)
class Leaf:
    """A parameter behind a ``LoraWeight``.

    Args:
        path: where it is in the parameters.
        ndim: how many axes it has there.
        letters: the adapter's ``axes``; None while planning, when they are being found out.
        dropout: the adapter's dropout rate.
        materialize: whether ``W + s·A·B`` may be formed where a use has no rule.
        shape: its shape there.
        masked: whether the adapter acts on a part of the tokens only.
    """

    path: str
    ndim: int
    letters: str | None = None
    dropout: float | int = 0.0
    materialize: bool = False
    shape: tuple[int, ...] = ()
    masked: bool = False


@pytree
@dataclass(frozen=True)
class LoraWeight:
    """Parameters as the traced function sees them at one point, and their A and B.

    Mostly it is one parameter; a concatenation makes one of several.

    Args:
        base: the frozen array, as the function has changed its shape so far.
        a: A in the same axis order, ``(*stacked, *in, r)``; None while planning.
        b: B likewise, ``(*stacked, r, *out)``.
        origin: for each axis of ``base``, the axes of the parameters that it came from.
        looped: the parameters' axes that a scan or an index has consumed.
        leaves: the parameters.
        scale: the scale of ``A·B``.
        gain: DoRA's ``m / ‖W + s·A·B‖`` in the layout of B with r = 1; None without it.
        bias: the adapter's bias times the scale, in the same layout; None without it.
        turned: whether A and B are complex.
        chosen: the parameters' axes of which the data has chosen an index or a range.
        shards: inside ``shard_map``, the parameters' axes that are sharded along an axis of the
            mesh, each with the name of that.
    """

    base: Any
    a: Any
    b: Any
    origin: tuple[frozenset[Label], ...] = field(metadata=dict(static=True))
    looped: frozenset[Label] = field(metadata=dict(static=True))
    leaves: tuple[Leaf, ...] = field(metadata=dict(static=True))
    scale: Any = field(default=1.0, metadata=dict(static=is_number))
    gain: Any = None
    bias: Any = None
    turned: bool = field(default=False, metadata=dict(static=True))
    chosen: frozenset[Label] = field(default=frozenset(), metadata=dict(static=True))
    shards: frozenset[tuple[Label, str]] = field(default=frozenset(), metadata=dict(static=True))

    @property
    def planning(self) -> bool:
        """Whether axes are still being found out, so that there is no A and B yet."""
        return self.leaves[0].letters is None

    @functools.cached_property
    def letters(self) -> str:
        """The adapter's letter for each axis of ``base``."""
        return "".join(self.letter(axes) for axes in self.origin)

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters' paths, each once."""
        return tuple(dict.fromkeys(leaf.path for leaf in self.leaves))

    @property
    def dropout(self) -> float | int:
        """The dropout rate of the low-rank path.

        Raises:
            Unsupported: the parameters of a concatenation differ in it.
        """
        rates = {leaf.dropout for leaf in self.leaves}
        if len(rates) > 1:
            raise Unsupported(f"weights with the dropout rates {sorted(rates)} are concatenated")
        return rates.pop()

    @property
    def masked(self) -> bool:
        """Whether the low-rank path is that of a part of the tokens only.

        Raises:
            Unsupported: the parameters of a concatenation differ in it.
        """
        found = {leaf.masked for leaf in self.leaves}
        if len(found) > 1:
            raise Unsupported("weights are concatenated of which some have an aLoRA")
        return found.pop()

    def letter(self, labels: frozenset[Label]) -> str:
        """Return the adapter's letter for these axes of the parameters."""
        if not labels:
            return UNIT
        found = {STACKED if leaf < 0 else self.leaves[leaf].letters[n] for leaf, n in labels}  # pyright: ignore
        if len(found) > 1:
            raise Unsupported(f"axes with the letters {sorted(found)} become one")
        return found.pop()


def enter(path: str, base: Any, adapter: Adapter | None = None) -> LoraWeight:
    """Return the ``LoraWeight`` for a parameter; without an adapter, one for planning."""
    origin = tuple(frozenset({(0, axis)}) for axis in range(base.ndim))
    if adapter is None:
        leaf = Leaf(path, base.ndim, shape=tuple(base.shape))
        return LoraWeight(base, None, None, origin, frozenset(), (leaf,))
    leaf = Leaf(
        path,
        base.ndim,
        adapter.axes,
        adapter.dropout,
        adapter.materialize,
        tuple(base.shape),
        adapter.masked,
    )
    adapter, gain = sharding.whole(adapter, base), delta.gain(base, adapter)
    if gain is not None and sharding.is_explicit(kind := jax.typeof(gain).sharding):
        gain = sharding.along(gain, tuple(kind.spec)[: adapter.axes.count(STACKED)])
    bias = delta.scaled_bias(adapter)
    a, b, scale = adapter.a, adapter.b, adapter.scale
    turned = jnp.issubdtype(a.dtype, jnp.complexfloating)
    return LoraWeight(base, a, b, origin, frozenset(), (leaf,), scale, gain, bias, turned)


def turn(weight: LoraWeight, dtype: DTypeLike) -> LoraWeight:
    """Return the weight with A and B in a complex dtype that holds theirs, too."""
    if weight.planning:
        return replace(weight, turned=True)
    wide = lowrank.wider(weight.a.dtype, dtype)
    return replace(weight, a=weight.a.astype(wide), b=weight.b.astype(wide), turned=True)


def use(
    weight: LoraWeight,
    contracted: Sequence[int],
    batch: Sequence[int] = (),
    window: Sequence[int] = (),
    stacks: bool = False,
) -> dict[str, str]:
    """Return the letters that a product with these axes gives each parameter, by path.

    Args:
        weight: what is used.
        contracted: the axes of ``base`` that the product sums over.
        batch: those that it runs over in step with the input.
        window: those among ``contracted`` that slide over the input, as a convolution's do.
        stacks: whether axes that the adapter stacks may be summed over or kept, too.

    Raises:
        Unsupported: one axis would need two letters, nothing is summed or nothing kept, or the
            adapter was made for another use.
    """
    letters: dict[Label, str] = dict.fromkeys(weight.looped, STACKED)
    for axis, labels in enumerate(weight.origin):
        letter = IN if axis in contracted else STACKED if axis in batch else OUT
        for label in labels:
            if stacks and label in weight.looped:
                continue  # several indices of it were taken, which may be kept or summed over
            if letters.setdefault(label, letter) != letter:
                if label == STACK:
                    raise Unsupported("stacked weights are used as one matrix")
                raise Unsupported(f"only a part of axis {label[1]} is summed over")
    if letters.get(STACK, STACKED) != STACKED:
        raise Unsupported("stacked weights are used as one matrix")
    found = {}
    for n, leaf in enumerate(weight.leaves):
        one = "".join(letters[n, axis] for axis in range(leaf.ndim))
        if IN not in one or OUT not in one:
            raise Unsupported("no axis is summed over" if IN not in one else "no axis is kept")
        slides, used = window_axes(weight, window, n), one
        if leaf.letters is not None and stacks:
            pairs = zip(one, leaf.letters, strict=True)
            one = "".join(own if own == STACKED else letter for letter, own in pairs)
        if leaf.letters is not None and not same_use(one, leaf.letters, slides):
            raise Unsupported(f"used with axes {used!r}, the adapter has {leaf.letters!r}")
        if not same_use(found.setdefault(leaf.path, one), one, slides):
            raise Unsupported(f"used with axes {one!r} and with axes {found[leaf.path]!r}")
    return found


def is_whole(weight: LoraWeight, contracted: Sequence[int], letters: Mapping[str, str]) -> bool:
    """Tell whether a product sums over all of the parameters' in axes, and over nothing else.

    One over a part of them, as a shard or a slice has it, is not yet what the module returns.

    Args:
        weight: what is used.
        contracted: the axes of ``base`` that the product sums over.
        letters: what ``use`` found for this product.
    """
    summed = math.prod(weight.base.shape[axis] for axis in contracted)
    return all(
        math.prod(pick(leaf.shape, letters[leaf.path], IN)) == summed for leaf in weight.leaves
    )


def window_axes(weight: LoraWeight, window: Sequence[int], leaf: int = 0) -> frozenset[int]:
    """Return the axes of one parameter that the axes ``window`` of ``base`` came from."""
    return frozenset(n for axis in window for owner, n in weight.origin[axis] if owner == leaf)


def same_use(first: str, second: str, window: frozenset[int] = frozenset()) -> bool:
    """Tell whether two uses fit one A and B: the same letters, or in and out exchanged.

    The axes that slide over the input (``window``) are summed over both ways.

    >>> same_use("sio", "soi"), same_use("sio", "iio"), same_use("iio", "ioi", frozenset({0}))
    (True, False, True)
    """
    swapped = (s if n in window else _SWAP.get(s, s) for n, s in enumerate(second))
    return first in (second, "".join(swapped))


def adapter_at(
    weight: LoraWeight, contracted: Sequence[int] = (), batch: Sequence[int] = ()
) -> Adapter:
    """Return the adapter for the weight as it stands, added axes taking their part in the use."""
    whole, letters = _as_used(weight, contracted, batch)
    return Adapter(whole.a, whole.b, weight.scale, letters, weight.dropout)


def gain_at(
    weight: LoraWeight, contracted: Sequence[int] = (), batch: Sequence[int] = ()
) -> tuple[Any, str]:
    """Return DoRA's gain, or None, and the letters, for the weight as ``adapter_at`` has it."""
    whole, letters = _as_used(weight, contracted, batch)
    return whole.gain, letters


def bias_at(
    weight: LoraWeight, contracted: Sequence[int] = (), batch: Sequence[int] = ()
) -> tuple[Any, str]:
    """Return the bias, or None, and the letters, for the weight as ``adapter_at`` has it."""
    whole, letters = _as_used(weight, contracted, batch)
    return whole.bias, letters


def _as_used(
    weight: LoraWeight, contracted: Sequence[int], batch: Sequence[int]
) -> tuple[LoraWeight, str]:
    if UNIT not in weight.letters:
        return weight, weight.letters
    summed = next((s for s in (weight.letters[n] for n in contracted) if s in _SWAP), IN)

    def letter(axis: int) -> str:
        if weight.letters[axis] != UNIT:
            return weight.letters[axis]
        return STACKED if axis in batch else summed if axis in contracted else _SWAP[summed]

    letters = "".join(letter(axis) for axis in range(len(weight.origin)))
    return with_letters(weight, letters), letters


def with_letters(weight: LoraWeight, letters: str) -> LoraWeight:
    """Return the weight with A and B in the shapes of these letters, for ``base`` as it is.

    Where an added axis gets a letter, the factor that carries it is repeated along it.
    """
    shape, r = weight.base.shape, weight.a.shape[-1]
    thin = tuple(1 if s == UNIT else n for n, s in zip(shape, weight.letters, strict=True))

    def repeated(factor: Any, shape_of: Callable[..., tuple[int, ...]], r: int) -> Any:
        thinned = lax.reshape(factor, shape_of(thin, letters, r))
        return jnp.broadcast_to(thinned, shape_of(shape, letters, r))

    gain = None if weight.gain is None else repeated(weight.gain, b_shape, 1)
    bias = None if weight.bias is None else repeated(weight.bias, b_shape, 1)
    a, b = repeated(weight.a, a_shape, r), repeated(weight.b, b_shape, r)
    return replace(weight, a=a, b=b, gain=gain, bias=bias)


def change(weight: LoraWeight, a: Any, b: Any) -> Any:
    """Return ``s·A·B`` in the shape of ``weight.base``, for these A and B."""
    adapter = adapter_at(replace(weight, a=a, b=b))
    return delta.delta(adapter)


def dense(weight: LoraWeight) -> Any:
    """Return ``W + s·A·B`` in the shape of ``weight.base``, with DoRA's gain if it has one."""
    change = delta.delta(adapter_at(weight))
    wide = weight.base.astype(lowrank.wider(weight.base.dtype, change.dtype))
    whole = delta.with_gain(lowrank.add(wide, change), *gain_at(weight))
    return whole.astype(weight.base.dtype)


def factor_axes(weight: LoraWeight, letter: str) -> dict[int, int]:
    """Return where each axis of ``base`` sits in A (``i``) or B (``o``)."""
    return lowrank.positions(weight.letters, letter)


def mirror(weight: LoraWeight, act: Callable[[Any, Mapping[int, int]], Any]) -> LoraWeight:
    """Return the weight after ``act(array, {axis of base: axis of array})`` on all three."""
    base = act(weight.base, {axis: axis for axis in range(weight.base.ndim)})
    if weight.planning:
        return replace(weight, base=base)
    at_out = factor_axes(weight, OUT)
    gain = None if weight.gain is None else act(weight.gain, at_out)
    bias = None if weight.bias is None else act(weight.bias, at_out)
    a, b = act(weight.a, factor_axes(weight, IN)), act(weight.b, at_out)
    return replace(weight, base=base, a=a, b=b, gain=gain, bias=bias)


PARTS = ("base", "a", "b", "gain", "bias")
"""The arrays of a ``LoraWeight``."""


def split(weight: LoraWeight) -> tuple[Any, ...]:
    """Return the arrays ``PARTS`` for a scan over the weight's leading axis.

    Raises:
        Unsupported: that axis is not stacked in the adapter.
    """
    if not weight.planning and weight.letters[0] == UNIT:  # the same weight in every step
        return parts(with_letters(weight, STACKED + weight.letters[1:]))
    if not weight.planning and weight.letters[0] != STACKED:
        raise Unsupported("the scan runs over an axis that its adapter does not stack")
    return parts(weight)


def parts(weight: LoraWeight) -> tuple[Any, ...]:
    """Return the arrays ``PARTS``."""
    return tuple(getattr(weight, name) for name in PARTS)


def with_parts(weight: LoraWeight, arrays: Sequence[Any]) -> LoraWeight:
    """Return the weight with these arrays as its ``PARTS``."""
    return replace(weight, **dict(zip(PARTS, arrays, strict=True)))


def step(weight: LoraWeight, *arrays: Any) -> LoraWeight:
    """Return what one step of a scan over the leading axis sees of the weight."""
    labels = weight.origin[0]
    inside = with_parts(weight, arrays)
    return replace(inside, origin=weight.origin[1:], looped=weight.looped | labels)


def specs(weight: LoraWeight, spec: PartitionSpec) -> tuple[Any, ...]:
    """Return the ``PartitionSpec`` of each of ``PARTS`` for that of base."""
    names = dict(enumerate(spec))

    def of(letter: str, ndim: int) -> PartitionSpec:
        at = factor_axes(weight, letter)
        by_place = {at[axis]: names.get(axis) for axis in at}
        return PartitionSpec(*(by_place.get(n) for n in range(ndim)))

    if weight.planning:
        return spec, None, None, None, None
    of_b = of(OUT, weight.b.ndim)
    thin = (None if one is None else of_b for one in (weight.gain, weight.bias))
    return spec, of(IN, weight.a.ndim), of_b, *thin
