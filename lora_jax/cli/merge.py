"""``lora-jax merge``: an adapter folded into a model's safetensors files, without the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ..adapters.merge import Rounding, overflow, rounding, warnings_of
from ..adapters.svd import pairs_of
from ..core import lowrank, paths
from ..core import token_rows as rows
from ..core.adapter import Adapter, Entry, Full, Rows
from ..core.alora import refuse_masked
from ..core.delta import merged, scaled_bias
from ..core.errors import AdapterError, OutputError, raise_all
from ..core.io.atomic_files import claimed
from ..core.io.intake import parse_json, read_bytes
from ..core.shown_text import escaped
from ..core.text_tables import table
from ..models.assets import refuse_other_layout
from ..peft.files import CONFIG_NAME
from ..peft.module_tensors import LOOKED_UP
from ..peft.tensors import changed_base
from ..peft.without_model import look
from ..rewrite.planning.token_rows import is_input_embedding
from .checkpoint import Checkpoint, LeftOut, copy_others, read_checkpoint, read_file
from .stored_weights import (
    biases,
    family_of,
    is_tied,
    place,
    plain_names,
    refuse_unmet,
    without_tied,
)

Entries = Mapping[str, Entry]
Changes = Mapping[str, Sequence[Entry]]

_OVERFLOW = "the merged weights are not finite, where the model's are, and nothing was written"


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
            model or does not fit it, or whose merged weight is beyond the stored dtype.
        AssetError: the model cannot be read.
        OutputError: ``out`` cannot be written, or is or lies in one of the others.
    """
    file, adapters, _ = look(adapter)
    if problem := changed_base(file.config):
        raise AdapterError(f"{adapter}: {problem}")
    refuse_masked(adapters, "they cannot be merged")
    checkpoint = read_checkpoint(model)
    notes = refuse_unmet(file.config, adapters, checkpoint)
    adapters, tied = without_tied(adapters, checkpoint)
    _refuse_tied({name: one for name, one in adapters.items() if name not in tied}, checkpoint)
    changes = _changes(adapters, checkpoint, transposed=_says_transposed(adapter))
    for given in (model, adapter):
        if _real(given) in (_real(out), *_real(out).parents):
            raise OutputError(f"{out} is or lies in {given}, which stays as it is")
    if family := family_of(adapters, checkpoint.shapes):
        notes = [family.told(plain_names(adapters).values()), *notes]
    report: dict[str, Rounding] = {}
    broken: list[str] = []
    claim = claimed(out, overwrite=overwrite, remove_empty=True)
    with claim as output, output.filling() as draft:
        refuse_other_layout(out, checkpoint.files)
        for name, keys in checkpoint.files.items():
            tensors, metadata = read_file(model / name)
            for key in keys:
                if key in changes:
                    old, tensors[key] = tensors[key], _changed(key, tensors[key], changes, report)
                    broken += overflow(key, old, tensors[key])
            raise_all(AdapterError, _OVERFLOW, broken)
            (draft / name).write_bytes(safetensors.numpy.save(tensors, metadata=metadata))
        left_out = copy_others(checkpoint, draft)
    return "\n".join([*(f"note: {note}" for note in notes), _told(report, changes, left_out, out)])


def _real(path: Path) -> Path:
    # Path.resolve raises for links in a circle.
    return Path(os.path.realpath(path))


def _says_transposed(adapter: Path) -> bool:
    return parse_json(read_bytes(adapter / CONFIG_NAME)).get("fan_in_fan_out") is True


def _refuse_tied(adapters: Entries, checkpoint: Checkpoint) -> None:
    """Raise where the output head reads an adapted embedding's weight, which the adapter spares."""
    if not is_tied(checkpoint):
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


def _changes(adapters: Entries, checkpoint: Checkpoint, *, transposed: bool) -> Changes:
    """Return what happens to each stored tensor, in this order: replaced, then changed."""
    pairs = pairs_of(adapters)
    # A pair is of the base weight that its file carries.
    under = {name for name in adapters if name.removesuffix(".weight") in pairs} - pairs.keys()
    rest = {name: one for name, one in adapters.items() if name not in under}
    changes: dict[str, list[Entry]] = {}
    for part in ({name: adapters[name] for name in under}, rest):
        for key, one in place(part, checkpoint, transposed=transposed).items():
            changes.setdefault(key, []).append(one)
    for key, one in biases(rest, checkpoint).items():
        changes.setdefault(key, []).append(one)
    return changes


def _changed(
    key: str, weight: np.ndarray, changes: Changes, report: dict[str, Rounding]
) -> np.ndarray:
    array = jnp.asarray(weight)
    for change in changes[key]:
        if isinstance(change, Full):
            array = jnp.asarray(change.value).astype(weight.dtype)
        elif isinstance(change, Rows):
            array = rows.put(array, change)
        elif key.endswith(".bias"):
            array = lowrank.add(array, scaled_bias(change).reshape(array.shape))  # pyright: ignore
        else:
            report[key] = rounding(array, [change])
            array = merged(array, change)
    return np.ascontiguousarray(np.asarray(array))


def _told(report: Mapping[str, Rounding], changes: Changes, left_out: LeftOut, out: Path) -> str:
    rows = [
        (key, one.dtype, f"{one.changed:,}", f"{one.unchanged:,}", f"{one.error:.3g}")
        for key, one in sorted(report.items())
    ]
    headings = ("weight", "dtype", "to change", "left unchanged", "error of the change")
    every = [(key, one) for key, own in changes.items() for one in own]
    full = [f"{key}: replaced in full" for key, one in every if isinstance(one, Full)]
    full += [
        f"{key}: {len(one.indices)} rows replaced" for key, one in every if isinstance(one, Rows)
    ]
    full += [
        f"{key}: lora_bias added"
        for key, one in every
        if isinstance(one, Adapter) and key not in report
    ]
    warned = [f"warning: {line}" for line in warnings_of(report)]
    lines = [table(headings, rows), *map(escaped, (*full, *warned, *left_out.lines()))]
    return "\n".join([*lines, f"the merged model is in {escaped(out)}"])
