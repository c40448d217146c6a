"""Saving and loading a PEFT adapter directory, strictly and atomically."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import safetensors
import safetensors.numpy

from .. import paths
from ..adapter import Adapters, Entry
from ..config import LoraConfig
from ..errors import AdapterError, raise_all
from ..files import claimed
from ..naming import Names
from ..rewrite import Plan
from . import config_json, renaming, tensors, tying, views
from .config_json import AdapterFile
from .download import CONFIG_NAME, WEIGHTS_NAME, located
from .ranges import without_ranges
from .slots import is_held
from .strict import LoadReport, header_problem


def save_pretrained(
    directory: str | Path,
    plan: Plan,
    adapters: Adapters,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    names: Names = paths.module_of,
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
        names: the PyTorch module of a path, as a table or a function (see ``lora_jax.naming``);
            by default the path without its leaf. Where they rename, the saved configuration is
            in PyTorch's names, each module's rank and alpha resolved before.
        overwrite: replace the files of an earlier adapter; nothing else is touched.

    Returns:
        The directory.

    Raises:
        AdapterError: adapters and plan differ in paths, shapes or scale, a value is not finite,
            or ``names`` leave parameters out, which are listed.
        OutputError: the directory holds something or cannot be written.

    Source: the file format of PEFT 0.21.2.
    """
    files = encoded(plan, adapters, base_model=base_model, task_type=task_type, names=names)
    with claimed(directory, overwrite=overwrite) as output:
        output.write(files)
    return output.directory


def encoded(
    plan: Plan,
    adapters: Adapters,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    names: Names = paths.module_of,
) -> dict[str, bytes]:
    """Return the files that ``save_pretrained`` writes, by name; see there."""
    tensors.raise_misfits(plan, adapters)
    plan, adapters = without_ranges(plan, adapters)
    plan, adapters, names = views.to_file(plan, adapters, names)
    to_torch, config = renaming.file_names(plan, names), renaming.in_torch(plan, names)
    tying.check(plan, config, to_torch)
    contents = tensors.encode(plan, adapters, to_torch.__getitem__)
    contents |= tying.copies(plan, config, to_torch, contents)
    return _files(AdapterFile(config, base_model, task_type), contents)


def _files(file: AdapterFile, contents: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    return {
        WEIGHTS_NAME: safetensors.numpy.save(dict(contents), metadata={"format": "pt"}),
        CONFIG_NAME: config_json.encode(file),
    }


def write_directory(
    directory: str | Path,
    file: AdapterFile,
    contents: Mapping[str, np.ndarray],
    *,
    overwrite: bool = False,
) -> Path:
    """Write configuration and tensors, both whole or not at all; see ``save_pretrained``."""
    files = _files(file, contents)
    with claimed(directory, overwrite=overwrite) as output:
        output.write(files)
    return output.directory


@overload
def load_pretrained(
    directory: str | Path,
    plan: Plan,
    *,
    names: Names = ...,
    strict: Literal[True] = ...,
) -> dict[str, Entry]: ...


@overload
def load_pretrained(
    directory: str | Path, plan: Plan, *, names: Names = ..., strict: Literal[False]
) -> tuple[dict[str, Entry], LoadReport]: ...


def load_pretrained(
    directory: str | Path,
    plan: Plan,
    *,
    names: Names = paths.module_of,
    strict: bool = True,
) -> dict[str, Entry] | tuple[dict[str, Entry], LoadReport]:
    """Read the adapters of a PEFT directory, all of it or nothing.

    Args:
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``. A string that
            names no directory may be a hub id, ``user/repo`` or ``user/repo@revision``.
        plan: the plan for the model, made from ``load_config(directory)``.
        names: the PyTorch module name of a path, as when saving.
        strict: False loads the adapters that fit, warns of everything else, and returns the
            adapters and a ``LoadReport``. Files that cannot be read are refused either way.

    Raises:
        AdapterError: a file is missing or unreadable, or anything in it does not fit the plan:
            tensors that are missing, unexpected, misshapen, not finite, or the base model's;
            ranks, scales or targets that are not the plan's; or an initialisation that changed
            the base they belong to. Everything is listed.

    Adapters of a file with ``alora_invocation_tokens`` act from these on: call the adapted
    function with ``active=alora_mask(input_ids, plan.config.alora_invocation_tokens)``.
    """
    directory = located(directory)
    config = load_config(directory)
    to_torch = renaming.file_names(plan, names)
    tying.check(plan, config, to_torch)
    contents = tying.without_copies(plan, config, to_torch, read_weights(directory))
    renaming.refuse_hanging(config, contents)
    view, names, back = views.from_file(plan, names, config, contents)
    in_view = renaming.file_names(view, names).__getitem__
    adapters, unfit = tensors.decode_what_fits(view, contents, in_view)
    unlike = renaming.differing(view, config, names)
    same = renaming.fitting(view, config, names) | view.full.keys()
    fit, unjoined = back({path: one for path, one in adapters.items() if path in same})
    problems = unlike + unfit + unjoined
    if strict:
        raise_all(AdapterError, f"{directory} does not fit the model and its plan", problems)
        return fit
    planned = {leaf.path for leaf in plan.leaves if is_held(plan, leaf)}
    left_out = sorted(planned - fit.keys())
    report = LoadReport(tuple(left_out), tuple(problems))
    if problems:
        warnings.warn(f"{directory}: {report}", stacklevel=2)
    return fit, report


def load_config(
    directory: str | Path, *, names: Names = paths.module_of, params: Any = None
) -> LoraConfig:
    """Return the configuration of a PEFT directory, or a hub id, to plan with.

    Args:
        directory: holds ``adapter_config.json``; with ``names`` its tensors are looked at, too.
        names: the PyTorch module of a path, as when saving. The configuration then names the
            JAX modules that the file's tensors belong to, with the ranks they have there.
        params: the model's parameters or their shapes. A table goes without them, and the
            targets are one regular expression then: what else names could mean is not known.

    Raises:
        AdapterError: a file is missing, unreadable, or asks for what is not supported; or lists
            every module without a name in the JAX model.
    """
    config = load_adapter_file(directory).config
    if names is paths.module_of:
        return config
    return renaming.in_jax(config, read_weights(located(directory)), names, params)


def load_adapter_file(directory: str | Path) -> AdapterFile:
    """Return all that ``adapter_config.json`` says, base model and task type included.

    Raises:
        AdapterError: as ``load_config``.
    """
    path = located(directory, CONFIG_NAME) / CONFIG_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AdapterError(
            f"cannot read {path}: {error.strerror}. An adapter is a directory with {CONFIG_NAME} "
            f"and {WEIGHTS_NAME}."
        ) from error
    return config_json.decode(content, str(path))


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """Return the tensors of ``adapter_model.safetensors`` by their names in the file.

    Raises:
        AdapterError: the file is missing, broken, or a pickle.
    """
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").exists()
        hint = " adapter_model.bin is a pickle, which is never read: save it again as safetensors."
        raise AdapterError(f"{path} is missing.{hint if pickled else ''}")
    try:
        if problem := header_problem(path):
            raise ValueError(problem)
        with safetensors.safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, TypeError, ValueError, OverflowError) as error:
        raise AdapterError(
            f"{path} is not a whole safetensors file: {error}. Copy or save it again."
        ) from error
