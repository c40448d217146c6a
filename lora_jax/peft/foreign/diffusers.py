"""What diffusers records of an adapter in the header of its file: PEFT's fields, by part."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ...core.config.lora_config import LoraConfig
from ...core.errors import AdapterError
from .. import config_json

KEY = "lora_adapter_metadata"


def recorded(
    metadata: Mapping[str, str] | None, part: str | None, origin: object = "this file"
) -> tuple[str | None, LoraConfig | None]:
    """Return the part of the file that is meant and its configuration; None for what is not said.

    Args:
        metadata: of the file's header.
        part: the beginning of the names that are wanted, such as ``"unet."``; by default that
            of the only part there is.
        origin: what the file is called in messages.

    Raises:
        AdapterError: the record is not JSON, or its fields ask for what is not supported.

    >>> recorded({KEY: '{"unet.r": 4, "unet.lora_alpha": 2}'}, None)[1].lora_alpha
    2
    """
    if not metadata or KEY not in metadata:
        return part, None
    try:
        fields, _ = config_json.parse(metadata[KEY].encode())
        if not isinstance(fields, Mapping):
            raise ValueError(f"got a JSON {type(fields).__name__}, wanted an object")
    except ValueError as error:
        raise AdapterError(f"{KEY} in the header of {origin} is not JSON: {error}") from error
    parts = sorted(key[:-1] for key in fields if key == "r" or key.endswith(".r"))
    if part is None and len(parts) == 1:
        part = parts[0]
    if part not in parts:
        return part, None
    named = {key.removeprefix(part): key for key in fields if key.startswith(part)}
    # No field of PEFT's has a dot in its name.
    own = {name: fields[key] for name, key in named.items() if "." not in name}
    content = json.dumps({"peft_type": "LORA"} | own).encode()
    return part, config_json.decode(content, f"{KEY} in the header of {origin}").config
