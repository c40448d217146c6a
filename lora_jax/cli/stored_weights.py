"""Where the entries of an adapter file go in a model's stored tensors; pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..adapters.svd import pairs_of
from ..core import paths, token_indices
from ..core.adapter import Adapter, Entry, Full, Rows
from ..core.config import lora_config
from ..core.config.lora_config import LoraConfig, matches
from ..core.errors import AdapterError, AssetError, raise_all
from ..core.io import lfs_pointers
from ..core.io.intake import parse_json, problem_of, read_bytes, reason
from ..peft import renamed_families
from ..peft.base_weights import is_vocabulary
from ..peft.module_tensors import LINEAR, LOOKED_UP
from ..peft.tying import HEAD
from ..rewrite.planning.token_rows import is_input_embedding
from .checkpoint import Checkpoint

Changes = Mapping[str, Entry]

_FLOATS = ("F32", "F16", "BF16")
_WITH_HEADS = ("CausalLM", "LMHead", "MaskedLM", "ConditionalGeneration", "DoubleHeads")

_TIED = (
    ", as its output head shares the embedding's weight (tie_word_embeddings); save the model with "
    "a head of its own, or keep the adapter apart"
)


def place(
    adapters: Changes, checkpoint: Checkpoint, *, transposed: bool = False
) -> dict[str, Entry]:
    """Return the adapters by the names of the stored tensors, with the stored axes.

    A base model is stored with or without its own prefix, ``bert.`` say; one prefix is put on
    or taken off for all names together. Where that does not do, a known family's other names
    are the model's (``peft.renamed_families``). A ``Conv1D`` is stored the other way round: shapes
    tell, and where a weight is square, what the others of this adapter are.

    Args:
        adapters: what ``open_adapter`` returns, without base weights under a pair.
        checkpoint: the model.
        transposed: whether square weights are those of ``Conv1D`` where the others do not tell.

    Raises:
        AdapterError: lists every module that is not in the model or does not fit it.
    """
    names = stored_names(adapters, checkpoint.shapes)
    problems = [p for name, one in adapters.items() for p in _misfit(names[name], one, checkpoint)]
    raise_all(AdapterError, "this adapter does not fit the model", problems)
    shapes = {name: checkpoint.shapes[key] for name, key in names.items()}
    axes = {
        name: LINEAR if shapes[name] == (one.b.shape[1], one.a.shape[0]) else LOOKED_UP
        for name, one in pairs_of(adapters).items()
        if one.axes == LINEAR
    }
    told = {axes[name] for name in axes if len(set(shapes[name])) == 2}
    square = told.pop() if len(told) == 1 else (LOOKED_UP if transposed else LINEAR)
    axes |= {name: square for name in axes if len(set(shapes[name])) == 1}
    return {
        names[name]: replace(one, axes=axes[name]) if name in axes else one  # pyright: ignore
        for name, one in adapters.items()
    }


def biases(adapters: Changes, checkpoint: Checkpoint) -> dict[str, Adapter]:
    """Return the pairs with a bias of their own (``lora_bias``) by the stored bias's name.

    Raises:
        AdapterError: lists those whose module has no bias, or one of another shape.
    """
    names = stored_names(adapters, checkpoint.shapes)
    found, problems = {}, []
    for name, one in pairs_of(adapters).items():
        if one.bias is None:
            continue
        key = names[name].removesuffix(".weight") + ".bias"
        shape, dtype = checkpoint.shapes.get(key), checkpoint.dtypes.get(key)
        if shape is None:
            problems.append(f"{key}: not in the model, so there is no bias to add lora_bias to")
        elif shape != one.bias.shape or dtype not in _FLOATS:
            problems.append(f"{key}: lora_bias is {one.bias.shape}, the model has {dtype}{shape}")
        found[key] = one
    raise_all(AdapterError, "this adapter's lora_bias does not fit the model", problems)
    return found


def without_tied(adapters: Changes, checkpoint: Checkpoint) -> tuple[dict[str, Entry], set[str]]:
    """Return the entries without those of a head that the model stores as the embedding.

    PEFT with ``ensure_weight_tying`` writes what the head has of the embedding once more. Where
    it is that, the stored weight changes once, for both; others stay, and do not fit the model.

    Returns:
        The entries, and the names of the embeddings whose head has the same.
    """
    kept, tied = dict(adapters), set[str]()
    if any(f"{HEAD}.weight" in key for key in checkpoint.shapes):
        return kept, tied
    for name, head in adapters.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] != HEAD:
            continue
        for other, one in adapters.items():
            if is_input_embedding(other.removesuffix(".weight")) and _is_copy(head, one):
                kept.pop(name, None)
                tied.add(other)
    return kept, tied


def refuse_unmet(config: LoraConfig, adapters: Changes, checkpoint: Checkpoint) -> list[str]:
    """Return the listed targets that this model has not, as lines for the report.

    Raises:
        AdapterError: lists the modules of the model that a target names and the file has not.
    """
    targets = config.target_modules
    pairs = pairs_of(adapters)
    if targets is None or isinstance(targets, str):
        return []
    unmet = [name for name in targets if not any(matches([name], module) for module in pairs)]
    matrices = [
        key.removesuffix(".weight")
        for key, shape in checkpoint.shapes.items()
        if key.endswith(".weight") and len(shape) >= 2
    ]
    raise_all(
        AdapterError,
        "the file has no adapter for modules that target_modules names",
        (
            f"{module}: {name!r} means it"
            for name in unmet
            for module in matrices
            if matches([name], module) and not matches(config.exclude_modules, module)
        ),
    )
    return [f"target_modules: {name!r} names nothing in this model" for name in unmet]


def stored_names(adapters: Changes, stored: Mapping[str, Any]) -> dict[str, str]:
    """Return the stored tensor's name of every adapter, in the way that finds most of them."""
    plain = plain_names(adapters)
    if renamed := family_of(adapters, stored):
        return {name: renamed.to_model(key) for name, key in plain.items()}
    best = _prefixing(plain, stored)
    return {name: best(key) for name, key in plain.items()}


