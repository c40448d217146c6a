"""``adapter_config.json``: between PEFT's fields and ``LoraConfig``, pure functions."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..core.config.lora_config import LoraConfig
from ..core.config.peft_fields import DEFAULTS, FOREIGN, refused
from ..core.errors import AdapterError, ConfigError, raise_all
from ..core.initializers import INITIALIZERS
from ..core.io.intake import refuse_many

# How A and B are drawn says nothing about a file's numbers. These names only this library has.
_OUR_INITS = frozenset(INITIALIZERS) - {True, False, "gaussian", "orthogonal"}

# What only this library knows: it changes how the numbers are formed, or has no place in the file.
_LOCAL = ("on_unsupported", "output_slices", "transposed_parameters", "on_unmatched")

_OWN = tuple(field.name for field in dataclasses.fields(LoraConfig) if field.name not in _LOCAL)


# What AdapterFile has a place for beside the configuration.
_RECORDED = {"base_model_name_or_path", "peft_type", "peft_version", "task_type"}

# What MLX-LM's adapter_config.json has, and PEFT's has not.
MLX_FIELD = "lora_parameters"

# Every field of PEFT 0.21.2's LoraConfig.
KNOWN = frozenset((*_OWN, *FOREIGN))


@dataclass(frozen=True)
class AdapterFile:
    """What ``adapter_config.json`` says.

    Args:
        config: the configuration.
        base_model: the model that the adapter was trained on, if recorded.
        task_type: PEFT's task type, such as ``"SEQ_CLS"``, if recorded.
        peft_version: the version of PEFT that wrote the file, or whose format it has.
        other: every field that says nothing to this library, as it was: written back unchanged.
            Among them are those that a newer PEFT than 0.21.2 may have added.
    """

    config: LoraConfig
    base_model: str | None = None
    task_type: str | None = None
    peft_version: str | None = DEFAULTS["peft_version"]
    other: Mapping[str, Any] = field(default_factory=dict)


def encode(file: AdapterFile) -> bytes:
    """Return the file's bytes: every field PEFT writes, sorted, so equal inputs give equal bytes.

    Patterns keep their order, since the first hit wins; PEFT sorts them, too.

    >>> from lora_jax import LoraConfig
    >>> decode(encode(AdapterFile(LoraConfig(r=4)))).config.r
    4
    """
    own = {name: _plain(name, getattr(file.config, name)) for name in _OWN}
    own["trainable_token_indices"] = _tokens(file.config.trainable_token_indices)
    if file.config.target_parameters:
        # Their order counts; and where no target is set, PEFT looks up those of the architecture.
        own["target_parameters"] = list(file.config.target_parameters)
        own["target_modules"] = [] if own["target_modules"] is None else own["target_modules"]
    if own["init_lora_weights"] in _OUR_INITS:
        own["init_lora_weights"] = True
    recorded = {
        "base_model_name_or_path": file.base_model,
        "peft_version": file.peft_version,
        "task_type": file.task_type,
    }
    fields = DEFAULTS | dict(file.other) | own | recorded
    return (json.dumps(dict(sorted(fields.items())), indent=2) + "\n").encode()


def decode(content: bytes, origin: str = "adapter_config.json") -> AdapterFile:
    """Return what the bytes say; warn of fields that PEFT 0.21.2 does not have, and keep them.

    Args:
        content: the file.
        origin: its name, for messages.

    Raises:
        AdapterError: not JSON, a name said twice, not a LoRA adapter, or fields whose effect
            would be lost: all of them are listed.
    """
    try:
        fields, twice = parse(content)
    except ValueError as error:
        raise AdapterError(f"{origin} is not JSON: {error}. Save the adapter again.") from error
    if not isinstance(fields, Mapping):
        raise AdapterError(f"{origin}: got a JSON {type(fields).__name__}, wanted an object")
    if MLX_FIELD in fields and "peft_type" not in fields:
        raise AdapterError(
            f"{origin} is of an MLX-LM adapter: `lora-jax convert` makes a PEFT directory of it"
        )
    fields = _without_empty(fields)
    problems = [f"{name}: said twice" for name in twice] + _problems(fields)
    raise_all(AdapterError, f"{origin} asks for what is not supported", problems)
    try:
        own = {name: fields[name] for name in _OWN if name in fields}
        # One file serves several families of models.
        config = LoraConfig(**own, on_unmatched="warn")
    except (ConfigError, TypeError, AttributeError) as error:
        raise AdapterError(f"{origin}: {error}") from error
    if newer := sorted(fields.keys() - KNOWN):
        warnings.warn(
            f"{origin} has fields that PEFT 0.21.2 does not know; they are kept and change "
            f"nothing here, so check that they may be ignored: {', '.join(newer)}",
            stacklevel=2,
        )
    return AdapterFile(
        config,
        fields.get("base_model_name_or_path"),
        fields.get("task_type"),
        fields.get("peft_version"),
        {name: fields[name] for name in fields if name not in _OWN and name not in _RECORDED},
    )


def _without_empty(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what says nothing, so that it is PEFT's default: null for a switch or a table."""
    return {
        name: value
        for name, value in fields.items()
        if not (value is None and set(_KINDS.get(name, ())) & {bool, dict})
        and not (name == "trainable_token_indices" and value == {})
    }


