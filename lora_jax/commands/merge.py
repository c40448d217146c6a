"""``lora-jax merge``: an adapter folded into a model's safetensors files, without the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from .. import config as configs
from .. import indices, paths, pointers, rows
from ..adapter import Adapter, Entry, Full, Rows
from ..alora import refuse_masked
from ..changes import merged
from ..errors import AdapterError, AssetError, OutputError, raise_all
from ..factors import pairs_of
from ..files import write_atomic
from ..intake import parse_json, problem_of, read_bytes, reason
from ..merging import Rounding, rounding, warnings_of
from ..peft import families, open_adapter
from ..peft.files import CONFIG_NAME
from ..peft.halves import LINEAR, LOOKED_UP
from ..rewrite.tokens import is_input_embedding
from ..shown import escaped
from .checkpoint import Checkpoint, LeftOut, copy_others, read_checkpoint, read_file, staged
from .tables import table

Changes = Mapping[str, Entry]

_FLOATS = ("F32", "F16", "BF16")
_WITH_HEADS = ("CausalLM", "LMHead", "MaskedLM", "ConditionalGeneration", "DoubleHeads")


_TIED = (
    ", as its output head shares the embedding's weight (tie_word_embeddings); save the model with "
    "a head of its own, or keep the adapter apart"
)


def merge_files(model: Path, adapter: Path, out: Path, *, overwrite: bool = False) -> str:
    """Write ``W + s·A·B``, or DoRA's weight, for every adapted W of a model directory, and report.

    The sum is formed in float32 and rounded once to the stored dtype. Shards keep their names
    and their index; one at a time is in memory. All other files are copied, but the same
    weights in other formats. Nothing appears in ``out`` before all of it is written.

    Args:
        model: a directory with ``model.safetensors``, or shards and their index.
        adapter: a PEFT directory.
        out: a new or empty directory.
        overwrite: replace files of the same name in ``out``; others stay.

    Raises:
        AdapterError: the adapter cannot be read, or lists every module that is not in the
            model or does not fit it.
        AssetError: the model cannot be read.
        OutputError: ``out`` cannot be written, or is or lies in one of the others.
    """
    _, adapters = open_adapter(adapter)
    refuse_masked(adapters, "they cannot be merged")
    checkpoint = read_checkpoint(model)
    changes = place(adapters, checkpoint, transposed=_says_transposed(adapter))
    _refuse_tied(adapters, checkpoint)
    for given in (model, adapter):
        if _real(given) in (_real(out), *_real(out).parents):
            raise OutputError(f"{out} is or lies in {given}, which stays as it is")
    family, report = _family(adapters, checkpoint.shapes), {}
    with staged(out, overwrite=overwrite) as staging:
        for name, keys in checkpoint.files.items():
            tensors, metadata = read_file(model / name)
            for key in keys:
                if key in changes:
                    tensors[key] = _changed(key, tensors[key], changes[key], report)
            write_atomic({staging / name: safetensors.numpy.save(tensors, metadata=metadata)})
        left_out = copy_others(checkpoint, staging)
    told = _told(report, changes, left_out, out)
    return f"note: {family.told(_plain_names(adapters).values())}\n{told}" if family else told


def place(
    adapters: Changes, checkpoint: Checkpoint, *, transposed: bool = False
) -> dict[str, Entry]:
    """Return the adapters by the names of the stored tensors, with the stored axes.

    A base model is stored with or without its own prefix, ``bert.`` say; one prefix is put on
    or taken off for all names together. Where that does not do, a known family's other names
    are the model's (``peft.families``). A ``Conv1D`` is stored the other way round: shapes
    tell, and where a weight is square, what the others of this adapter are.

    Args:
        adapters: what ``open_adapter`` returns.
        checkpoint: the model.
        transposed: whether square weights are those of ``Conv1D`` where the others do not tell.

    Raises:
        AdapterError: lists every module that is not in the model or does not fit it.
    """
    names = _names(adapters, checkpoint.shapes)
    problems = [p for name, one in adapters.items() for p in _misfit(names[name], one, checkpoint)]
    raise_all(AdapterError, "this adapter does not fit the model", problems)
    shapes = {name: checkpoint.shapes[key] for name, key in names.items()}
    axes = {
        name: LINEAR if shapes[name] == (one.b.shape[1], one.a.shape[0]) else LOOKED_UP
        for name, one in pairs_of(adapters).items()
        if one.axes == LINEAR
    }
    told = {axes[name] for name in axes if len(set(shapes[name])) == 2}
    square = told.pop() if len(told) == 1 else (LOOKED_UP if transposed else LINEAR)
    axes |= {name: square for name in axes if len(set(shapes[name])) == 1}
    return {
        names[name]: replace(one, axes=axes[name]) if name in axes else one  # pyright: ignore
        for name, one in adapters.items()
    }


def _misfit(key: str, one: Entry, checkpoint: Checkpoint) -> list[str]:
    shape, dtype = checkpoint.shapes.get(key), checkpoint.dtypes.get(key)
    if shape is None:
        return [f"{key}: not in the model{_TIED if _is_tied_head(key, checkpoint) else ''}"]
    if dtype not in _FLOATS:
        return [f"{key}: stored as {dtype}, wanted one of {', '.join(_FLOATS)}"]
    if isinstance(one, Rows):
        found = indices.problems(one.indices, shape[0])
        if len(shape) != 2 or shape[1:] != one.values.shape[1:]:
            found.append(f"rows of {one.values.shape[1:]}, the model has {shape}")
        return [f"{key}: {problem}" for problem in found]
    if isinstance(one, Full):
        wanted = [tuple(one.value.shape)]
    else:
        fan_in, out = one.a.shape[:-1], one.b.shape[1]
        wanted = [(*fan_in, out)] if one.axes == LOOKED_UP else [(out, *fan_in)]
        wanted += [(*fan_in, out)] if one.axes == LINEAR else []
    return (
        [] if shape in wanted else [f"{key}: the adapter is for {wanted[0]}, the model has {shape}"]
    )


def _names(adapters: Changes, stored: Mapping[str, Any]) -> dict[str, str]:
    """Return the stored tensor's name of every adapter, in the way that finds most of them."""
    plain = _plain_names(adapters)
    if renamed := _family(adapters, stored):
        return {name: renamed.to_model(key) for name, key in plain.items()}
    best = _prefixing(plain, stored)
    return {name: best(key) for name, key in plain.items()}


