"""``adapter_model.safetensors``: between PEFT's tensors and adapters, pure functions.

PEFT keeps a linear layer's A as ``[r, in]`` and its B as ``[out, r]``, an embedding's alike under
names of their own, a convolution's as ``[r, in, *window]`` and ``[out, r, 1, …]``; axes that the
model splits, such as heads, are flattened, and layers stacked for a scan are written one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import paths
from ..adapter import IN, OUT, STACKED, Adapter, Adapters, Full, pick
from ..errors import AdapterError, raise_all
from ..initializers import changes_base
from ..rewrite import LeafPlan, Plan

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"

Names = Callable[[str], str]


@dataclass(frozen=True)
class Slot:
    """One tensor of the file and the part of the adapters that it holds.

    Args:
        key: the tensor's name in the file.
        path: the parameter.
        part: ``"a"``, ``"b"``, ``"magnitude"`` or ``"value"``.
        index: the indices of the stacked axes; empty without any.
        shape: the tensor's shape in the file.
    """

    key: str
    path: str
    part: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


def encode(plan: Plan, adapters: Adapters, names: Names = paths.module_of) -> dict[str, np.ndarray]:
    """Return the file's tensors for adapters of this plan, C-contiguous.

    Args:
        plan: the plan that the adapters belong to.
        adapters: what is saved.
        names: the PyTorch module name of a path. A stacked weight needs a ``{}`` in it for
            each stacked axis: ``"model.layers.{}.self_attn.q_proj"``.

    Raises:
        AdapterError: adapters and plan differ, names collide, or a value is not finite.
    """
    _refuse_what_has_no_place(plan)
    raise_misfits(plan, adapters)
    leaves = {leaf.path: leaf for leaf in plan.leaves}
    tensors = {}
    for slot in slots(plan, names):
        adapter, leaf = adapters[slot.path], leaves[slot.path]
        whole = np.asarray(getattr(adapter, slot.part))
        matrix = _to_matrix(whole, leaf, slot)
        tensors[slot.key] = np.ascontiguousarray(matrix.reshape(slot.shape))
    broken = [f"{key}: NaN or infinite" for key, t in tensors.items() if not is_finite(t)]
    raise_all(AdapterError, "these adapters hold values that are not finite", broken)
    return tensors


def raise_misfits(plan: Plan, adapters: Adapters) -> None:
    """Raise unless these adapters are those of the plan, by path, shape and scale.

    Raises:
        AdapterError: lists everything that differs.
    """
    planned = {leaf.name: leaf for leaf in plan.adapted}
    wanted = planned.keys() | plan.full.keys()
    found = [f"{path}: planned, but there is no adapter" for path in wanted - adapters.keys()]
    found += [f"{path}: an adapter, but not planned" for path in adapters.keys() - wanted]
    for path in wanted & adapters.keys():
        entry, leaf = adapters[path], planned.get(path)
        if (leaf is not None) != isinstance(entry, Adapter):
            kind = "A and B" if leaf else "the whole parameter"
            found.append(f"{path}: got {type(entry).__name__}, wanted {kind}")
        elif leaf and isinstance(entry, Adapter):
            shapes = _shapes(leaf)
            got = {part: np.shape(getattr(entry, part)) for part in shapes}
            if got != shapes or leaf.dora != (entry.magnitude is not None):
                found.append(f"{path}: got {got}, wanted {shapes}")
            if entry.scale is None or not np.allclose(entry.scale, leaf.scale, rtol=1e-6, atol=0):
                found.append(
                    f"{path}: got scale {entry.scale}, the configuration's is {leaf.scale:g}"
                )
        elif isinstance(entry, Full):
            got, wanted_shape = np.shape(entry.value), tuple(plan.full[path].shape)
            if got != wanted_shape:
                found.append(f"{path}: got {got}, wanted {wanted_shape}")
    raise_all(AdapterError, "these adapters are not those of the plan", sorted(found))


def decode(
    plan: Plan, tensors: Mapping[str, np.ndarray], names: Names = paths.module_of
) -> dict[str, Adapter | Full]:
    """Return the adapters that the file's tensors are, strictly: all of them and nothing else.

    Args:
        plan: the plan made from the file's configuration.
        tensors: the file.
        names: as in ``encode``.

    Raises:
        AdapterError: lists every missing, unexpected, misshapen and non-finite tensor.
    """
    adapters, problems = decode_what_fits(plan, tensors, names)
    raise_all(AdapterError, "this adapter file does not fit the model", problems)
    return adapters


def decode_what_fits(
    plan: Plan, tensors: Mapping[str, np.ndarray], names: Names = paths.module_of
) -> tuple[dict[str, Adapter | Full], list[str]]:
    """Return the adapters whose tensors are all there and fit, and everything else as problems.

    Raises:
        AdapterError: the plan has adapters that files have no tensors for.
    """
    _refuse_what_has_no_place(plan)
    expected = {slot.key: slot for slot in slots(plan, names)}
    tensors = {key: t for key, t in tensors.items() if not _said_twice(key, tensors, expected)}
    found = {
        key: f"{key}: missing, wanted {expected[key].shape}" for key in expected.keys() - tensors
    }
    for key in expected.keys() & tensors.keys():
        if problem := _misfit(tensors[key], expected[key].shape):
            found[key] = f"{key}: {problem}"
    lost = {expected[key].path for key in found}
    found |= {key: f"{key}: {_unexpected(key)}" for key in tensors.keys() - expected.keys()}
    by_part: dict[tuple[str, str], list[Slot]] = {}
    for slot in expected.values():
        by_part.setdefault((slot.path, slot.part), []).append(slot)

    def read(leaf: LeafPlan, part: str) -> Any:
        return jnp.asarray(_from_matrices(leaf, part, by_part[leaf.path, part], tensors))

    adapters: dict[str, Adapter | Full] = {}
    for leaf in plan.leaves:
        if leaf.path in lost:
            continue
        if leaf.adapted:
            parts = {part: read(leaf, part) for part in _shapes(leaf)}
            adapters[leaf.path] = leaf.adapter(dropout=plan.config.lora_dropout, **parts)
        elif leaf.path in plan.full:
            adapters[leaf.path] = Full(read(leaf, "value"))
    return adapters, sorted(found.values())


def _misfit(tensor: np.ndarray, wanted: tuple[int, ...]) -> str | None:
    if tuple(tensor.shape) != wanted:
        return f"got {tuple(tensor.shape)}, wanted {wanted}"
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return f"got {tensor.dtype}, wanted floating point"
    if jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
        return f"got {tensor.dtype}, which JAX holds only with jax_enable_x64"
    return None if is_finite(tensor) else "holds NaN or infinite values"


def _unexpected(key: str) -> str:
    if not key.startswith(PREFIX):
        return f"unexpected, wanted a name that begins with {PREFIX}"
    base = ".lora_" not in key and key.rpartition(".")[2] in ("weight", "bias")
    return "unexpected: base weights inside the file" if base else "unexpected"


def _said_twice(key: str, tensors: Mapping[str, np.ndarray], expected: Mapping[str, Slot]) -> bool:
    """Tell what PEFT's ``bias="all"`` adds for a saved module: its bias again, and the base's."""
    again = key.replace(".modules_to_save.", ".")
    if again != key and again in expected and again in tensors:
        return np.array_equal(tensors[key], tensors[again])
    return key not in expected and key.replace(".original_module.", ".") in expected


def slots(plan: Plan, names: Names = paths.module_of) -> list[Slot]:
    """Return every tensor that a file for this plan holds.

    Raises:
        AdapterError: two parameters get the same name, or a stacked one has no place for its
            index.
    """
    modules = {paths.module_of(leaf.path) for leaf in plan.adapted}
    found = [slot for leaf in plan.leaves for slot in _slots(plan, leaf, modules, names)]
    keys = [slot.key for slot in found]
    twice = sorted({f"{s.key}: from {s.path}" for s in found if keys.count(s.key) > 1})
    raise_all(AdapterError, "these parameters get the same name in the file", twice)
    return found


def _slots(plan: Plan, leaf: LeafPlan, modules: set[str], names: Names) -> Iterator[Slot]:
    if not leaf.adapted and leaf.path not in plan.full:
        return
    a_name, b_name = ("lora_A.weight", "lora_B.weight")
    if leaf.looked_up:
        a_name, b_name = ("lora_embedding_A", "lora_embedding_B")
    module = names(leaf.path)
    stacked = pick(leaf.shape, leaf.axes, STACKED) if leaf.axes else ()
    if module.count("{}") != len(stacked):
        raise AdapterError(
            f"{leaf.path}: got the name {module!r}, wanted one with {len(stacked)} '{{}}' for its "
            f"stacked axes of size {stacked}. Pass names=…"
        )
    for index in itertools.product(*map(range, stacked)):
        name = PREFIX + module.format(*index)
        if leaf.adapted:
            fan_out, fan_in, *window = _file_shape(leaf)
            ones = (1,) * len(window)
            yield Slot(f"{name}.{a_name}", leaf.path, "a", index, (leaf.r, fan_in, *window))
            yield Slot(f"{name}.{b_name}", leaf.path, "b", index, (fan_out, leaf.r, *ones))
            if leaf.dora:
                shape = (1, fan_out, *ones) if window else (fan_out,)
                yield Slot(f"{name}.{MAGNITUDE}", leaf.path, "magnitude", index, shape)
        else:
            bias = paths.leaf_name(leaf.path) in paths.BIAS_NAMES
            wrapped = ".base_layer" if bias and paths.module_of(leaf.path) in modules else ""
            key = f"{name}{wrapped}.{'bias' if bias else 'weight'}"
            shape = _file_shape(leaf) if leaf.axes else leaf.shape
            yield Slot(key, leaf.path, "value", index, shape)


def _refuse_what_has_no_place(plan: Plan) -> None:
    """Raise for adapters that PEFT's file, or this version of ours, has no tensors for."""
    init = plan.config.init_lora_weights
    if changes_base(init):
        raise AdapterError(
            f"init_lora_weights={init!r} changed the base, and a file is for the original one: "
            "save what lora_jax.inits.relative_to(plan, original, adapters) returns; in PEFT, "
            "save with path_initial_model_for_weight_conversion"
        )
    kinds = {
        "a range of columns, which PEFT does not know": lambda leaf: leaf.columns is not None,
        "a grouped convolution, where PEFT's A sees all channels": lambda leaf: leaf.groups > 1,
    }
    raise_all(
        AdapterError,
        "these adapters cannot be saved in PEFT's format; merge them, or leave them out",
        (
            f"{leaf.name}: {kind}"
            for leaf in plan.adapted
            for kind, is_one in kinds.items()
            if is_one(leaf)
        ),
    )


