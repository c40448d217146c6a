"""Puts A and B on a mesh as their weight is, where the mesh's axes are explicit.

A and B are small. For products they are whole along the axes that are summed over or kept, so that
no product with them is ambiguous where the author's is not, and sharded as the weight is along the
axes that they stack.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from .adapter import IN, OUT, STACKED, Adapter, pick

_ARRAYS = ("a", "b", "magnitude", "bias")


def is_explicit(sharding: Any) -> bool:
    """Tell whether a type's sharding is one that the author has to state."""
    return is_explicit_mesh(getattr(sharding, "mesh", None))


def is_explicit_mesh(mesh: Any) -> bool:
    """Tell whether some axes of a mesh, or of None, are explicit."""
    return mesh is not None and not mesh.empty and AxisType.Explicit in mesh.axis_types


def whole(adapter: Adapter, weight: Any) -> Adapter:
    """Return an adapter sharded as its weight is along stacked axes, and along no other."""
    kind: Any = getattr(jax.typeof(weight), "sharding", None)
    spec = tuple(kind.spec) if is_explicit(kind) else (None,) * len(adapter.axes)
    stacked = tuple(spec[n] for n, letter in enumerate(adapter.axes) if letter == STACKED)
    arrays = {name: getattr(adapter, name) for name in _ARRAYS}
    # An array's own mesh is known outside of `jit` alone.
    own = [getattr(getattr(one, "sharding", None), "mesh", None) for one in (weight, adapter.a)]
    meshes = [*own, getattr(kind, "mesh", None)]
    return replace(adapter, **{name: along(one, stacked, *meshes) for name, one in arrays.items()})


def along(value: Any, first: tuple[Any, ...], *meshes: Any) -> Any:
    """Return an array, or None, sharded so along its first axes, and along no other.

    Args:
        value: the array.
        first: entries of a ``PartitionSpec``.
        *meshes: on which it may be put where it is on none with explicit axes.
    """
    if value is None:
        return value
    kind = jax.typeof(value).sharding
    own = tuple(kind.spec) if is_explicit(kind) else ()
    if own[: len(first)] == first and not any(own[len(first) :]):
        return value
    if not own and not any(first):
        return value
    mesh = next(filter(is_explicit_mesh, (*meshes, kind.mesh)), kind.mesh)
    return reshard(value, NamedSharding(mesh, PartitionSpec(*first)))


def placed(value: Any, spec: Iterable[Any], mesh: Any) -> Any:
    """Return an array, sharded along the explicit ones of these axes of a mesh."""
    if AxisType.Explicit not in mesh.axis_types:
        return value
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    own = [_only(entry, lambda name: types[name] == AxisType.Explicit) for entry in spec]
    return reshard(value, NamedSharding(mesh, PartitionSpec(*own)))


def as_sharded(value: Any, wanted: Any) -> Any:
    """Return an array sharded as another of its shape is along explicit axes of a mesh."""
    sharding = sharding_of(wanted)
    return value if sharding is None else reshard(value, sharding)


def like_weight(adapter: Adapter, sharding: NamedSharding) -> Adapter:
    """Return an adapter sharded as its weight is, along the axes that they share.

    Args:
        adapter: freshly drawn.
        sharding: of the weight, on a mesh of which some axes are explicit.
    """
    spec = (*sharding.spec, *(None for _ in adapter.axes))[: len(adapter.axes)]
    # Of a part of the columns B has not all of the axis.
    parted = adapter.axes.index(OUT) if adapter.columns is not None else -1
    spec = tuple(None if n == parted else entry for n, entry in enumerate(spec))

    def put(value: Any, letters: Iterable[str], rank: int | None) -> Any:
        if value is None:
            return None
        entries: list[Any] = [
            spec[n] for letter in letters for n in pick((*range(len(spec)),), adapter.axes, letter)
        ]
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
    kind: Any = getattr(leaf, "sharding", None)
    if not isinstance(kind, NamedSharding) or not is_explicit(kind) or not any(kind.spec):
        return None
    return kind


def names_of(entry: Any) -> tuple[str, ...]:
    """Return the axes of a mesh that an entry of a ``PartitionSpec`` names."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _only(entry: Any, wanted: Any) -> Any:
    """Return those names of one entry of a ``PartitionSpec`` that are wanted."""
    return tuple(filter(wanted, names_of(entry))) or None
