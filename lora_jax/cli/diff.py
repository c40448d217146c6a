"""``lora-jax diff``: in what two adapter directories differ."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.arithmetic import subtract
from ..adapters.resize import delta_norm
from ..adapters.svd import misfits, pairs_of, ratio
from ..core.adapter import Adapter, Adapters, Entry, Full, Rows, rank
from ..core.config.peft_fields import DEFAULTS
from ..core.errors import AdapterError, raise_all
from ..core.shown_text import escaped
from ..core.text_tables import table
from ..peft import AdapterFile
from ..peft.tensors import changed_base
from ..peft.without_model import look


@dataclass(frozen=True)
class DiffOptions:
    """Show in what two adapters differ: the configuration, and the change of every weight.

    Args:
        one: an adapter directory.
        other: another one, of the same model.
    """

    one: Path
    other: Path


def diff_files(options: DiffOptions) -> str:
    """Return the fields that differ, and ``‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖`` of every module.

    Raises:
        AdapterError: one cannot be read, or a module that both have differs in shape.
    """
    (file, adapters, _), (other_file, others, _) = map(look, (options.one, options.other))
    adapters, others = _widened(adapters), _widened(others)
    problems = misfits([_plain(adapters), _plain(others)])
    raise_all(AdapterError, "these adapters are not of one model", problems)
    rows = []
    for name in dict.fromkeys([*adapters, *others]):
        if name in adapters and name in others:
            rows.append(_row(name, adapters[name], others[name]))
        else:
            where = options.one if name in adapters else options.other
            rows.append((name, "", "", f"only in {where}"))
    fields = _fields(file, other_file) or ["the configurations are equal"]
    notes = {
        each.config.init_lora_weights: changed_base(each.config) for each in (file, other_file)
    }
    said = [f"note: {note}" for note in notes.values() if note]
    return "\n".join([*map(escaped, (*fields, *said)), "", table(_HEADINGS, rows)])


_HEADINGS = ("module", "r", "|ΔW|", "relative difference")


def _row(name: str, one: Any, other: Any) -> tuple[str, str, str, str]:
    if isinstance(one, Rows) or isinstance(other, Rows):
        return (name, "", "", f"rows trained, {_rows_difference(one, other)}")
    if isinstance(one, Full) or isinstance(other, Full):
        return (name, "", "", f"trained in full, {_full_difference(one, other)}")
    ranks = "/".join(map(str, dict.fromkeys([rank(one), rank(other)])))
    norms = "/".join(dict.fromkeys(f"{delta_norm(each):.4g}" for each in (one, other)))
    return (name, ranks, norms, _said(difference(one, other)) + _magnitudes(one, other))


def _magnitudes(one: Adapter, other: Adapter) -> str:
    """Say how DoRA's magnitudes differ, beside A·B; what both make of a weight needs the model."""
    x, y = one.magnitude, other.magnitude
    if x is None and y is None:
        return ""
    if x is None or y is None:
        return ", a magnitude in one of them only"
    x, y = (np.asarray(each, np.float64) for each in (x, y))
    return f", magnitude {_said(ratio(float(np.linalg.norm(x - y)), float(np.linalg.norm(x))))}"


def difference(one: Adapter, other: Adapter) -> float:
    """Return ``‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖``, ``ΔW = s·A·B``; 0 exactly where all three are equal."""
    same = one.scale == other.scale and all(
        np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in ((one.a, other.a), (one.b, other.b))
    )
    if same:
        return 0.0
    one, other = _plain({"": one})[""], _plain({"": other})[""]
    return ratio(delta_norm(subtract({"": one}, {"": other})[""]), delta_norm(one))


def _plain(adapters: Adapters) -> dict[str, Adapter]:
    """Return the pairs without magnitudes, and as if all acted everywhere."""
    return {
        name: dataclasses.replace(one, magnitude=None, masked=False)
        for name, one in pairs_of(adapters).items()
    }


def _full_difference(one: Any, other: Any) -> str:
    if type(one) is not type(other):
        return "in one of them only"
    x, y = (np.asarray(each.value, np.float64) for each in (one, other))
    if x.shape != y.shape:
        return f"{x.shape} and {y.shape}"
    return _said(ratio(float(np.linalg.norm(x - y)), float(np.linalg.norm(x))))


def _rows_difference(one: Any, other: Any) -> str:
    if type(one) is not type(other):
        return "in one of them only"
    if one.indices != other.indices:
        return f"{list(one.indices)} and {list(other.indices)}"
    return _full_difference(*(Full(each.values) for each in (one, other)))


def _said(value: float) -> str:
    return f"{value:.3g}" if value else "equal"


def _widened(adapters: Adapters) -> dict[str, Entry]:
    # Dtypes may differ: the difference is formed in float32.
    return dict(adapters) | {
        name: dataclasses.replace(one, a=one.a.astype("float32"), b=one.b.astype("float32"))
        for name, one in pairs_of(adapters).items()
    }


def _fields(one: AdapterFile, other: AdapterFile) -> list[str]:
    # Fields that say nothing to this library are compared as they are.
    every = {**one.other, **other.other}
    defaults = {name: DEFAULTS.get(name) for name in sorted(every)}
    values = [
        {"base_model": file.base_model, "task_type": file.task_type}
        | {f.name: getattr(file.config, f.name) for f in dataclasses.fields(file.config)}
        | {name: file.other.get(name, default) for name, default in defaults.items()}
        for file in (one, other)
    ]
    return [
        f"{name}: {values[0][name]!r} and {values[1][name]!r}"
        for name in values[0]
        if values[0][name] != values[1][name]
    ]