def _file_shape(leaf: LeafPlan) -> tuple[int, ...]:
    """Return the shape that the file gives a weight: ``(out, in, *window)``."""
    _, out, in_, window = _in_file_order(leaf)
    sizes = [[leaf.shape[axis] for axis in axes] for axes in (out, in_, window)]
    return (math.prod(sizes[0]), math.prod(sizes[1]), *sizes[2])


def _shapes(leaf: LeafPlan) -> dict[str, tuple[int, ...]]:
    """Return the shape of every part of an adapter."""
    magnitude = {"magnitude": leaf.magnitude_shape} if leaf.dora else {}
    return {"a": leaf.a_shape, "b": leaf.b_shape} | magnitude


def _in_file_order(leaf: LeafPlan) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return a weight's axes in the order of the file: stacked, out, in, and the window's."""

    def axes(letter: str, window: bool = False) -> list[int]:
        return [
            n
            for n, own in enumerate(leaf.axes)
            if own == letter and (n in leaf.window) == (window and letter == IN)
        ]

    return axes(STACKED), axes(OUT), axes(IN), axes(IN, window=True)


def _order(leaf: LeafPlan, part: str) -> list[int]:
    """Return the axes of a part of the adapter, or of a whole weight, in the order of the file."""
    stacked, out, in_, window = _in_file_order(leaf)
    if part == "value":
        return [*stacked, *out, *in_, *window]
    held = [n for n, letter in enumerate(leaf.axes) if letter == (IN if part == "a" else OUT)]
    first = len(stacked) + (part == "b")
    place = {axis: first + n for n, axis in enumerate(held)}
    rank = {"a": first + len(held), "b": len(stacked)}
    own = {
        "a": [rank["a"], *(place.get(axis) for axis in (*in_, *window))],
        "b": [*(place.get(axis) for axis in out), rank["b"]],
        "magnitude": [place.get(axis) for axis in out],
    }
    return [*range(len(stacked)), *own[part]]


def _to_matrix(whole: np.ndarray, leaf: LeafPlan, slot: Slot) -> np.ndarray:
    return whole.transpose(_order(leaf, slot.part))[slot.index] if leaf.axes else whole


def _from_matrices(
    leaf: LeafPlan, part: str, parts: list[Slot], tensors: Mapping[str, np.ndarray]
) -> np.ndarray:
    if part == "value" and not leaf.axes:
        return tensors[parts[0].key]
    shape = leaf.shape if part == "value" else _shapes(leaf)[part]
    order = _order(leaf, part)
    whole = np.stack([tensors[slot.key] for slot in parts]).reshape([shape[n] for n in order])
    return np.ascontiguousarray(whole.transpose(np.argsort(order)))


def is_finite(tensor: np.ndarray) -> bool:
    """Tell whether a tensor of any floating dtype holds neither NaN nor infinity."""
    # numpy has no isfinite for every extension dtype; float32 holds them all.
    wide = tensor if tensor.dtype == np.float64 else tensor.astype(np.float32)
    return bool(np.isfinite(wide).all())
