"""The meshes of a function in which types of arrays say how they are sharded."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec, get_abstract_mesh, reshard

from ..core.sharding import is_explicit


def around(eqn: core.JaxprEqn) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which the author's equation was written: its mesh."""
    mesh = eqn.ctx.cur_abstract_mesh
    if mesh == get_abstract_mesh():
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def as_typed(value: Any, wanted: Any) -> Any:
    """Return an array in the sharding of this type, where the mesh is explicit."""
    sharding = getattr(wanted, "sharding", None)
    if not is_explicit(sharding) or jax.typeof(value).sharding == sharding:
        return value
    return reshard(value, sharding)


def here(value: Any) -> Any:
    """Return an array of the whole mesh, such as a random key, in the context's types of axes."""
    mesh, own = get_abstract_mesh(), jax.typeof(value).sharding.mesh
    types_differ = not own.empty and not mesh.empty and own.axis_types != mesh.axis_types
    return reshard(value, NamedSharding(mesh, PartitionSpec())) if types_differ else value


def followed(value: Any, mesh: Any, stacked: tuple[Any, ...]) -> Any:
    """Return A, B, or None, where the base is sharded otherwise, on this mesh.

    Args:
        value: the array.
        mesh: maybe one with other types of axes.
        stacked: how the base is sharded along the axes that the adapter stacks.
    """
    if value is None:
        return None
    own = jax.typeof(value).sharding
    if own.mesh == mesh and tuple(own.spec)[: len(stacked)] == stacked:
        return value
    return reshard(value, NamedSharding(mesh, PartitionSpec(*stacked)))