def _plain_names(adapters: Changes) -> dict[str, str]:
    return {n: n if isinstance(one, Full) else f"{n}.weight" for n, one in adapters.items()}


def _prefixing(plain: Mapping[str, str], stored: Mapping[str, Any]) -> Callable[[str], str]:
    ways: list[Callable[[str], str]] = [str]
    for first in sorted({key.partition(".")[0] for key in plain.values()}):
        ways.append(lambda key, first=first: key.removeprefix(f"{first}."))
    for first in sorted({key.partition(".")[0] for key in stored}):
        ways.append(lambda key, first=first: f"{first}.{key}")
    return max(ways, key=lambda way: sum(way(key) in stored for key in plain.values()))


def _family(adapters: Changes, stored: Mapping[str, Any]) -> families.Rename | None:
    """Return how a family's other names become the model's, where no prefix alone does it."""
    plain = _plain_names(adapters)
    prefixed = map(_prefixing(plain, stored), plain.values())
    if all(key in stored for key in prefixed):
        return None
    return families.find(sorted(plain.values()), stored.keys())


def _real(path: Path) -> Path:
    # Path.resolve raises for links in a circle.
    return Path(os.path.realpath(path))


def _says_transposed(adapter: Path) -> bool:
    return parse_json(read_bytes(adapter / CONFIG_NAME)).get("fan_in_fan_out") is True


def _refuse_tied(adapters: Changes, checkpoint: Checkpoint) -> None:
    """Raise where the output head reads an adapted embedding's weight, which the adapter spares."""
    if not _is_tied(checkpoint):
        return
    raise_all(
        AdapterError,
        "the output head shares these weights (tie_word_embeddings), so a merge would change it, "
        "too; keep the adapter apart",
        [
            name
            for name, one in adapters.items()
            if (isinstance(one, Adapter) and one.axes == LOOKED_UP)
            or (isinstance(one, Full) and is_input_embedding(paths.module_of(name)))
        ],
    )


def _is_tied(checkpoint: Checkpoint) -> bool:
    """Tell whether the model has an output head that shares the embedding's weight."""
    path = checkpoint.directory / "config.json"
    pointers.refuse(path, AssetError)
    try:
        config = parse_json(read_bytes(path)) if problem_of(path) != "missing" else {}
        kinds = " ".join(config.get("architectures") or ())
        tied = config.get("tie_word_embeddings", True)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise AssetError(f"{path} is not a model's configuration: {reason(error)}") from error
    has_head = any(kind in kinds for kind in _WITH_HEADS)
    return bool(tied) and has_head and not any("lm_head.weight" in key for key in checkpoint.shapes)


def _is_tied_head(key: str, checkpoint: Checkpoint) -> bool:
    return configs.is_output_head(paths.module_of(key)) and _is_tied(checkpoint)


def _changed(
    key: str, weight: np.ndarray, change: Entry, report: dict[str, Rounding]
) -> np.ndarray:
    if isinstance(change, Full):
        return np.ascontiguousarray(np.asarray(change.value).astype(weight.dtype))
    if isinstance(change, Rows):
        return np.ascontiguousarray(np.asarray(rows.put(jnp.asarray(weight), change)))
    array = jnp.asarray(weight)
    report[key] = rounding(array, [change])
    return np.ascontiguousarray(np.asarray(merged(array, change)))


def _told(report: Mapping[str, Rounding], changes: Changes, left_out: LeftOut, out: Path) -> str:
    rows = [
        (key, one.dtype, f"{one.changed:,}", f"{one.unchanged:,}", f"{one.error:.3g}")
        for key, one in sorted(report.items())
    ]
    headings = ("weight", "dtype", "to change", "left unchanged", "error of the change")
    full = [f"{key}: replaced in full" for key, one in changes.items() if isinstance(one, Full)]
    full += [
        f"{key}: {len(one.indices)} rows replaced"
        for key, one in changes.items()
        if isinstance(one, Rows)
    ]
    warned = [f"warning: {line}" for line in warnings_of(report)]
    lines = [table(headings, rows), *map(escaped, (*full, *warned, *left_out.lines()))]
    return "\n".join([*lines, f"the merged model is in {escaped(out)}"])
