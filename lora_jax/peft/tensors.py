"""``adapter_model.safetensors``: between PEFT's tensors and adapters, pure functions.

PEFT keeps a linear layer's A as ``[r, in]`` and its B as ``[out, r]``, and an embedding's alike
under names of their own; axes that the model splits, such as heads, are flattened, and layers
stacked for a scan are written one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import paths
from ..adapter import IN, OUT, STACKED, Adapter, Adapters, Full, pick
from ..errors import AdapterError, raise_all
from ..initializers import changes_base
from ..rewrite import LeafPlan, Plan

PREFIX = "base_model.model."

Names = Callable[[str], str]


@dataclass(frozen=True)
class Slot:
    """One tensor of the file and the part of the adapters that it holds.

    Args:
        key: the tensor's name in the file.
        path: the parameter.
        part: ``"a"``, ``"b"`` or ``"value"``.
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
    leaves = {leaf.path: leaf for leaf in plan.leaves}
    wanted = {leaf.path for leaf in plan.adapted} | set(plan.full)
    problems = [f"{path}: planned, but there is no adapter" for path in wanted - adapters.keys()]
    problems += [f"{path}: an adapter, but not planned" for path in adapters.keys() - wanted]
    raise_all(AdapterError, "these adapters are not those of the plan", sorted(problems))
    tensors = {}
    for slot in slots(plan, names):
        adapter, leaf = adapters[slot.path], leaves[slot.path]
        whole = np.asarray(getattr(adapter, slot.part))
        matrix = _to_matrix(whole, leaf, slot)
        tensors[slot.key] = np.ascontiguousarray(matrix.reshape(slot.shape))
    broken = [f"{key}: NaN or infinite" for key, t in tensors.items() if not _finite(t)]
    raise_all(AdapterError, "these adapters hold values that are not finite", broken)
    return tensors


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
    _refuse_what_has_no_place(plan)
    expected = {slot.key: slot for slot in slots(plan, names)}
    tensors = {key: t for key, t in tensors.items() if not _said_twice(key, tensors, expected)}
    problems = [
        f"{key}: missing, wanted {expected[key].shape}" for key in expected.keys() - tensors
    ]
    problems += [f"{key}: unexpected" for key in tensors.keys() - expected.keys()]
    for key in expected.keys() & tensors.keys():
        got, wanted = tuple(tensors[key].shape), expected[key].shape
        if got != wanted:
            problems.append(f"{key}: got {got}, wanted {wanted}")
        elif not jnp.issubdtype(tensors[key].dtype, jnp.floating):
            problems.append(f"{key}: got {tensors[key].dtype}, wanted floating point")
        elif not _finite(tensors[key]):
            problems.append(f"{key}: holds NaN or infinite values")
    raise_all(AdapterError, "this adapter file does not fit the model", sorted(problems))
    by_part: dict[tuple[str, str], list[Slot]] = {}
    for slot in expected.values():
        by_part.setdefault((slot.path, slot.part), []).append(slot)

    def read(leaf: LeafPlan, part: str) -> Any:
        return jnp.asarray(_from_matrices(leaf, part, by_part[leaf.path, part], tensors))

    adapters: dict[str, Adapter | Full] = {}
    for leaf in plan.leaves:
        if leaf.adapted:
            a, b = read(leaf, "a"), read(leaf, "b")
            adapters[leaf.path] = leaf.adapter(a, b, plan.config.lora_dropout)
        elif leaf.path in plan.full:
            adapters[leaf.path] = Full(read(leaf, "value"))
    return adapters


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
            fan_in = math.prod(pick(leaf.shape, leaf.axes, IN))
            fan_out = math.prod(pick(leaf.shape, leaf.axes, OUT))
            yield Slot(f"{name}.{a_name}", leaf.path, "a", index, (leaf.r, fan_in))
            yield Slot(f"{name}.{b_name}", leaf.path, "b", index, (fan_out, leaf.r))
        else:
            bias = paths.leaf_name(leaf.path) in paths.BIAS_NAMES
            wrapped = ".base_layer" if bias and paths.module_of(leaf.path) in modules else ""
            key = f"{name}{wrapped}.{'bias' if bias else 'weight'}"
            yield Slot(key, leaf.path, "value", index, _full_shape(leaf))


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
        "a convolution, which is not written yet": lambda leaf: bool(leaf.window),
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


def _full_shape(leaf: LeafPlan) -> tuple[int, ...]:
    if not leaf.axes:
        return leaf.shape
    return tuple(math.prod(pick(leaf.shape, leaf.axes, letter)) for letter in (OUT, IN))


def _to_matrix(whole: np.ndarray, leaf: LeafPlan, slot: Slot) -> np.ndarray:
    if slot.part == "value":
        return np.moveaxis(whole, *_grouped(leaf))[slot.index] if leaf.axes else whole
    one = whole[slot.index]
    return one.reshape(-1, leaf.r).T if slot.part == "a" else one.reshape(leaf.r, -1).T


def _from_matrices(
    leaf: LeafPlan, part: str, parts: list[Slot], tensors: Mapping[str, np.ndarray]
) -> np.ndarray:
    if part == "value" and not leaf.axes:
        return tensors[parts[0].key]
    matrices = np.stack([tensors[slot.key] for slot in parts])
    if part == "value":
        source, target = _grouped(leaf)
        shape = tuple(leaf.shape[axis] for axis in source)
        return np.moveaxis(matrices.reshape(shape), target, source)
    shape = leaf.a_shape if part == "a" else leaf.b_shape
    return np.ascontiguousarray(matrices.swapaxes(1, 2)).reshape(shape)


def _grouped(leaf: LeafPlan) -> tuple[list[int], list[int]]:
    """Return the axes in the file's order, stacked, out, in, and where they go."""
    source = [n for letter in (STACKED, OUT, IN) for n, a in enumerate(leaf.axes) if a == letter]
    return source, list(range(len(source)))


def _finite(tensor: np.ndarray) -> bool:
    # numpy has no isfinite for every extension dtype; float32 holds them all.
    wide = tensor if tensor.dtype == np.float64 else tensor.astype(np.float32)
    return bool(np.isfinite(wide).all())
