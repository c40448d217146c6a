"""Folding adapters into the weights, as a new tree."""

from __future__ import annotations

from typing import Any

from . import lowrank, paths
from .adapter import Adapters, Full, check_fit


def merge(params: Any, adapters: Adapters) -> Any:
    """Return ``params`` with ``W + s·A·B`` in place of every adapted W; the old tree stays.

    The sum is formed in at least float32 and rounded once to the weight's dtype. Leaves
    trained in full are put in. To undo a merge, keep ``params``.

    Args:
        params: the frozen parameters, any pytree.
        adapters: ``{path: Adapter | Full}``.

    Raises:
        AdapterError: an adapter has no parameter, or does not fit its shape.

    >>> import jax.numpy as jnp
    >>> from lora_jax.adapter import Adapter
    >>> adapters = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)}
    >>> merge({"w": jnp.zeros((3, 2))}, adapters)["w"][0]
    Array([2., 2.], dtype=float32)
    """
    check_fit(params, adapters)
    leaves, changed = paths.flatten(params), {}
    for name, adapter in adapters.items():
        path = paths.parameter_of(name)
        if isinstance(adapter, Full):
            changed[path] = adapter.value
        else:
            changed[path] = lowrank.merged(changed.get(path, leaves[path]), adapter)
    return paths.replace(params, changed)
