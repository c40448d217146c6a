"""PyTorch's ``nn.MultiheadAttention`` under other names: in PEFT's file it is one module.

PEFT gives the module and its ``out_proj`` one rank and one alpha, and has both or neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from ...core import paths
from ...core.adapter import STACKED, Adapter, Entry, rank
from ...core.config import lora_config
from ...core.config.lora_config import LoraConfig
from ...core.errors import AdapterError, raise_all
from ...rewrite import LeafPlan

FILE = "torch:"

Ranks = tuple[int, int | float]


@dataclass(frozen=True)
class Sides:
    """A plan whose leaves are the file's, and what belongs to it.

    Args:
        leaves: the decisions.
        values: the entries; empty while reading.
        full: what is trained in full.
        names: what the table makes of each path; None where nothing.
        ranks: rank and alpha of the modules that the configuration does not know.
        origin: the path in the model of each path that was changed.
    """

    leaves: tuple[LeafPlan, ...]
    values: Mapping[str, Entry]
    full: Mapping[str, Any]
    names: Mapping[str, str | None]
    ranks: Mapping[str, Ranks]
    origin: Mapping[str, str]


def whole(sides: Sides, config: LoraConfig, *, complete: bool) -> Sides:
    """Return the same with every attention as PEFT has it.

    Args:
        sides: a table's names for the model's weights.
        config: the plan's.
        complete: give both pairs one rank and one scale, and ``out_proj`` a pair that changes
            nothing where it has none.

    Raises:
        AdapterError: lists every attention whose ``out_proj`` alone is adapted.
    """
    biased = [
        f"{name}: its bias is trained in full, which PEFT does not know; freeze it"
        for path in sides.full
        if (name := sides.names.get(path)) and paths.leaf_name(name) == paths.IN_PROJ
    ]
    raise_all(AdapterError, "PEFT's file has no place for these", biased)
    weights = [leaf for leaf in sides.leaves if leaf.axes]
    own = {name: leaf for leaf in weights if (name := sides.names.get(leaf.path))}
    alone = []
    for name, first in own.items():
        if paths.leaf_name(name) != paths.IN_PROJ:
            continue
        owner = paths.module_of(name)
        out = _out(sides, owner)
        if out is None or not (first.adapted or out.adapted):
            continue
        if not first.adapted:
            alone.append(f"{out.path}: the {paths.OUT_PROJ} of {owner}")
            continue
        if complete:
            sides = _completed(sides, config, first, out)
        sides = _renamed(sides, config, owner, first, _out(sides, owner) or out)
    raise_all(
        AdapterError,
        "PEFT adapts an nn.MultiheadAttention as a whole; adapt query, key or value, too",
        alone,
    )
    return sides


def _out(sides: Sides, owner: str) -> LeafPlan | None:
    weights = (leaf for leaf in sides.leaves if leaf.axes)
    name = f"{owner}.{paths.OUT_PROJ}"
    return next((leaf for leaf in weights if sides.names.get(leaf.path) == name), None)


def _ranks(sides: Sides, config: LoraConfig, leaf: LeafPlan) -> Ranks:
    return sides.ranks.get(leaf.module) or lora_config.rank_and_alpha(config, leaf.module)


def _completed(sides: Sides, config: LoraConfig, first: LeafPlan, out: LeafPlan) -> Sides:
    """Return the same with one rank and one scale for both weights."""
    one = sides.values[first.path]
    assert isinstance(one, Adapter)
    two = sides.values.get(out.path) if out.adapted else _idle(one, first, out)
    assert isinstance(two, Adapter)
    r = max(rank(one), rank(two))
    by_first = one.scale or not two.scale
    given = _ranks(sides, config, first if by_first else out)
    scale = one.scale if by_first else two.scale
    ranks = (r, scaled_alpha(config, *given, r))
    pairs = {first: one, out: two}
    values = {leaf.path: _padded(adapter, r, scale) for leaf, adapter in pairs.items()}
    new = {
        leaf.path: replace(leaf, r=r, scale=scale, why="adapted", dora=first.dora) for leaf in pairs
    }
    return replace(
        sides,
        leaves=tuple(new.get(leaf.path, leaf) for leaf in sides.leaves),
        values=dict(sides.values) | values,
        ranks=dict(sides.ranks) | {leaf.module: ranks for leaf in pairs},
    )


def _idle(one: Adapter, first: LeafPlan, out: LeafPlan) -> Adapter:
    """Return a pair with B = 0 and the A of the other weight, so that it can be trained."""
    r = rank(one)
    leaf = replace(out, r=r, scale=one.scale)
    if math.prod(leaf.a_shape) != one.a.size:
        raise AdapterError(
            f"{out.path}: got inputs {leaf.a_shape[:-1]}, wanted as many as {first.path} has"
        )
    return leaf.adapter(
        one.a.reshape(leaf.a_shape), jnp.zeros(leaf.b_shape, one.b.dtype), one.dropout
    )


def _padded(adapter: Adapter, r: int, scale: Any) -> Adapter:
    """Return the same change at a higher rank and another scale."""
    a, b = adapter.a, adapter.b
    more, axis = r - rank(adapter), adapter.axes.count(STACKED)
    if more:
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
        b = jnp.pad(b, [(0, more * (n == axis)) for n in range(b.ndim)])
    if adapter.scale != scale:
        b = b * jnp.asarray(adapter.scale / scale, b.dtype)
    return replace(adapter, a=a, b=b, scale=scale)


def _renamed(sides: Sides, config: LoraConfig, owner: str, first: LeafPlan, out: LeafPlan) -> Sides:
    """Return the same with the attention's leaves under the paths that PyTorch has."""
    bias = (
        leaf
        for leaf in sides.leaves
        if sides.names.get(leaf.path) == f"{owner}.{paths.OUT_PROJ}"
        and paths.leaf_name(leaf.path) in paths.BIAS_NAMES
    )
    path = f"{FILE}{owner}.{paths.OUT_PROJ}"
    new = {first.path: f"{FILE}{owner}.{paths.IN_PROJ}", out.path: f"{path}.weight"}
    new |= {leaf.path: f"{path}.bias" for leaf in bias}
    own = {out.path: owner if out.adapted else ""}

    def placed(leaf: LeafPlan) -> LeafPlan:
        if leaf.path not in new:
            return leaf
        return replace(leaf, path=new[leaf.path], owner=own.get(leaf.path, ""))

    leaves = tuple(map(placed, sides.leaves))
    ranks = {f"{FILE}{owner}": _ranks(sides, config, first), owner: _ranks(sides, config, out)}

    def moved(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {new.get(path, path): entry for path, entry in entries.items()}

    names = moved(sides.names) | {own: own.removeprefix(FILE) for own in new.values()}
    origin = {now: sides.origin.get(was, was) for was, now in new.items()}
    return Sides(
        leaves,
        moved(sides.values),
        moved(sides.full),
        names,
        dict(sides.ranks) | ranks,
        dict(sides.origin) | origin,
    )


def scaled_alpha(config: LoraConfig, r: int, alpha: int | float, new: int) -> int | float:
    """Return the alpha that gives a rank the scale of another.

    >>> scaled_alpha(LoraConfig(), 2, 7, 6)
    21
    """
    if new == r:
        return alpha
    found = alpha * (math.sqrt(new / r) if config.use_rslora else new / r)
    return int(found) if isinstance(alpha, int) and found == int(found) else found
