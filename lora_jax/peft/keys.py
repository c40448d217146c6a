"""Which tensor of PEFT's file holds which part of a plan's adapters, and how it lies there.

PEFT keeps a linear layer's A as ``[r, in]`` and its B as ``[out, r]``, an embedding's alike under
names of their own, a convolution's as ``[r, in, *window]`` and ``[out, r, 1, …]``; axes that the
model splits, such as heads, are flattened, and layers stacked for a scan are written one by one.
The experts of a parameter named by ``target_parameters`` are in one tensor, see ``experts``.
An ``nn.MultiheadAttention`` has a pair of its own and its ``out_proj`` another, whose ``B`` is
half of ours: PEFT 0.21.2 adds that change twice (see ``HALVED``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..core import paths
from ..core.adapter import IN, OUT, STACKED, pick
from ..core.config import lora_config
from ..core.config.lora_config import LoraConfig
from ..core.errors import AdapterError, raise_all
from ..rewrite import LeafPlan, Plan
from .shapes import experts

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
BIAS = "lora_B.bias"
ROWS = "token_adapter.trainable_tokens_delta"

# PEFT's layer for nn.MultiheadAttention adds out_proj's change itself and once more through
# out_proj's own layer, merged or not. Its files mean W + 2s·BA, so that B is halved on the way
# there and doubled on the way back, both exact; the modules of this name carry it.
HALVED = f".base_layer.{paths.OUT_PROJ}"

Names = Callable[[str], str]


@dataclass(frozen=True)
class Slot:
    """One tensor of the file and the part of the adapters that it holds.

    Args:
        key: the tensor's name in the file.
        path: the parameter.
        part: ``"a"``, ``"b"``, ``"magnitude"``, ``"bias"``, ``"value"`` or ``"values"``, those of
            rows.
        index: the indices of the stacked axes; empty without any.
        shape: the tensor's shape in the file.
        packing: how the tensor holds several experts; empty where it holds a module's.
        factor: how many times the adapters' part is what the file holds.
    """

    key: str
    path: str
    part: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    packing: str = ""
    factor: int = 1


def slots(plan: Plan, names: Names = paths.module_of) -> list[Slot]:
    """Return every tensor that a file for this plan holds.

    Raises:
        AdapterError: two parameters get the same name, or a stacked one has no place for its
            index.
    """
    bare = {leaf.path: leaf for leaf in plan.adapted if is_bare(plan.config, leaf)}
    held = {path: experts.in_torch(path, names(path)) for path in bare}
    problems = {path: experts.shape_problem(bare[path], name) for path, name in held.items()}
    raise_all(
        AdapterError,
        "these target_parameters have no place in the file",
        (f"{path}: {problem}" for path, problem in problems.items() if problem),
    )
    wrappers = experts.wrappers(plan.config, held)
    hosts = {paths.module_of(leaf.path): leaf for leaf in plan.adapted if leaf.path not in bare}
    found = []
    for leaf in plan.leaves:
        if leaf.path in bare:
            found += _packed_slots(plan, leaf, held[leaf.path], wrappers)
        else:
            found += _slots(plan, leaf, hosts, lambda path: wrappers.inside(names(path)))
    keys = [slot.key for slot in found]
    twice = sorted({f"{s.key}: from {s.path}" for s in found if keys.count(s.key) > 1})
    raise_all(AdapterError, "these parameters get the same name in the file", twice)
    return found


def is_held(plan: Plan, leaf: LeafPlan) -> bool:
    """Tell whether a file for this plan holds anything of a parameter."""
    return leaf.adapted or bool(leaf.rows) or leaf.path in plan.full


def _slots(
    plan: Plan, leaf: LeafPlan, hosts: Mapping[str, LeafPlan], names: Names
) -> Iterator[Slot]:
    if not is_held(plan, leaf):
        return
    a_name, b_name = ("lora_A.weight", "lora_B.weight")
    if leaf.looked_up:
        a_name, b_name = ("lora_embedding_A", "lora_embedding_B")
    module, host = names(leaf.path), hosts.get(paths.module_of(leaf.path))
    if host is not None and host.owner:
        module = module.removesuffix(f".{paths.OUT_PROJ}") + HALVED
    stacked = pick(leaf.shape, leaf.axes, STACKED) if leaf.axes else ()
    if module.count("{}") != len(stacked):
        raise AdapterError(
            f"{leaf.path}: got the name {module!r}, wanted one with {len(stacked)} '{{}}' for its "
            f"stacked axes of size {stacked}. Pass names=…"
        )
    for index in itertools.product(*map(range, stacked)):
        name = PREFIX + module.format(*index)
        if leaf.adapted:
            fan_out, fan_in, *window = file_shape(leaf)
            ones = (1,) * len(window)
            yield Slot(f"{name}.{a_name}", leaf.path, "a", index, (leaf.r, fan_in, *window))
            b_shape, factor = (fan_out, leaf.r, *ones), 2 if leaf.owner else 1
            yield Slot(f"{name}.{b_name}", leaf.path, "b", index, b_shape, factor=factor)
            if leaf.dora:
                shape = (1, fan_out, *ones) if window else (fan_out,)
                yield Slot(f"{name}.{MAGNITUDE}", leaf.path, "magnitude", index, shape)
            if leaf.biased:
                yield Slot(f"{name}.{BIAS}", leaf.path, "bias", index, (fan_out,))
        elif leaf.rows:
            yield Slot(f"{name}.{ROWS}", leaf.path, "values", index, leaf.rows_shape)
        else:
            bias = paths.leaf_name(leaf.path) in paths.BIAS_NAMES
            wrapped = ".base_layer" if bias and host is not None else ""
            key = f"{name}{wrapped}.{'bias' if bias else 'weight'}"
            shape = file_shape(leaf, whole=True) if leaf.axes else leaf.shape
            yield Slot(key, leaf.path, "value", index, shape)


def is_bare(config: LoraConfig, leaf: LeafPlan) -> bool:
    """Tell whether ``target_parameters`` means a parameter, so that its experts are packed."""
    return lora_config.parameter_name(config, leaf.path) is not None


def _packed_slots(
    plan: Plan, leaf: LeafPlan, name: str, wrappers: experts.Wrappers
) -> Iterator[Slot]:
    """Yield the two tensors of a parameter's experts, for each index that its name has."""
    stacked, place = pick(leaf.shape, leaf.axes, STACKED), wrappers.around(name)
    indexed = name.count("{}")
    for index in itertools.product(*map(range, stacked[:indexed])):
        key = f"{PREFIX}{place.format(*index)}"
        for packing, part in experts.halves(plan.config, leaf).items():
            size, *_ = pick(leaf.shape, leaf.axes, IN if part == "a" else OUT)
            packed = leaf.r * math.prod(stacked[indexed:])
            half, shape = "lora_A", (packed, size)
            if packing == experts.FAST:
                half, shape = "lora_B", (size, packed)
            yield Slot(f"{key}.{half}.weight", leaf.path, part, index, shape, packing)


