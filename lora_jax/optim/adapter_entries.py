"""Walking trees of adapters: what an optimizer of A and B needs to tell them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ..core import paths
from ..core.adapter import Adapter, Full, Rows
from ..core.errors import AdapterError, raise_all


def entries(tree: Any) -> list[tuple[str, Any]]:
    """Return every ``Adapter``, ``Full`` and ``Rows`` of a tree with its name; others as is."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_entry)
    return [(paths.path_of(keys), entry) for keys, entry in found]


def is_entry(node: Any) -> bool:
    """Tell an ``Adapter``, a ``Full`` or ``Rows`` from the containers around it."""
    return isinstance(node, Adapter | Full | Rows)


def labelled(tree: Any, rule: Callable[[str, str, Any], str]) -> Any:
    """Return the tree with ``rule(name, field, leaf)`` in place of every leaf of every entry.

    >>> import jax.numpy as jnp
    >>> labelled({"w": Full(jnp.ones(2))}, lambda name, field, leaf: f"{name} {field}")["w"].value
    'w value'
    """

    def entry(keys: tuple[Any, ...], one: Any) -> Any:
        name = paths.path_of(keys)
        return jax.tree_util.tree_map_with_path(
            lambda field, leaf: rule(name, field[-1].name, leaf), one
        )

    return jax.tree_util.tree_map_with_path(entry, tree, is_leaf=is_entry)


def map_pairs(rule: Callable[..., Adapter], updates: Any, params: Any) -> Any:
    """Return the updates with ``rule(name, gradient, adapter)`` in place of every adapter's.

    Raises:
        AdapterError: no params were given, or some adapters of them lack A or B.
    """
    if params is None:
        raise AdapterError("got no params: call update(gradients, state, adapters)")
    halves = [
        f"{name}: got A or B alone, wanted both; put the optimizer that groups inside"
        for name, entry in entries(params)
        if isinstance(entry, Adapter) and len(jax.tree.leaves((entry.a, entry.b))) < 2
    ]
    raise_all(AdapterError, "the gradients of A and B are needed together", halves)

    def one(keys: tuple[Any, ...], gradient: Any, entry: Any) -> Any:
        is_pair = isinstance(entry, Adapter)
        return rule(paths.path_of(keys), gradient, entry) if is_pair else gradient

    return jax.tree_util.tree_map_with_path(one, updates, params, is_leaf=is_entry)
