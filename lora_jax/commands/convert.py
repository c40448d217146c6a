"""``lora-jax convert``: adapter files of older layouts as a PEFT directory."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors

from .. import pointers
from ..errors import AdapterError
from ..intake import parse_json, problem_of, read_bytes, reason, require_regular
from ..journal import settle
from ..peft import AdapterFile, load_adapter_file
from ..peft.files import CONFIG_NAME, WEIGHTS_NAME, write_directory
from ..peft.layouts import converted
from ..shown import escaped
from .tables import table


@dataclass(frozen=True)
class ConvertOptions:
    """Write an adapter of an older layout as a PEFT directory.

    Reads loralib's bare lora_A and lora_B, kohya's and diffusers' lora_down and lora_up, PEFT's
    names without their prefix, and adapters of single experts.

    Args:
        source: a .safetensors file, or a directory with adapter_model.safetensors and maybe
            adapter_config.json.
        out: where the adapter goes; a new or empty directory.
        modules: the model's modules, which kohya's names need: a .json list of their names, or a
            .safetensors file of the model.
        part: of a file for several models, the beginning of the names to convert, such as
            lora_unet_ or text_encoder. (with its dot).
        lora_alpha: numerator of the scale alpha / r, where the file does not say it.
        base_model: the base model's name, recorded for users of the adapter.
        overwrite: replace files of the same name; others stay.
    """

    source: Path
    out: Path
    modules: Path | None = None
    part: str | None = None
    lora_alpha: float | None = None
    base_model: str | None = None
    overwrite: bool = False


def convert_files(options: ConvertOptions) -> str:
    """Write the directory and return a line for each kind of module.

    Raises:
        AdapterError: the source cannot be read, or lists everything that cannot be converted.
        OutputError: ``out`` cannot be written.
    """
    if options.lora_alpha is not None and not math.isfinite(options.lora_alpha):
        raise AdapterError(f"lora_alpha: got {options.lora_alpha}, wanted a finite number")
    source, recorded = options.source, None
    if os.path.isdir(source):
        settle(source, AdapterError)
        if problem_of(source / CONFIG_NAME) != "missing":
            recorded = load_adapter_file(source)
        source = source / WEIGHTS_NAME
    modules = None if options.modules is None else _modules(options.modules)
    new = converted(
        _tensors(source),
        part=options.part,
        modules=modules,
        lora_alpha=options.lora_alpha,
        config=recorded.config if recorded else None,
    )
    file = replace(recorded or AdapterFile(new.config), config=new.config)
    if options.base_model is not None:
        file = replace(file, base_model=options.base_model)
    write_directory(options.out, file, new.tensors, overwrite=options.overwrite)
    kinds = Counter((module.rpartition(".")[2], *own) for module, own in new.ranks.items())
    rows = [(name, str(n), str(r), f"{alpha:g}") for (name, r, alpha), n in sorted(kinds.items())]
    return "\n".join(
        [
            table(("name", "modules", "r", "alpha"), rows),
            f"{len(new.ranks)} modules; the adapter is in {escaped(options.out)}",
        ]
    )


def _tensors(path: Path) -> dict[str, np.ndarray]:
    if problem_of(path) == "missing":
        raise AdapterError(f"{path} is missing")
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"{path} is not a .safetensors file. A pickle is never read, as it can run code: where "
            "you trust it, make one in PyTorch by safetensors.torch.save_file("
            f"torch.load({path.name!r}, weights_only=True), 'adapter.safetensors')"
        )
    pointers.refuse(path, AdapterError)
    try:
        require_regular(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise AdapterError(f"{path} is not a whole safetensors file: {reason(error)}") from error


def _modules(path: Path) -> frozenset[str]:
    """Return the names in a JSON list, or the owners of a safetensors file's tensors."""
    pointers.refuse(path, AdapterError)
    if path.suffix == ".safetensors":
        try:
            require_regular(path)
            with safetensors.safe_open(path, framework="numpy") as file:
                return frozenset(key.rpartition(".")[0] for key in file.keys())  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise AdapterError(
                f"{path} is not a whole safetensors file: {reason(error)}"
            ) from error
    try:
        names = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot read {path} as JSON: {reason(error)}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"{path}: wanted a JSON list of the names of modules")
    return frozenset(names)