def file_shape(leaf: LeafPlan, *, whole: bool = False) -> tuple[int, ...]:
    """Return the shape that the file gives a weight: ``(out, in, *window)``.

    A ``whole`` embedding is the other way round: PyTorch keeps a row for each token.
    """
    _, out, in_, window = _axes_in_file(leaf)
    order = (in_, out, window) if whole and leaf.looked_up else (out, in_, window)
    sizes = [[leaf.shape[axis] for axis in axes] for axes in order]
    return (math.prod(sizes[0]), math.prod(sizes[1]), *sizes[2])


def shapes(leaf: LeafPlan) -> dict[str, tuple[int, ...]]:
    """Return the shape of every part of an adapter."""
    magnitude = {"magnitude": leaf.magnitude_shape} if leaf.dora else {}
    bias = {"bias": leaf.bias_shape} if leaf.biased else {}
    return {"a": leaf.a_shape, "b": leaf.b_shape} | magnitude | bias


def _axes_in_file(leaf: LeafPlan) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return a weight's axes in the order of the file: stacked, out, in, and the window's."""

    def axes(letter: str, window: bool = False) -> list[int]:
        return [
            n
            for n, own in enumerate(leaf.axes)
            if own == letter and (n in leaf.window) == (window and letter == IN)
        ]

    return axes(STACKED), axes(OUT), axes(IN), axes(IN, window=True)


def file_axes(leaf: LeafPlan, part: str) -> list[int]:
    """Return the axes of a part of the adapter, or of a whole weight, in the order of the file."""
    stacked, out, in_, window = _axes_in_file(leaf)
    if part == "value":
        matrix = [*in_, *out] if leaf.looked_up else [*out, *in_]
        return [*stacked, *matrix, *window]
    held = [n for n, letter in enumerate(leaf.axes) if letter == (IN if part == "a" else OUT)]
    first = len(stacked) + (part == "b")  # magnitude and bias have no axis for the rank
    place = {axis: first + n for n, axis in enumerate(held)}
    rank = {"a": first + len(held), "b": len(stacked)}
    own = {
        "a": [rank["a"], *(place.get(axis) for axis in (*in_, *window))],
        "b": [*(place.get(axis) for axis in out), rank["b"]],
        "magnitude": [place.get(axis) for axis in out],
        "bias": [place.get(axis) for axis in out],
    }
    return [*range(len(stacked)), *own[part]]


def to_matrix(whole: np.ndarray, leaf: LeafPlan, slot: Slot) -> np.ndarray:
    """Return what one slot holds of a part of an adapter, axes in the order of the file."""
    if slot.part == "values":
        return whole
    if slot.packing:
        return experts.to_matrix(whole[slot.index], slot.part, slot.packing)
    matrix = whole.transpose(file_axes(leaf, slot.part))[slot.index] if leaf.axes else whole
    return matrix if slot.factor == 1 else matrix / matrix.dtype.type(slot.factor)


def from_matrices(
    leaf: LeafPlan, part: str, parts: list[Slot], tensors: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Return a part of an adapter from the tensors of its slots: ``to_matrix``, undone."""
    if part == "values" or (part == "value" and not leaf.axes):
        return tensors[parts[0].key]
    shape = leaf.shape if part == "value" else shapes(leaf)[part]
    if packing := parts[0].packing:
        own = [experts.from_matrix(tensors[slot.key], leaf.r, part, packing) for slot in parts]
        return np.ascontiguousarray(np.stack(own).reshape(shape))
    order = file_axes(leaf, part)
    whole = np.stack([tensors[slot.key] for slot in parts]).reshape([shape[n] for n in order])
    if parts[0].factor != 1:
        whole = whole * whole.dtype.type(parts[0].factor)
    return np.ascontiguousarray(whole.transpose(np.argsort(order)))
