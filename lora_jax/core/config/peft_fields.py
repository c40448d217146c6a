"""The fields of PEFT 0.21.2's ``LoraConfig`` that ours does not have, as a table: a row a field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_RECORDED = "what a file records: give it to save_pretrained"
_VARIANT = "another method than LoRA, with tensors or a forward pass of its own"
_INITIALISATION = "an option of an initialisation: give it to lora_jax.initialise"
_STORAGE = "how PyTorch's layers are stored or sharded; JAX's sharding needs no field"


@dataclass(frozen=True)
class Foreign:
    """A field of PEFT's.

    Args:
        default: PEFT's default.
        reason: why ``LoraConfig`` refuses every other value; empty where any value may be given,
            since it says nothing about the numbers.
        kept: whether a file may have any value, since it says nothing about a file's numbers.
    """

    default: Any
    reason: str = ""
    kept: bool = False


FOREIGN: Mapping[str, Foreign] = {
    "arrow_config": Foreign(None, "routing between adapters by their inputs is not supported"),
    "auto_mapping": Foreign(None, _RECORDED, kept=True),
    "base_model_name_or_path": Foreign(None, _RECORDED, kept=True),
    "corda_config": Foreign(None, _INITIALISATION, kept=True),
    "eva_config": Foreign(None, _INITIALISATION, kept=True),
    "fan_in_fan_out": Foreign(False, kept=True),
    "inference_mode": Foreign(True, kept=True),
    "kasa_config": Foreign(None, _VARIANT),
    "layer_replication": Foreign(
        None, "layers are not copied here: write the deeper model, then adapt it"
    ),
    "loftq_config": Foreign({}, _INITIALISATION, kept=True),
    "lora_ga_config": Foreign(None, _INITIALISATION, kept=True),
    "megatron_config": Foreign(None, _STORAGE),
    "megatron_core": Foreign("megatron.core", kept=True),
    "monteclora_config": Foreign(None, _VARIANT),
    "peft_type": Foreign("LORA", "only LoRA adapters are"),
    "peft_version": Foreign("0.21.2", _RECORDED, kept=True),
    "qalora_group_size": Foreign(16, kept=True),
    "revision": Foreign(None, kept=True),
    "runtime_config": Foreign(None, kept=True),
    "task_type": Foreign(None, _RECORDED, kept=True),
    "use_bdlora": Foreign(None, _VARIANT),
    "use_qalora": Foreign(False, _VARIANT),
    "velora_config": Foreign(None, _VARIANT),
}

# PEFT does not write it.
DEFAULTS = {name: one.default for name, one in FOREIGN.items() if name != "runtime_config"}


def refused(fields: Mapping[str, Any], *, file: bool = False) -> list[str]:
    """Return a line for every field whose value asks for what is not supported.

    Args:
        fields: by PEFT's names; others are not looked at.
        file: whether they are those of a file, where what only concerns training is kept.

    >>> refused({"use_qalora": True, "fan_in_fan_out": True, "revision": "main"})
    ['use_qalora: got True, wanted False: another method than LoRA, ... of its own']
    """
    return [
        f"{name}: got {value!r}, wanted {one.default!r}: {one.reason}"
        for name, one in FOREIGN.items()
        if one.reason and not (file and one.kept)
        for value in (fields.get(name),)
        if value != one.default and value not in (None, False, [], {}, ())
    ]
