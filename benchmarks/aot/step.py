"""The step that is compiled: Adam over LoRA's pairs, or over everything, sharded as FSDP does.

The frozen weights lie in bfloat16 in parts over the mesh and are gathered layer by layer. What is
trained, and its moments, are float32 and lie in parts over all axes of the mesh: parts over the
base's axis alone leave B whole on every device, and at 256 devices LoRA's arguments then exceed
full fine-tuning's. Their bfloat16 copies are laid out whole before use: XLA otherwise moves the
products of the much larger weights instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import LoraConfig, lora, plan

from ..cases import decoder
from ..cases.decoder import Layout, Sizes
from . import model

DATA, FSDP = "data", "fsdp"


@dataclass(frozen=True)
class Step:
    """A training step and the shapes of its arguments, with shardings where there is a mesh.

    Args:
        fn: ``fn(trained, state, frozen, ids)``, the new ``trained``, ``state`` and the loss.
        arguments: their shapes.
        trained: how many values are trained.
        base: how many values the model has.
    """

    fn: Callable[..., Any]
    arguments: tuple[Any, ...]
    trained: int
    base: int


def build(
    sizes: Sizes, *, rank: int, rows: int, length: int, full: bool, mesh: Mesh | None = None
) -> Step:
    """Return the step for ``rows`` sequences of ``length`` tokens.

    Args:
        sizes: of the decoder.
        rank: of the pairs of all seven linears.
        rows: sequences on all devices together.
        length: tokens of a sequence.
        full: train everything instead.
        mesh: with the axes ``data`` and ``fsdp``; none for one device without shardings.
    """
    layout = Layout() if mesh is None else Layout(_placed(mesh, P()), _placed(mesh, _rows()))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    if full:
        trained, frozen = model.shapes(sizes, jnp.float32), {}
    else:
        frozen = model.shapes(sizes)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=decoder.TARGETS)
        trained = plan(model.loss(sizes), frozen, config, ids).abstract()
    optimizer = optax.adam(1e-4)
    state = jax.eval_shape(optimizer.init, trained)
    fn = _step(sizes, layout, optimizer, full, mesh)
    base = model.shapes(sizes) if full else frozen
    arguments = (trained, state, frozen, ids)
    if mesh is not None:
        arguments = (
            *(_spread(tree, mesh, (DATA, FSDP)) for tree in (trained, state)),
            _spread(frozen, mesh, (FSDP,)),
            jax.ShapeDtypeStruct(ids.shape, ids.dtype, sharding=NamedSharding(mesh, _rows())),
        )
    return Step(fn, arguments, _values(trained), _values(base))


def _step(
    sizes: Sizes, layout: Layout, optimizer: Any, full: bool, mesh: Mesh | None
) -> Callable[..., Any]:
    plain = model.loss(sizes, layout)
    adapted = lora(plain)

    def loss(trained: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained)
        if full:
            return plain(narrow, ids)
        return adapted(frozen, jax.tree.map(layout.weight, narrow), ids)

    def step(trained: Any, state: Any, frozen: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(trained, frozen, ids)
        if mesh is not None:
            gradients = jax.tree.map(_like_argument(mesh), gradients)
        updates, state = optimizer.update(gradients, state, trained)
        trained = optax.apply_updates(trained, updates)
        if mesh is not None:
            trained, state = jax.tree.map(_like_argument(mesh), (trained, state))
        return trained, state, value

    return step


def parts(shape: tuple[int, ...], mesh_shape: dict[str, int], axes: tuple[str, ...]) -> P:
    """Return how an array lies in parts: its largest axis that these mesh axes divide, or whole.

    >>> tuple(parts((30, 576, 16), {"data": 1, "fsdp": 8}, ("data", "fsdp")))
    (None, ('data', 'fsdp'), None)
    >>> tuple(parts((30, 3), {"data": 1, "fsdp": 8}, ("fsdp",)))
    ()
    """
    count = math.prod(mesh_shape[axis] for axis in axes)
    fitting = [n for n, size in enumerate(shape) if size % count == 0]
    if not fitting:
        return P()
    largest = max(fitting, key=lambda n: shape[n])
    return P(*(axes if n == largest else None for n in range(len(shape))))


def _spread(tree: Any, mesh: Mesh, axes: tuple[str, ...]) -> Any:
    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, parts(leaf.shape, dict(mesh.shape), axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(one, tree)


def _like_argument(mesh: Mesh) -> Callable[[Any], Any]:
    def one(x: jax.Array) -> jax.Array:
        where = NamedSharding(mesh, parts(x.shape, dict(mesh.shape), (DATA, FSDP)))
        return jax.lax.with_sharding_constraint(x, where)

    return one


def _placed(mesh: Mesh, spec: P) -> Callable[[Any], Any]:
    return lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _rows() -> P:
    return P((DATA, FSDP))


def _values(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
