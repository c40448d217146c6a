"""Meshes whose axes are explicit: the types of arrays say there how they are sharded.

A and B are small. In the function they are whole along the axes that a product sums over or keeps,
so that no product with them is ambiguous where the author's is not, and sharded as the weight is
along the axes that they stack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
from jax.extend import core
from jax.sharding import AxisType, NamedSharding, PartitionSpec, get_abstract_mesh, reshard

from .. import lowrank
from ..adapter import IN, OUT, STACKED, Adapter


def around(eqn: core.JaxprEqn) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which the author's equation was written: its mesh."""
    mesh = eqn.ctx.cur_abstract_mesh
    if mesh == get_abstract_mesh():
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def is_explicit(sharding: Any) -> bool:
    """Tell whether a type's sharding is one that the author has to state."""
    mesh = getattr(sharding, "mesh", None)
    return mesh is not None and not mesh.empty and AxisType.Explicit in mesh.axis_types


def as_typed(value: Any, wanted: Any) -> Any:
    """Return an array in the sharding of this type, where the mesh is explicit."""
    sharding = getattr(wanted, "sharding", None)
    if not is_explicit(sharding) or jax.typeof(value).sharding == sharding:
        return value
    return reshard(value, sharding)


def in_mesh(value: Any, mesh: Any) -> Any:
    """Return an array, or None, whole, on a mesh that may have other types of axes."""
    if value is None or jax.typeof(value).sharding.mesh == mesh:
        return value
    return reshard(value, NamedSharding(mesh, PartitionSpec()))


def placed(value: Any, spec: Iterable[Any], mesh: Any) -> Any:
    """Return an array, sharded along the explicit ones of these axes of a mesh."""
    if AxisType.Explicit not in mesh.axis_types:
        return value
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    own = [_only(entry, lambda name: types[name] == AxisType.Explicit) for entry in spec]
    return reshard(value, NamedSharding(mesh, PartitionSpec(*own)))


def entered(adapter: Adapter) -> Adapter:
    """Return an adapter whose arrays are sharded along stacked axes alone."""
    stacked = adapter.axes.count(STACKED)

    def whole(value: Any) -> Any:
        sharding = None if value is None else jax.typeof(value).sharding
        spec = () if sharding is None else tuple(sharding.spec)
        if sharding is None or not is_explicit(sharding) or not any(spec[stacked:]):
            return value
        mesh = getattr(getattr(value, "sharding", None), "mesh", sharding.mesh)
        return reshard(value, NamedSharding(mesh, PartitionSpec(*spec[:stacked])))

    names = ("a", "b", "magnitude", "bias")
    return replace(adapter, **{name: whole(getattr(adapter, name)) for name in names})


def like_weight(adapter: Adapter, sharding: NamedSharding) -> Adapter:
    """Return an adapter sharded as its weight is, along the axes that they share.

    Args:
        adapter: freshly drawn.
        sharding: of the weight, on a mesh of which some axes are explicit.
    """
    spec = dict(enumerate(sharding.spec))

    def put(value: Any, letters: Iterable[str], rank: int | None) -> Any:
        if value is None:
            return None
        own = [n for s in letters for n in lowrank.axes_with(adapter.axes, s)]
        entries = [spec.get(n) for n in own]
        if rank is not None:
            entries.insert(rank, None)
        return placed(value, entries, sharding.mesh)

    stacked, summed = adapter.axes.count(STACKED), adapter.axes.count(IN)
    return replace(
        adapter,
        a=put(adapter.a, (STACKED, IN), stacked + summed),
        b=put(adapter.b, (STACKED, OUT), stacked),
        magnitude=put(adapter.magnitude, (STACKED, OUT), None),
        bias=put(adapter.bias, (STACKED, OUT), None),
    )


def sharding_of(leaf: Any) -> NamedSharding | None:
    """Return how a parameter is sharded along explicit axes of a mesh; None where it is not."""
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    if sharding is None or not is_explicit(sharding) or not any(sharding.spec):
        return None
    concrete = getattr(leaf, "sharding", None)
    return concrete if isinstance(concrete, NamedSharding) else sharding


def _only(entry: Any, wanted: Any) -> Any:
    """Return those names of one entry of a ``PartitionSpec`` that are wanted."""
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return tuple(name for name in names if wanted(name)) or None
