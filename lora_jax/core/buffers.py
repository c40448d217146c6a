"""``apart``: copies what a result shares with its inputs, so that either may be donated."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

T = TypeVar("T")


def apart(result: T, *given: Any) -> T:
    """Return the result with a copy of every array in it that is one of what was given.

    A function of trees that passes some leaves on would hand out the caller's own arrays: donated
    to a training step, both trees would be lost.

    >>> given = {"w": jnp.ones(2)}
    >>> apart(given, given)["w"] is given["w"], apart(given)["w"] is given["w"]
    (False, True)
    """
    theirs = {id(leaf) for leaf in jax.tree.leaves(given) if isinstance(leaf, jax.Array)}

    def own(node: Any) -> Any:
        if type(node) is dict:  # JAX would sort it
            return {name: own(value) for name, value in node.items()}
        return jax.tree.map(leaf, node)

    def leaf(value: Any) -> Any:
        shared = id(value) in theirs and not isinstance(value, Tracer)
        return jnp.copy(value) if shared else value

    return own(result)
