"""The rule for a choice between weights, as ``vmap`` makes one of ``lax.switch`` and ``cond``.

Where all elements of a weight are chosen together, the choice is one between low-rank changes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend import core

from ...core import delta, lowrank
from ...core.adapter import IN, OUT, STACKED
from .. import weight_moves
from ..interpret import Call, base_of
from ..registry import Unsupported, rule
from ..weight import STACK, LoraWeight, factor_axes, with_letters


@rule("select_n")
def select_n(call: Call, which: Any, *cases: Any) -> LoraWeight:
    """``W_n + s·A_n·B_n`` for the n in ``which``: one n for all, or one for each of a batch.

    ``vmap`` repeats n in the shape of the weights. Along their own axes it must be the same.
    """
    if isinstance(which, LoraWeight):
        raise Unsupported("the weight's values decide what is chosen")
    for case, atom in zip(cases, call.eqn.invars[1:], strict=True):
        if not isinstance(case, LoraWeight) and not call.record.alone(atom):
            raise Unsupported("the data may be chosen in its place")
    weights = [case for case in cases if isinstance(case, LoraWeight)]
    base = call.plain(which, *map(base_of, cases))
    weights = weight_moves.alike(weights, base.dtype)
    batch = _varies(call.inside, call.eqn.invars[0])
    whole = _joined(weights, base, batch)
    if len(whole.origin) - len(batch) < 2 or not (
        whole.planning or all(whole.letters[axis] == STACKED for axis in batch)
    ):
        raise Unsupported("its elements are chosen one by one, not all together")
    if whole.planning:
        return whole
    own = iter([with_letters(weight, whole.letters) for weight in weights])
    spread = [next(own) if isinstance(case, LoraWeight) else None for case in cases]
    return _chosen(whole, _along(which, batch), batch, spread)


def _joined(weights: Sequence[LoraWeight], base: Any, batch: Sequence[int]) -> LoraWeight:
    """Return one weight with the axes of several; those of the batch are the adapters' stacks."""
    joined = weight_moves.join_labels(weights)
    origin = list(joined["origin"])
    for axis in batch:
        origin[axis] = origin[axis] or frozenset({STACK})
    looped = joined["looped"].union(*(origin[axis] for axis in batch))
    return replace(weights[0], base=base, **joined | dict(origin=tuple(origin), looped=looped))


def _chosen(
    whole: LoraWeight, which: Any, batch: Sequence[int], cases: Sequence[LoraWeight | None]
) -> LoraWeight:
    """Return the weight with A, B, gain and bias chosen as its base was; None is a case without."""
    weights = [case for case in cases if case is not None]
    scale = delta.common_scale(weights)
    if scale is None:
        cases = [case and replace(case, a=lowrank.scaled(case.a, case)) for case in cases]

    def choose(name: str, letter: str, rank_axis: int, absent: float = 0.0) -> Any:
        parts = [None if case is None else getattr(case, name) for case in cases]
        known = [part for part in parts if part is not None]
        if not known:
            return None
        dtype = functools.reduce(lowrank.wider, (part.dtype for part in known))
        shape = list(known[0].shape)
        shape[rank_axis] = max(part.shape[rank_axis] for part in known)
        filled = [
            jnp.full(shape, absent, dtype)
            if part is None
            else _filled(part.astype(dtype), rank_axis, shape[rank_axis])
            for part in parts
        ]
        at = factor_axes(whole, letter)
        n = lax.broadcast_in_dim(which, shape, [at[axis] for axis in batch]) if batch else which
        return lax.select_n(n, *filled)

    last, after = weights[0].a.ndim - 1, whole.letters.count(STACKED)
    a, b = choose("a", IN, last), choose("b", OUT, after)
    gain, bias = choose("gain", OUT, after, absent=1.0), choose("bias", OUT, after)
    return replace(whole, a=a, b=b, scale=1.0 if scale is None else scale, gain=gain, bias=bias)


def _filled(factor: Any, axis: int, rank: int) -> Any:
    """Return a factor with zeros up to this rank."""
    widths = [(0, rank - factor.shape[axis] if n == axis else 0) for n in range(factor.ndim)]
    return jnp.pad(factor, widths)


def _along(which: Any, batch: Sequence[int]) -> Any:
    """Return what is chosen for each index of the batch, from an array that repeats it."""
    if not which.ndim:
        return which
    limits = [size if n in batch else 1 for n, size in enumerate(which.shape)]
    first = lax.slice(which, [0] * which.ndim, limits)
    return lax.squeeze(first, [n for n in range(which.ndim) if n not in batch])


def _varies(jaxpr: core.Jaxpr, atom: Any) -> tuple[int, ...]:
    """Return the axes along which an array may have more than one value, as its makers say."""
    if isinstance(atom, core.Literal):
        return ()
    maker = next((eqn for eqn in jaxpr.eqns if atom in eqn.outvars), None)
    if maker is not None:
        name, source = maker.primitive.name, maker.invars[0]
        if name == "broadcast_in_dim":
            axes = maker.params["broadcast_dimensions"]
            return tuple(int(axes[n]) for n in _varies(jaxpr, source))
        if name in ("convert_element_type", "not", "copy"):
            return _varies(jaxpr, source)
        if name == "transpose":
            before = _varies(jaxpr, source)
            return tuple(n for n, axis in enumerate(maker.params["permutation"]) if axis in before)
    return tuple(n for n, size in enumerate(atom.aval.shape) if size != 1)
