"""``adapter_config.json``: between PEFT's fields and ``LoraConfig``, pure functions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import LoraConfig
from ..errors import AdapterError, ConfigError, raise_all

# What PEFT 0.21.2 writes beside the fields of LoraConfig, at its defaults.
OTHER_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "revision": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}

# Fields of PEFT that say nothing about the numbers, or that only PyTorch's storage needs.
_FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}

# The names that PEFT itself accepts; ours beyond them are PEFT's default once drawn.
_PEFT_INITS = (True, False, "gaussian", "orthogonal")

# What only this library knows: it changes how the numbers are formed, or has no place in the file.
_LOCAL = ("on_unsupported", "output_slices")

_OWN = tuple(field.name for field in dataclasses.fields(LoraConfig) if field.name not in _LOCAL)


@dataclass(frozen=True)
class AdapterFile:
    """What ``adapter_config.json`` says.

    Args:
        config: the configuration.
        base_model: the model that the adapter was trained on, if recorded.
        task_type: PEFT's task type, such as ``"SEQ_CLS"``, if recorded.
    """

    config: LoraConfig
    base_model: str | None = None
    task_type: str | None = None


def encode(file: AdapterFile) -> bytes:
    """Return the file's bytes: every field PEFT writes, sorted, so equal inputs give equal bytes.

    >>> from lora_jax import LoraConfig
    >>> decode(encode(AdapterFile(LoraConfig(r=4)))).config.r
    4
    """
    own = {name: _plain(getattr(file.config, name)) for name in _OWN}
    if own["init_lora_weights"] not in _PEFT_INITS:
        own["init_lora_weights"] = True
    recorded = {"base_model_name_or_path": file.base_model, "task_type": file.task_type}
    fields = OTHER_DEFAULTS | own | recorded
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def decode(content: bytes, origin: str = "adapter_config.json") -> AdapterFile:
    """Return what the bytes say.

    Args:
        content: the file.
        origin: its name, for messages.

    Raises:
        AdapterError: not JSON, not a LoRA adapter, or fields whose effect would be lost:
            all of them are listed.
    """
    try:
        fields = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{origin} is not JSON: {error}. Save the adapter again.") from error
    if not isinstance(fields, Mapping):
        raise AdapterError(f"{origin}: got a JSON {type(fields).__name__}, wanted an object")
    raise_all(AdapterError, f"{origin} asks for what is not supported", _problems(fields))
    try:
        config = LoraConfig(**{name: fields[name] for name in _OWN if name in fields})
    except (ConfigError, TypeError, AttributeError) as error:
        raise AdapterError(f"{origin}: {error}") from error
    return AdapterFile(config, fields.get("base_model_name_or_path"), fields.get("task_type"))


def _problems(fields: Mapping[str, Any]) -> list[str]:
    found = []
    if fields.get("peft_type") != "LORA":
        found.append(f"peft_type: got {fields.get('peft_type')!r}, wanted 'LORA'")
    for name, value in fields.items():
        if name in _OWN or name in _FREE or name == "peft_type":
            continue
        default = OTHER_DEFAULTS.get(name)
        if value != default and value not in (None, False, [], {}):
            found.append(f"{name}: got {value!r}, wanted {default!r}")
    for name, kinds in _KINDS.items():
        if name in fields and not isinstance(fields[name], kinds):
            found.append(f"{name}: got {fields[name]!r}")
    return found


_NAMES = (str, list, type(None))
_KINDS: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": (list, type(None)),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "layers_to_transform": (int, list, type(None)),
    "layers_pattern": _NAMES,
    "init_lora_weights": (bool, str),
    "bias": (str,),
    "base_model_name_or_path": (str, type(None)),
}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return sorted(value)
    return dict(value) if isinstance(value, Mapping) else value
