"""``transpose``, ``reshape``, ``slice``, ``concatenate``, ``reshard``, …: what moves a weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from jax import lax

from ...core.adapter import STACKED, is_number
from .. import meshes, weight_moves
from ..interpret import Call, base_of
from ..registry import Unsupported, rule
from ..weight import PARTS, LoraWeight


@rule("transpose")
def transpose(call: Call, weight: LoraWeight) -> LoraWeight:
    """Permute the axes."""
    return weight_moves.transpose(weight, call.params["permutation"])


@rule("reshape", "squeeze", "expand_dims")
def reshape(call: Call, weight: LoraWeight, *dynamic: Any) -> LoraWeight:
    """Split or merge whole axes, add or drop size-1 axes; ``squeeze`` is one of these."""
    if call.params.get("dimensions") is not None and call.eqn.primitive.name == "reshape":
        raise Unsupported("the reshape also permutes axes")
    return weight_moves.reshape(weight, call.out_shape, _sharded(call, weight, *dynamic))


@rule("broadcast_in_dim")
def broadcast_in_dim(call: Call, weight: LoraWeight, *dynamic: Any) -> LoraWeight:
    """Add axes, of size 1 as ``w[None]`` does, or larger ones along which the weight repeats."""
    axes = tuple(map(int, call.params["broadcast_dimensions"]))  # vmap makes numpy's of them
    sharded = _sharded(call, weight, *dynamic)
    return weight_moves.broadcast(weight, call.params["shape"], axes, sharded)


@rule("slice")
def slice_(call: Call, weight: LoraWeight) -> LoraWeight:
    """Take a range of each axis, as ``w[:, 3:7]`` and ``w[0]`` do."""
    starts, limits = call.params["start_indices"], call.params["limit_indices"]
    strides = call.params["strides"] or (1,) * len(starts)
    cut = [n for n, size in enumerate(weight.base.shape) if call.out_shape[n] != size]
    return weight_moves.cut(
        weight,
        lambda array, at, axis: lax.slice_in_dim(
            array, starts[axis], limits[axis], strides[axis], axis=at
        ),
        cut,
    )


@rule("dynamic_slice")
def dynamic_slice(call: Call, weight: LoraWeight, *starts: Any) -> LoraWeight:
    """Take a range that is only known at run time, as ``w[i]`` does in a loop."""
    sizes = call.params["slice_sizes"]
    cut = [n for n, size in enumerate(weight.base.shape) if sizes[n] != size]
    by_data = [n for n in cut if not call.record.alone(call.eqn.invars[1 + n])]
    chosen = weight.chosen.union(*(weight.origin[n] for n in by_data))
    return weight_moves.cut(
        replace(weight, chosen=chosen),
        lambda array, at, axis: lax.dynamic_slice_in_dim(array, starts[axis], sizes[axis], axis=at),
        cut,
    )


@rule("split")
def split(call: Call, weight: LoraWeight) -> list[LoraWeight]:
    """Cut an axis into parts, as a fused kernel of query, key and value is."""
    axis, start, parts = call.params["axis"], 0, []
    for size in map(int, call.params["sizes"]):

        def part(array: Any, at: int, axis: int, start: int = start, size: int = size) -> Any:
            return lax.slice_in_dim(array, start, start + size, axis=at)

        parts.append(weight_moves.cut(weight, part, [axis]))
        start += size
    return parts


@rule("unstack")
def unstack(call: Call, weight: LoraWeight) -> list[LoraWeight]:
    """Take every index of an axis."""
    axis, shape = call.params["axis"], weight.base.shape
    kept = (*shape[:axis], *shape[axis + 1 :])

    def one(index: int) -> LoraWeight:
        return weight_moves.reshape(
            weight_moves.cut(
                weight,
                lambda array, at, axis: lax.slice_in_dim(array, index, index + 1, axis=at),
                [axis],
            ),
            kept,
        )

    return [one(index) for index in range(shape[axis])]


@rule("concatenate")
def concatenate(call: Call, *parts: Any) -> LoraWeight:
    """Join weights, and arrays among them, into one."""
    return weight_moves.concatenate(parts, int(call.params["dimension"]))


@rule("stack")
def stack(call: Call, *parts: Any) -> LoraWeight:
    """Join weights along a new axis, as layers are for a scan."""
    axis = call.params["axis"]
    return weight_moves.concatenate([_expanded(part, axis) for part in parts], axis)


@rule("rev")
def rev(call: Call, weight: LoraWeight) -> LoraWeight:
    """Turn axes around, as the gradient of a convolution does with its window."""
    return weight_moves.cut(
        weight, lambda array, at, axis: lax.rev(array, (at,)), call.params["dimensions"]
    )


@rule("copy", "copy_p")
def copy(call: Call, weight: LoraWeight) -> LoraWeight:
    """Nothing changes."""
    return weight


@rule("stop_gradient")
def stop_gradient(call: Call, weight: LoraWeight) -> LoraWeight:
    """Stop the gradient of W, A and B alike: what the author freezes does not learn here."""
    return jax.tree.map(lax.stop_gradient, weight)


@rule("optimization_barrier")
def optimization_barrier(call: Call, *operands: Any) -> list[Any]:
    """Hold the base back together with the other operands."""
    return _on_bases(operands, call.plain(*map(base_of, operands)))


@rule("reshard", "mesh_cast")
def reshard(call: Call, weight: LoraWeight) -> LoraWeight:
    """Shard the base otherwise; A and B follow it to a mesh with other types of axes."""
    sharding = call.params["dst_sharding"]
    base = call.plain(weight.base)
    if weight.planning:
        return replace(weight, base=base)
    spec = (*sharding.spec, *(None for _ in weight.origin))
    stacked = tuple(spec[n] for n, letter in enumerate(weight.letters) if letter == STACKED)
    scale = {} if is_number(weight.scale) else {"scale": ()}
    moved = {
        name: meshes.followed(getattr(weight, name), sharding.mesh, axes)
        for name, axes in ({name: stacked for name in PARTS[1:]} | scale).items()
    }
    return replace(weight, base=base, **moved)


@rule("sharding_constraint", "pvary", "pcast", "reduce_precision")
def on_the_base(call: Call, weight: LoraWeight) -> LoraWeight:
    """Apply to the base what says where or how precisely it is kept."""
    return replace(weight, base=call.plain(weight.base))


def _sharded(call: Call, weight: LoraWeight, *dynamic: Any) -> Any:
    """Return the base where the author says how it is sharded then, None elsewhere."""
    stated = call.params.get("sharding") is not None
    return call.plain(weight.base, *dynamic) if stated else None


def _expanded(part: Any, axis: int) -> Any:
    if isinstance(part, LoraWeight):
        shape = part.base.shape
        return weight_moves.reshape(part, (*shape[:axis], 1, *shape[axis:]))
    return lax.expand_dims(part, (axis,))


def _on_bases(operands: Any, bases: Any) -> list[Any]:
    return [
        replace(old, base=new) if isinstance(old, LoraWeight) else new
        for old, new in zip(operands, bases, strict=True)
    ]