def plain_names(adapters: Changes) -> dict[str, str]:
    """Return the parameter of each entry: a pair is named by its module."""
    return {n: n if isinstance(one, Full) else f"{n}.weight" for n, one in adapters.items()}


def _prefixing(plain: Mapping[str, str], stored: Mapping[str, Any]) -> Callable[[str], str]:
    ways: list[Callable[[str], str]] = [str]
    for first in sorted({key.partition(".")[0] for key in plain.values()}):
        ways.append(lambda key, first=first: key.removeprefix(f"{first}."))
    for first in sorted({key.partition(".")[0] for key in stored}):
        ways.append(lambda key, first=first: f"{first}.{key}")
    return max(ways, key=lambda way: sum(way(key) in stored for key in plain.values()))


def family_of(adapters: Changes, stored: Mapping[str, Any]) -> renamed_families.Rename | None:
    """Return how a family's other names become the model's, where no prefix alone does it."""
    plain = plain_names(adapters)
    prefixed = map(_prefixing(plain, stored), plain.values())
    if all(key in stored for key in prefixed):
        return None
    return renamed_families.find(sorted(plain.values()), stored.keys())


def is_tied(checkpoint: Checkpoint) -> bool:
    """Tell whether the model has an output head that shares the embedding's weight."""
    path = checkpoint.directory / "config.json"
    lfs_pointers.refuse(path, AssetError)
    try:
        config = parse_json(read_bytes(path)) if problem_of(path) != "missing" else {}
        kinds = " ".join(config.get("architectures") or ())
        tied = config.get("tie_word_embeddings", True)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise AssetError(f"{path} is not a model's configuration: {reason(error)}") from error
    has_head = any(kind in kinds for kind in _WITH_HEADS)
    return bool(tied) and has_head and not any("lm_head.weight" in key for key in checkpoint.shapes)


def _is_tied_head(key: str, checkpoint: Checkpoint) -> bool:
    return lora_config.is_output_head(paths.module_of(key)) and is_tied(checkpoint)


def _is_copy(head: Entry, embedding: Entry) -> bool:
    """Tell whether a head has the embedding's own weight or pair: ``ΔWᵀ = BᵀAᵀ``."""
    if isinstance(head, Full) and isinstance(embedding, Full):
        return np.array_equal(np.asarray(head.value), np.asarray(embedding.value))
    if not (isinstance(head, Adapter) and isinstance(embedding, Adapter)):
        return False
    plain = head.magnitude is None and embedding.magnitude is None
    return (
        plain
        and bool(head.scale == embedding.scale)
        and np.array_equal(np.asarray(head.a), np.asarray(embedding.b).T)
        and np.array_equal(np.asarray(head.b), np.asarray(embedding.a).T)
    )


def _misfit(key: str, one: Entry, checkpoint: Checkpoint) -> list[str]:
    shape, dtype = checkpoint.shapes.get(key), checkpoint.dtypes.get(key)
    if shape is None:
        return [f"{key}: not in the model{_TIED if _is_tied_head(key, checkpoint) else ''}"]
    if dtype not in _FLOATS:
        return [f"{key}: stored as {dtype}, wanted one of {', '.join(_FLOATS)}"]
    if isinstance(one, Rows):
        found = token_indices.problems(one.indices, shape[0])
        if len(shape) != 2 or shape[1:] != one.values.shape[1:]:
            found.append(f"rows of {one.values.shape[1:]}, the model has {shape}")
        return [f"{key}: {problem}" for problem in found]
    if isinstance(one, Full):
        wanted = [tuple(one.value.shape)]
    else:
        fan_in, out = one.a.shape[:-1], one.b.shape[1]
        wanted = [(*fan_in, out)] if one.axes == LOOKED_UP else [(out, *fan_in)]
        wanted += [(*fan_in, out)] if one.axes == LINEAR else []
    if shape in wanted:
        return []
    resized = is_vocabulary(key.removesuffix(".weight")) and shape[1:] == wanted[0][1:]
    hint = ": the vocabulary was resized, resize the model's first" if resized else ""
    return [f"{key}: the adapter is for {wanted[0]}, the model has {shape}{hint}"]
