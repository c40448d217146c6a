"""Saving and loading a PEFT adapter directory, strictly and atomically."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from .. import paths
from ..adapter import Adapter, Adapters, Full
from ..config import LoraConfig
from ..errors import AdapterError, raise_all
from ..files import output_directory, write_atomic
from ..rewrite import Plan
from . import config_json, tensors
from .config_json import AdapterFile
from .ranges import without_ranges

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# What decides the numbers beside the tensors; the targets show in the tensors' names.
_DECISIVE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def save_pretrained(
    directory: str | Path,
    plan: Plan,
    adapters: Adapters,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    names: tensors.Names = paths.module_of,
    overwrite: bool = False,
) -> Path:
    """Write adapters as a directory that ``peft.PeftModel.from_pretrained`` loads.

    Equal inputs give equal bytes. Both files are written whole or not at all. PEFT has no
    ``output_slices``: ranges of columns are written as one pair of the whole weight, zero
    elsewhere, whose plan comes from ``load_config``.

    Args:
        directory: where; created, must be empty unless ``overwrite``.
        plan: the plan that the adapters belong to.
        adapters: what is saved.
        base_model: the base model's name or directory, recorded for users of the file.
        task_type: PEFT's task type, such as ``"SEQ_CLS"`` or ``"CAUSAL_LM"``.
        names: the PyTorch module name of a path, by default the path without its leaf.
        overwrite: replace the files of an earlier adapter; nothing else is touched.

    Returns:
        The directory.

    Raises:
        AdapterError: adapters and plan differ in paths, shapes or scale, or a value is not finite.
        OutputError: the directory holds something or cannot be written.

    Source: the file format of PEFT 0.21.2.
    """
    tensors.raise_misfits(plan, adapters)
    plan, adapters = without_ranges(plan, adapters)
    contents = tensors.encode(plan, adapters, names)
    files = {
        WEIGHTS_NAME: safetensors.numpy.save(contents, metadata={"format": "pt"}),
        CONFIG_NAME: config_json.encode(AdapterFile(plan.config, base_model, task_type)),
    }
    directory = output_directory(directory, overwrite=overwrite)
    write_atomic({directory / name: content for name, content in files.items()})
    return directory


def load_pretrained(
    directory: str | Path, plan: Plan, *, names: tensors.Names = paths.module_of
) -> dict[str, Adapter | Full]:
    """Read the adapters of a PEFT directory, all of it or nothing.

    Args:
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        plan: the plan for the model, made from ``load_config(directory)``.
        names: the PyTorch module name of a path, as when saving.

    Raises:
        AdapterError: a file is missing or unreadable, or anything in it does not fit the plan;
            everything that does not fit is listed.
    """
    config = load_config(directory)
    differing = [
        f"{name}: the file has {getattr(config, name)!r}, the plan {getattr(plan.config, name)!r}"
        for name in _DECISIVE
        if getattr(config, name) != getattr(plan.config, name)
    ]
    raise_all(AdapterError, "the plan was made from another configuration", differing)
    return tensors.decode(plan, _read_weights(Path(directory)), names)


def load_config(directory: str | Path) -> LoraConfig:
    """Return the configuration of a PEFT directory, to plan with.

    Raises:
        AdapterError: the file is missing, unreadable, or asks for what is not supported.
    """
    return load_adapter_file(directory).config


def load_adapter_file(directory: str | Path) -> AdapterFile:
    """Return all that ``adapter_config.json`` says, base model and task type included.

    Raises:
        AdapterError: as ``load_config``.
    """
    path = Path(directory) / CONFIG_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AdapterError(
            f"cannot read {path}: {error.strerror}. An adapter is a directory with {CONFIG_NAME} "
            f"and {WEIGHTS_NAME}."
        ) from error
    return config_json.decode(content, str(path))


def _read_weights(directory: Path) -> dict[str, np.ndarray]:
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").exists()
        hint = " adapter_model.bin is a pickle, which is never read: save it again as safetensors."
        raise AdapterError(f"{path} is missing.{hint if pickled else ''}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{path} is not a whole safetensors file: {error}. Copy or save it again."
        ) from error
