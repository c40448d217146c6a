"""Writes what a call changed (new variables, counters) back to an NNX model."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from ..core.errors import LoraError

# Flax's own bookkeeping among an object's attributes.
_INTERNAL = "_pytree__"

_PROBLEM = (
    "the call changes the model's structure in a way that cannot be followed; make the change "
    "before, or adapt the function with lora_jax.lora"
)


def follow(nodes: Any, after: Any) -> None:
    """Change NNX objects in place to what their copy has become.

    Variables that both have get the copy's values where these differ; attributes that are new,
    changed or gone become so. Objects keep their identity.

    Args:
        nodes: the objects.
        after: a copy of them on which the call was made.

    Raises:
        LoraError: a module is new, or the structure differs otherwise.
    """
    _followed(nodes, after, set())
    if nnx.graphdef(nodes) != nnx.graphdef(after):
        raise LoraError(_PROBLEM)


def _followed(old: Any, new: Any, seen: set[int]) -> Any:
    """Return what stands in the place of ``old``: itself, changed, or ``new``."""
    if type(old) is not type(new):
        return _without_modules(new)
    if isinstance(old, nnx.Variable):
        if not _same_leaves(old, new):
            old.set_raw_value(new.get_raw_value())
        return old
    if isinstance(old, nnx.Pytree):
        if id(old) not in seen:
            seen.add(id(old))
            _follow_attributes(old, new, seen)
        return old
    if isinstance(old, dict) and old.keys() == new.keys():
        kept = {key: _followed(value, new[key], seen) for key, value in old.items()}
        return old if all(kept[key] is value for key, value in old.items()) else kept
    if type(old) in (tuple, list) and len(old) == len(new):
        kept = type(old)(_followed(one, other, seen) for one, other in zip(old, new, strict=True))
        return old if all(a is b for a, b in zip(kept, old, strict=True)) else kept
    if _same_leaves(old, new):
        return old
    return _without_modules(new)


def _follow_attributes(old: nnx.Pytree, new: nnx.Pytree, seen: set[int]) -> None:
    before, after = _attributes(old), _attributes(new)
    for name, value in after.items():
        kept = _followed(before.get(name), value, seen)
        if name not in before or kept is not before[name]:
            setattr(old, name, _as_data(kept))
    for name in before.keys() - after.keys():
        delattr(old, name)


def _attributes(node: nnx.Pytree) -> dict[str, Any]:
    return {name: one for name, one in vars(node).items() if not name.startswith(_INTERNAL)}


def _as_data(value: Any) -> Any:
    """Mark a container of arrays or variables as data, which Flax wants to be told."""
    holds = isinstance(value, tuple | list | dict) and any(
        isinstance(leaf, jax.Array | nnx.Variable)
        for leaf in jax.tree.leaves(value, is_leaf=lambda one: isinstance(one, nnx.Variable))
    )
    return nnx.data(value) if holds else value


def _without_modules(value: Any) -> Any:
    nodes = jax.tree.leaves(value, is_leaf=lambda one: isinstance(one, nnx.Pytree))
    if any(isinstance(one, nnx.Pytree) for one in nodes):
        raise LoraError(_PROBLEM)
    return value


def _same_leaves(one: Any, other: Any) -> bool:
    """Tell whether two values have the same arrays, and equal values for what is no array."""
    (ours, tree), (theirs, like) = jax.tree.flatten(one), jax.tree.flatten(other)
    return tree == like and all(
        a is b or (not isinstance(a, jax.Array) and type(a) is type(b) and bool(a == b))
        for a, b in zip(ours, theirs, strict=True)
    )
