"""``adapter_model.safetensors`` with a plan: PEFT's tensors encoded and decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import paths
from ..core.adapter import Adapter, Adapters, Entry, Full, Rows
from ..core.config import lora_config
from ..core.config.lora_config import LoraConfig
from ..core.errors import AdapterError, raise_all
from ..core.initializers import changes_base
from ..rewrite import LeafPlan, Plan
from .keys import PREFIX, Names, Slot, from_matrices, shapes, slots, to_matrix
from .spellings import owner


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
        matrix = to_matrix(whole, leaf, slot)
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
    rows = {leaf.path: leaf for leaf in plan.leaves if leaf.rows}
    wanted = planned.keys() | plan.full.keys() | rows.keys()
    found = [f"{path}: planned, but there is no adapter" for path in wanted - adapters.keys()]
    found += [f"{path}: an adapter, but not planned" for path in adapters.keys() - wanted]
    for path in wanted & adapters.keys():
        entry, leaf = adapters[path], planned.get(path)
        if not isinstance(entry, Adapter if leaf else Rows if path in rows else Full):
            whole = f"the rows {rows[path].rows}" if path in rows else "the whole parameter"
            kind = "A and B" if leaf else whole
            found.append(f"{path}: got {type(entry).__name__}, wanted {kind}")
        elif leaf and isinstance(entry, Adapter):
            sizes = shapes(leaf)
            got = {part: np.shape(getattr(entry, part)) for part in sizes}
            more = (entry.magnitude is not None, entry.bias is not None)
            if got != sizes or more != (leaf.dora, leaf.biased):
                found.append(f"{path}: got {got}, wanted {sizes}")
            if entry.scale is None or not np.allclose(entry.scale, leaf.scale, rtol=1e-6, atol=0):
                found.append(
                    f"{path}: got scale {entry.scale}, the configuration's is {leaf.scale:g}"
                )
        elif isinstance(entry, Rows):
            like = rows[path].with_rows(entry.values)
            if (entry.indices, entry.axes, entry.axis) != (like.indices, like.axes, like.axis):
                found.append(f"{path}: got the rows {entry.indices}, wanted {like.indices}")
            got, wanted_shape = np.shape(entry.values), rows[path].rows_shape
            if got != wanted_shape:
                found.append(f"{path}: rows got {got}, wanted {wanted_shape}")
        elif isinstance(entry, Full):
            got, wanted_shape = np.shape(entry.value), tuple(plan.full[path].shape)
            if got != wanted_shape:
                found.append(f"{path}: got {got}, wanted {wanted_shape}")
    raise_all(AdapterError, "these adapters are not those of the plan", sorted(found))


def decode(
    plan: Plan, tensors: Mapping[str, np.ndarray], names: Names = paths.module_of
) -> dict[str, Entry]:
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
) -> tuple[dict[str, Entry], list[str]]:
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
    found |= {key: f"{key}: {_unexpected(key, plan)}" for key in tensors.keys() - expected.keys()}
    by_part: dict[tuple[str, str], list[Slot]] = {}
    for slot in expected.values():
        by_part.setdefault((slot.path, slot.part), []).append(slot)

    def read(leaf: LeafPlan, part: str) -> Any:
        return jnp.asarray(from_matrices(leaf, part, by_part[leaf.path, part], tensors))

    adapters: dict[str, Entry] = {}
    for leaf in plan.leaves:
        if leaf.path in lost:
            continue
        if leaf.adapted:
            parts = {part: read(leaf, part) for part in shapes(leaf)}
            adapters[leaf.path] = leaf.adapter(dropout=plan.config.lora_dropout, **parts)
        elif leaf.rows:
            adapters[leaf.path] = leaf.with_rows(read(leaf, "values"))
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


def _unexpected(key: str, plan: Plan) -> str:
    if not key.startswith(PREFIX):
        return (
            f"unexpected, wanted a name that begins with {PREFIX}; `lora-jax convert` writes the "
            "file with it"
        )
    shared, module = [leaf.path for leaf in plan.leaves if leaf.tied], owner(key)
    if (
        shared
        and lora_config.is_output_head(module)
        and all(module != o.module for o in plan.leaves)
    ):
        return f"unexpected, as the model's output head is tied: it shares {', '.join(shared)}"
    base = ".lora_" not in key and key.rpartition(".")[2] in ("weight", "bias")
    return "unexpected: base weights inside the file" if base else "unexpected"


def _said_twice(key: str, tensors: Mapping[str, np.ndarray], expected: Mapping[str, Slot]) -> bool:
    """Tell what PEFT's ``bias="all"`` adds for a saved module: its bias again, and the base's."""
    again = key.replace(".modules_to_save.", ".")
    if again != key and again in expected and again in tensors:
        return np.array_equal(tensors[key], tensors[again])
    return key not in expected and key.replace(".original_module.", ".") in expected


def _refuse_what_has_no_place(plan: Plan) -> None:
    """Raise for adapters that PEFT's file, or this version of ours, has no tensors for."""
    if problem := changed_base(plan.config):
        raise AdapterError(problem)
    attention = paths.attentions([leaf.path for leaf in plan.leaves])
    adapted = [attention.get(leaf.path) for leaf in plan.adapted]
    halves = {owner for owner in attention.values() if adapted.count(owner) == 1}
    kinds = {
        "a range of columns, which PEFT does not know": lambda leaf: leaf.columns is not None,
        "a grouped convolution, where PEFT's A sees all channels": lambda leaf: leaf.groups > 1,
        "DoRA in an nn.MultiheadAttention, which PEFT refuses": lambda leaf: (
            leaf.dora and leaf.path in attention
        ),
        "half of an nn.MultiheadAttention, which PEFT adapts as a whole by its name": lambda leaf: (
            attention.get(leaf.path) in halves
        ),
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


def changed_base(config: LoraConfig) -> str | None:
    """Return what to do about adapters of a base that their initialisation changed.

    Beside the original base their numbers are wrong, so that every path asks this first.
    """
    init = config.init_lora_weights
    if not changes_base(init):
        return None
    return (
        f"init_lora_weights={init!r} changed the base, and a file is for the original one: "
        "save what lora_jax.relative_to(plan, original, adapters) returns, or the base, "
        "too, and the adapters with lora_jax.for_changed_base(plan); in PEFT, save with "
        "path_initial_model_for_weight_conversion"
    )


def is_finite(tensor: np.ndarray) -> bool:
    """Tell whether a tensor of any floating dtype holds neither NaN nor infinity."""
    # numpy has no isfinite for every extension dtype; float32 holds them all.
    wide = tensor if tensor.dtype == np.float64 else tensor.astype(np.float32)
    return bool(np.isfinite(wide).all())
