"""What ``convert`` reads: a file or a directory of any of the layouts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from ...core.errors import AdapterError
from ...core.io import lfs_pointers
from ...core.io.intake import problem_of, read_bytes, reason, require_regular
from ...core.io.journal import settle
from .. import renamed_families, shards, spellings
from ..config_json import MLX_FIELD, AdapterFile, parse
from ..download import CONFIG_NAME
from ..files import load_adapter_file
from . import mlx

_DATA_PARALLEL = "module."


@dataclass(frozen=True)
class Source:
    """An adapter as its file has it.

    Args:
        tensors: by their names, without what wraps a model or names an adapter.
        metadata: of the header of a single file.
        file: PEFT's configuration beside the tensors, if there is one.
        fields: MLX-LM's.
    """

    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str] | None = None
    file: AdapterFile | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """The modules that the tensors belong to."""
        return renamed_families.modules_of(self.tensors)


def read_source(path: Path) -> Source:
    """Return what a file or a directory holds.

    Raises:
        AdapterError: a file is missing, broken or a pickle, or several tensors mean the same.
    """
    if not os.path.isdir(path):
        tensors, metadata = _read(path)
        return Source(_plain(tensors, path), metadata)
    settle(path, AdapterError)
    config = path / CONFIG_NAME
    if (fields := _mlx_fields(config)) is not None:
        return Source(_read(path / mlx.WEIGHTS_NAME)[0], fields=fields)
    file = load_adapter_file(path) if problem_of(config) != "missing" else None
    return Source(_plain(shards.read(path), path), file=file)


def _mlx_fields(path: Path) -> Mapping[str, Any] | None:
    try:
        fields, _ = parse(read_bytes(path))
    except (OSError, ValueError):
        return None
    known = isinstance(fields, Mapping) and MLX_FIELD in fields and "peft_type" not in fields
    return fields if known else None


def _plain(tensors: Mapping[str, np.ndarray], origin: Path) -> dict[str, np.ndarray]:
    found = spellings.plain(tensors, origin)
    while found and all(key.startswith(_DATA_PARALLEL) for key in found):
        found = {key.removeprefix(_DATA_PARALLEL): tensor for key, tensor in found.items()}
    return found


def _read(path: Path) -> tuple[dict[str, np.ndarray], Mapping[str, str] | None]:
    if problem_of(path) == "missing":
        raise AdapterError(f"{path} is missing")
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"{path} is not a .safetensors file. A pickle is never read, as it can run code: where "
            "you trust it, make one in PyTorch by safetensors.torch.save_file("
            f"torch.load({path.name!r}, weights_only=True), 'adapter.safetensors')"
        )
    lfs_pointers.refuse(path, AdapterError)
    try:
        require_regular(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata()
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise AdapterError(f"{path} is not a whole safetensors file: {reason(error)}") from error
