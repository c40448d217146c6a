"""Saving and loading a PEFT adapter directory, strictly and atomically."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import safetensors.numpy

from ..core import paths
from ..core.adapter import Adapters, Entry
from ..core.buffers import apart
from ..core.config.lora_config import LoraConfig
from ..core.errors import AdapterError, raise_all
from ..core.io import lfs_pointers
from ..core.io.atomic_files import claimed
from ..core.io.intake import read_bytes
from ..rewrite import Plan
from . import (
    base_weights,
    config_json,
    config_names,
    file_view,
    renamed_families,
    shards,
    spellings,
    task_heads,
    tensors,
    tying,
)
from .checks import LoadReport
from .config_json import AdapterFile
from .download import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, located
from .keys import is_held, slots
from .names.naming import Names
from .shapes.column_ranges import without_ranges


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
        names: the PyTorch module of a path, as a table or a function (see
            ``lora_jax.peft.names.naming``); by default the path without its leaf. Where they
            rename, the saved configuration is in PyTorch's names, each module's rank and alpha
            resolved before.
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
    plan, adapters, names = file_view.to_file(plan, adapters, names)
    to_torch, config = config_names.file_names(plan, names), config_names.in_torch(plan, names)
    tying.check(plan, config, to_torch)
    contents = tensors.encode(plan, adapters, to_torch.__getitem__)
    contents |= tying.copies(plan, config, to_torch, contents)
    if config.init_lora_weights == "eva":
        # How they began; beside this name PEFT wants the data's own configuration, too.
        config = replace(config, init_lora_weights=True)
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
    subfolder: str | None = ...,
) -> dict[str, Entry]: ...


@overload
def load_pretrained(
    directory: str | Path,
    plan: Plan,
    *,
    names: Names = ...,
    strict: Literal[False],
    subfolder: str | None = ...,
) -> tuple[dict[str, Entry], LoadReport]: ...


def load_pretrained(
    directory: str | Path,
    plan: Plan,
    *,
    names: Names = paths.module_of,
    strict: bool = True,
    subfolder: str | None = None,
) -> dict[str, Entry] | tuple[dict[str, Entry], LoadReport]:
    """Read the adapters of a PEFT directory, all of it or nothing.

    Args:
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``, or shards and
            their index. A string that names no directory may be a hub id: ``user/repo``,
            ``user/repo/folder``, or either with ``@revision``.
        plan: the plan for the model, made from ``load_config(directory)``.
        names: the PyTorch module name of a path, as when saving. Without them, names that differ
            as those of a known family do (``peft.renamed_families``) are read as the model's,
            with a warning, where all of them then fit.
        strict: False loads the adapters that fit, warns of everything else, and returns the
            adapters and a ``LoadReport``. Files that cannot be read are refused either way.
        subfolder: where in the directory or repository the adapter is.

    Raises:
        AdapterError: a file is missing or unreadable, or anything in it does not fit the plan:
            tensors that are missing, unexpected, misshapen, not finite, or the base model's;
            ranks, scales or targets that are not the plan's; or an initialisation that changed
            the base they belong to. Everything is listed.

    Base weights in the file (an embedding's or output head's, which PEFT writes where one is a
    target or the vocabulary was resized) are compared with the parameters of the plan. Others than
    theirs are ``Full`` entries, with a warning; where the module has a pair, too, they are an
    error: ``with_base_weights`` puts them in first.

    Adapters of a file with ``alora_invocation_tokens`` act from these on: call the adapted
    function with ``active=alora_mask(input_ids, plan.config.alora_invocation_tokens)``.
    """
    directory = located(directory, subfolder=subfolder)
    config = load_config(directory)
    if not plan.of_changed_base and (problem := tensors.changed_base(config)):
        raise AdapterError(f"{directory}: {problem}")
    contents = read_weights(directory)
    to_torch = config_names.file_names(plan, names)
    if names is paths.module_of:
        names = _names_of_family(contents, to_torch.values(), directory, whole=True) or names
        to_torch = config_names.file_names(plan, names)
    tying.check(plan, config, to_torch)
    contents = tying.without_copies(plan, config, to_torch, contents)
    config_names.refuse_hanging(config, contents)
    to_file = names
    view, names, back = file_view.from_file(plan, names, config, contents)
    in_view = config_names.file_names(view, names).__getitem__
    expected = [slot.key for slot in slots(view, in_view)]
    contents, base, unlike_base = base_weights.taken(plan, to_file, contents, expected)
    adapters, unfit = tensors.decode_what_fits(view, contents, in_view)
    unlike = config_names.differing(view, config, names)
    same = config_names.fitting(view, config, names) | view.full.keys()
    fit, unjoined = back({path: one for path, one in adapters.items() if path in same})
    problems = unlike + unfit + unjoined + list(unlike_base.values())
    fit = {path: one for path, one in fit.items() if path not in unlike_base} | base
    if strict:
        raise_all(AdapterError, f"{directory} does not fit the model and its plan", problems)
    if base:
        warnings.warn(
            f"{directory} carries base weights that are not the model's; they are entries trained "
            f"in full: {', '.join(base)}",
            stacklevel=2,
        )
    if strict:
        return fit
    planned = {leaf.path for leaf in plan.leaves if is_held(plan, leaf)}
    left_out = sorted(planned - fit.keys())
    report = LoadReport(tuple(left_out), tuple(problems))
    if problems:
        warnings.warn(f"{directory}: {report}", stacklevel=2)
    return fit, report


def with_base_weights(
    directory: str | Path,
    plan: Plan,
    params: Any,
    *,
    names: Names = paths.module_of,
    subfolder: str | None = None,
) -> Any:
    """Return the parameters with the base weights that an adapter file carries in their place.

    PEFT writes them where the vocabulary was resized, or an embedding or output head is a target.
    Plan again with what is returned: its vocabulary may be another one.

    Args:
        directory: as in ``load_pretrained``.
        plan: for the model as it is, made from ``load_config(directory)``.
        params: the model's parameters.
        names: the PyTorch module name of a path, as in ``load_pretrained``; without them, names
            of a known family are read as the model's there and here.
        subfolder: where in the directory or repository the adapter is.

    Raises:
        AdapterError: lists every base weight of the file that does not fit the model.
    """
    directory = located(directory, subfolder=subfolder)
    contents = read_weights(directory)
    if names is paths.module_of:
        own = {paths.module_of(leaf.path) for leaf in plan.leaves}
        names = _names_of_family(contents, own, directory) or names
    return apart(base_weights.put(plan, names, contents, params), params)


def load_config(
    directory: str | Path,
    *,
    names: Names = paths.module_of,
    params: Any = None,
    subfolder: str | None = None,
) -> LoraConfig:
    """Return the configuration of a PEFT directory, or a hub id, to plan with.

    Where the file has no ``target_modules``, they are the modules of its tensors.

    Args:
        directory: holds ``adapter_config.json``; with ``names`` its tensors are looked at, too.
        names: the PyTorch module of a path, as when saving. The configuration then names the
            JAX modules that the file's tensors belong to, with the ranks they have there.
        params: the model's parameters or their shapes. A table goes without them, and the
            targets are one regular expression then: what else names could mean is not known.
            Without ``names``, a file in other names of a known family
            (``peft.renamed_families``) is read in the model's.
        subfolder: as in ``load_pretrained``.

    Raises:
        AdapterError: a file is missing, unreadable, or asks for what is not supported; or lists
            every module without a name in the JAX model.
    """
    file = load_adapter_file(directory, subfolder=subfolder)
    config = file.config
    untargeted = config.target_modules is None and not config.target_parameters
    plain = names is paths.module_of and params is None and not untargeted
    if plain and not task_heads.heads(file):
        return config
    found = located(directory, subfolder=subfolder)
    if plain and not any((found / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        return config
    tensors = read_weights(found)
    config = task_heads.with_heads(file, tensors).config
    if untargeted:
        config = config_names.targeting(config, tensors)
    if names is paths.module_of:
        own = () if params is None else {paths.module_of(path) for path in paths.flatten(params)}
        family = _names_of_family(tensors, own, found) if own else None
        if family is None:
            return config
        names = family
    return config_names.in_jax(config, tensors, names, params)


def load_adapter_file(directory: str | Path, *, subfolder: str | None = None) -> AdapterFile:
    """Return all that ``adapter_config.json`` says, base model and task type included.

    Raises:
        AdapterError: as ``load_config``.
    """
    path = located(directory, CONFIG_NAME, subfolder=subfolder) / CONFIG_NAME
    lfs_pointers.refuse(path, AdapterError)
    try:
        content = read_bytes(path)
    except OSError as error:
        raise AdapterError(
            f"cannot read {path}: {error.strerror}. An adapter is a directory with {CONFIG_NAME} "
            f"and {WEIGHTS_NAME}."
        ) from error
    return config_json.decode(content, str(path))


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """Return the tensors of an adapter, in shards or not, by the names that PEFT's file has.

    Raises:
        AdapterError: a file is missing, broken, or a pickle; or several tensors mean the same.
    """
    return spellings.plain(shards.read(directory), directory)


def _names_of_family(
    tensors: Iterable[str], modules: Collection[str], origin: object, *, whole: bool = False
) -> Callable[[str], str] | None:
    """Return the names in the file where they are a known family's others, and warn of it."""
    file = renamed_families.modules_of(tensors)
    if (found := renamed_families.find(file, modules, whole=whole)) is None:
        return None
    warnings.warn(f"{origin}: {found.told(file)}", stacklevel=3)
    return found.of_path
