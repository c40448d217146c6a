"""Adapters through ``jax.export`` and ``flax.serialization``, with what is static in them.

Orbax and ``pickle`` need nothing of this: to Orbax they are pytrees, and what is static comes from
the tree that is restored into.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

# The kinds of nodes that Flax has not been told of.
_UNTOLD: list[type] = []
_STATIC = "static"

T = TypeVar("T")


def register(cls: type[T]) -> type[T]:
    """Let ``jax.export``, and Flax where it is loaded, write and read this kind of node.

    The name in a file is that of the class, ``lora_jax.Adapter``.
    """
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"lora_jax.{cls.__name__}",
        serialize_auxdata=encoded,
        deserialize_auxdata=decoded,
    )
    _UNTOLD.append(cls)
    tell_flax()
    return cls


def encoded(aux: Any) -> bytes:
    """Return what is static in a node as JSON.

    >>> decoded(encoded((("a", "b"), (("scale", 2), ("columns", (0, 3))))))
    (('a', 'b'), (('scale', 2), ('columns', (0, 3))))
    """
    return json.dumps(aux).encode()


def decoded(data: bytes | bytearray) -> Any:
    """Return what ``encoded`` was given; there are tuples, and no lists, in it."""

    def as_tuples(value: Any) -> Any:
        return tuple(map(as_tuples, value)) if isinstance(value, list) else value

    return as_tuples(json.loads(bytes(data)))


def tell_flax() -> None:
    """Let ``flax.serialization`` write and read these nodes, once something has imported it.

    The core does not import Flax, so every new adapter looks whether it is there.
    """
    flax: Any = sys.modules.get("flax.serialization")
    while _UNTOLD and flax:
        flax.register_serialization_state(_UNTOLD.pop(), to_state, from_state, override=True)


def to_state(node: Any) -> dict[str, Any]:
    """Return Flax's state dictionary of a node: its arrays by name, and the rest as bytes.

    The bytes are an array, so that the state is one of arrays alone.
    """
    from flax import serialization

    leaves, _, aux = _flat(node)
    arrays = {name: serialization.to_state_dict(leaf) for name, leaf in leaves.items()}
    return arrays | {_STATIC: np.frombuffer(encoded(aux), np.uint8)}


def from_state(node: Any, state: dict[str, Any]) -> Any:
    """Return the node that ``to_state`` was given; of ``node`` only its kind counts.

    Raises:
        ValueError: the state is not one of such a node, or an array of it is missing.
    """
    problem = _problem(type(node), state)
    if problem:
        raise ValueError(f"this is no state of {type(node).__name__}: {problem}")
    names, static = aux = decoded(np.asarray(state[_STATIC], np.uint8).tobytes())
    old, structure, now = _flat(node)
    values = [_restored(old.get(name), state[name], name) for name in names]
    if aux == now:
        return jax.tree.unflatten(structure, values)
    return type(node)(**dict(zip(names, values, strict=True)), **dict(static))


def _restored(old: Any, state: Any, name: str) -> Any:
    from flax import serialization

    value = serialization.from_state_dict(old, state, name)
    # Flax reads arrays as NumPy's.
    theirs = isinstance(value, np.ndarray) and not isinstance(old, np.ndarray)
    return jnp.asarray(value) if theirs else value


def _problem(kind: type, state: dict[str, Any]) -> str | None:
    if _STATIC not in state:
        return f"got {sorted(state)}, wanted {_STATIC!r} among them"
    names, static = decoded(np.asarray(state[_STATIC], np.uint8).tobytes())
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := {*names, *dict(static)} - known:
        return f"got fields {sorted(unknown)} of another kind"
    missing = [name for name in names if name not in state]
    return f"it lacks {missing}" if missing else None


def _flat(node: Any) -> tuple[dict[str, Any], Any, Any]:
    """Return the fields that are no static ones, the structure, and what is static."""
    leaves, structure = jax.tree.flatten(node, is_leaf=lambda leaf: leaf is not node)
    aux = structure.node_data()[1]
    return dict(zip(aux[0], leaves, strict=True)), structure, aux