def parse(content: bytes) -> tuple[Any, list[str]]:
    """Return what JSON bytes say, strictly, and the names that one of its objects says twice.

    >>> parse(b'{"r": 8, "r": 4}')
    ({'r': 4}, ['r'])

    Raises:
        ValueError: not JSON, too deep, too many values, or a number that JSON does not have, such
            as NaN.
    """
    refuse_many(content)
    twice: list[str] = []
    try:
        found = json.loads(
            content.decode(),
            object_pairs_hook=partial(_unique, twice),
            parse_constant=_refuse,
            parse_float=_number,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return found, twice


def _unique(twice: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(name for name, _ in pairs)
    twice.extend(name for name, count in counts.items() if count > 1)
    return dict(pairs)


def _number(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse(text)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON's")


def _problems(fields: Mapping[str, Any]) -> list[str]:
    found = []
    if fields.get("peft_type") != "LORA":
        found.append(f"peft_type: got {fields.get('peft_type')!r}, wanted 'LORA'")
    others = {name: value for name, value in fields.items() if name != "peft_type"}
    found += refused(others, file=True)
    for name, kinds in _KINDS.items():
        value = fields.get(name)
        if name in fields and not isinstance(value, kinds):
            found.append(f"{name}: got {value!r}")
        elif isinstance(value, list) and not all(type(one) is _ELEMENTS[name] for one in value):
            found.append(f"{name}: got {value!r}, wanted only {_ELEMENTS[name].__name__}")
    return found


# Lists whose order counts; the others are written sorted. Of layers_pattern the first hit wins.
_IN_ORDER = ("alora_invocation_tokens", "layers_pattern")

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
    "lora_bias": (bool,),
    "trainable_token_indices": (list, dict, type(None)),
    "ensure_weight_tying": (bool,),
    "layers_to_transform": (int, list, type(None)),
    "layers_pattern": _NAMES,
    "target_parameters": (list, type(None)),
    "init_lora_weights": (bool, str),
    "bias": (str,),
    "alora_invocation_tokens": (list, type(None)),
    "base_model_name_or_path": (str, type(None)),
    "peft_version": (str, type(None)),
    "task_type": (str, type(None)),
}
_ELEMENTS: dict[str, type] = {
    "target_modules": str,
    "exclude_modules": str,
    "modules_to_save": str,
    "trainable_token_indices": int,
    "layers_to_transform": int,
    "layers_pattern": str,
    "alora_invocation_tokens": int,
    "target_parameters": str,
}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value) if name in _IN_ORDER else sorted(value)
    return dict(value) if isinstance(value, Mapping) else value


def _tokens(given: Any) -> Any:
    """Return the tokens in their order, which is that of the rows."""
    if isinstance(given, Mapping):
        return {name: list(tokens) for name, tokens in given.items()}
    return None if given is None else list(given)
