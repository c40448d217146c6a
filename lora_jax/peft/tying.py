"""Weights that an embedding and an output head share, as PEFT's files have them; pure functions.

Here a tied weight is one leaf, and whatever is trained of it changes all its uses. PEFT 0.21.2 has
two modules, and what it does with them depends on the field and on the names:

========================== ======================== =============== ===============
trained of the embedding   ``ensure_weight_tying``  head, unmerged  head, merged
========================== ======================== =============== ===============
rows (tokens)              either                   changes, too    changes, too
low-rank pair              as PEFT needs it         changes, too    has it twice
low-rank pair              otherwise                stays           changes, too
``modules_to_save``        as PEFT needs it         changes, too    changes, too
``modules_to_save``        otherwise                stays           stays
========================== ======================== =============== ===============

PEFT needs the field set and ``embed_tokens`` or ``lm_head`` named, by these names alone: GPT-2's
``wte`` is never tied. Its file then holds what the head has of the embedding again.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping

import numpy as np

from ..core.config.lora_config import LoraConfig
from ..core.errors import AdapterError, raise_all
from ..rewrite import LeafPlan, Plan
from .keys import PREFIX

EMBEDDING, HEAD = "embed_tokens", "lm_head"


def check(plan: Plan, config: LoraConfig, names: Mapping[str, str]) -> None:
    """Refuse or warn where PEFT would give other numbers with this file than we do.

    Args:
        plan: of the model.
        config: the file's, in PyTorch's names.
        names: the PyTorch module of every path that the file holds.

    Raises:
        AdapterError: lists the tied weights that ``modules_to_save`` means and PEFT does not tie.
    """
    loose = [leaf for leaf in _tied(plan) if not _ties(leaf, plan, config, names)]
    raise_all(
        AdapterError,
        "the output head shares these weights, which are trained in full. PEFT would train a copy "
        "for the embedding alone: it ties only what ensure_weight_tying=True and the name "
        f"{EMBEDDING!r} in modules_to_save say. Merge them instead",
        (f"{leaf.path}: the file's {names[leaf.path]}" for leaf in loose if not leaf.adapted),
    )
    if spared := [names[leaf.path] for leaf in loose]:
        warnings.warn(
            f"the output head shares the weight of {', '.join(spared)}: here it changes with it, "
            "as in PEFT once merged; unmerged, PEFT leaves the head as it was"
            + ("" if config.ensure_weight_tying else " unless ensure_weight_tying=True is set"),
            stacklevel=3,
        )


def copies(
    plan: Plan, config: LoraConfig, names: Mapping[str, str], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return what PEFT's file has for the tied head: the embedding's own, ``ΔWᵀ = BᵀAᵀ``."""
    return {
        copy: np.ascontiguousarray(tensors[key].T if turned else tensors[key])
        for copy, key, turned in _keys(plan, config, names)
        if key in tensors
    }


def without_copies(
    plan: Plan, config: LoraConfig, names: Mapping[str, str], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the file's tensors without those of the tied head that are the embedding's own.

    One that differs stays, and nothing in the plan expects it.
    """
    again = {
        copy
        for copy, value in copies(plan, config, names, tensors).items()
        if copy in tensors and np.array_equal(tensors[copy], value)
    }
    return {key: value for key, value in tensors.items() if key not in again}


def _tied(plan: Plan) -> list[LeafPlan]:
    """Return the tied weights that are trained, but for rows, which PEFT always ties."""
    return [leaf for leaf in plan.leaves if leaf.tied and (leaf.adapted or leaf.path in plan.full)]


def _ties(leaf: LeafPlan, plan: Plan, config: LoraConfig, names: Mapping[str, str]) -> bool:
    """Tell whether PEFT would tie the head to what is trained of this embedding."""
    named = names[leaf.path].rpartition(".")[2] == EMBEDDING
    if not (config.ensure_weight_tying and named) or leaf.dora:
        return False
    meant = config.target_modules if leaf.adapted else config.modules_to_save
    if isinstance(meant, str):
        return any(re.fullmatch(meant, name) for name in (EMBEDDING, HEAD))
    # Where modules_to_save names one of them, PEFT looks no further.
    saved = {name.rpartition(".")[2] for name in config.modules_to_save or ()}
    return not leaf.adapted or not saved & {EMBEDDING, HEAD}


def _keys(
    plan: Plan, config: LoraConfig, names: Mapping[str, str]
) -> Iterator[tuple[str, str, bool]]:
    """Yield the head's key, the embedding's, and whether one is the other transposed."""
    for leaf in _tied(plan):
        if not _ties(leaf, plan, config, names):
            continue
        own = PREFIX + names[leaf.path]
        if leaf.adapted:
            yield f"{PREFIX}{HEAD}.lora_A.weight", f"{own}.lora_embedding_B", True
            yield f"{PREFIX}{HEAD}.lora_B.weight", f"{own}.lora_embedding_A", True
        else:
            yield f"{PREFIX}{HEAD}.weight", f"{own}.weight", False
