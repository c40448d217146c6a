"""``lora-jax inspect``: what an adapter directory holds, and what looks wrong in it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ..adapters.resize import delta_norm, effective_rank
from ..core.adapter import Adapter, Adapters, Full, Rows, count, rank
from ..core.shown_text import escaped
from ..core.text_tables import table
from ..peft import AdapterFile
from ..peft.module_tensors import in_file
from ..peft.tensors import changed_base
from ..peft.without_model import look

# Adapters that were trained use about half of their rank and differ by a few times in norm.
LOW_SHARE = 0.25
HUGE_TIMES = 30.0

# A larger number is infinite in a model of this dtype.
_NARROWEST = ("float16", "float32")

_HEADINGS = ("module", "A", "B", "dtype", "r", "scale", "|A|", "|B|", "|ΔW|", "effective r")


@dataclass(frozen=True)
class InspectOptions:
    """Show what an adapter holds: configuration, every module, and suspicious findings.

    Args:
        adapter: a directory with adapter_config.json and adapter_model.safetensors.
    """

    adapter: Path


@dataclass(frozen=True)
class Facts:
    """The numbers of one adapter.

    Args:
        norms: of A, B and ``ΔW`` (Frobenius).
        effective_rank: see ``lora_jax.adapters.resize.effective_rank``.
    """

    adapter: Adapter
    norms: tuple[float, float, float]
    effective_rank: float


def inspect_files(options: InspectOptions) -> str:
    """Return the configuration, a line for each module, and what looks wrong.

    Raises:
        AdapterError: the adapter cannot be read.
    """
    file, adapters, unmet = look(options.adapter)
    facts = {name: _facts(one) for name, one in adapters.items() if isinstance(one, Adapter)}
    found = findings(facts) + overflows(facts) + list(filter(None, [changed_base(file.config)]))
    found = [f"suspicious: {line}" for line in found + unmet]
    return "\n".join(
        [
            *map(escaped, _configuration(file)),
            "",
            table(_headings(file), [_row(name, one) for name, one in facts.items()]),
            *map(escaped, _full(adapters)),
            "",
            f"{len(facts)} modules, {count(adapters):,} trained values",
            *map(escaped, found or ["nothing suspicious"]),
        ]
    )


def findings(facts: Mapping[str, Facts]) -> list[str]:
    """Return what looks wrong: nothing trained, a rank far too large, huge norms, mixed dtypes."""
    found = []
    typical = statistics.median([one.norms[2] for one in facts.values()] or [0.0])
    for name, one in facts.items():
        a, b, change = one.norms
        r = rank(one.adapter)
        if not a or not b:
            found.append(f"{name}: {'B' if a else 'A'} is all zero, so the adapter does nothing")
        elif one.effective_rank < LOW_SHARE * r:
            found.append(
                f"{name}: the effective rank is {one.effective_rank:.1f} of {r}; "
                "a smaller r holds the same"
            )
        if typical and change > HUGE_TIMES * typical:
            found.append(f"{name}: |ΔW| is {change / typical:.0f} times the median")
    dtypes = {one.adapter.a.dtype.name for one in facts.values()}
    dtypes |= {one.adapter.b.dtype.name for one in facts.values()}
    if len(dtypes) > 1:
        found.append(f"the dtypes differ: {', '.join(sorted(dtypes))}")
    return found


def overflows(facts: Mapping[str, Facts]) -> list[str]:
    """Return where a scale, or ``ΔW``, is beyond a dtype that models have: merged it is infinite.

    ``‖ΔW‖`` is not below its largest value; a change of this size is none that was trained.
    """
    found = []
    for name, one in facts.items():
        for what, value in (("the scale", one.adapter.scale), ("|ΔW|", one.norms[2])):
            size = abs(float(np.asarray(value)))
            beyond = [dtype for dtype in _NARROWEST if not size <= float(jnp.finfo(dtype).max)]
            if beyond:
                found.append(f"{name}: {what} is {size:.3g}, beyond {' and '.join(beyond)}")
    return found


def _facts(adapter: Adapter) -> Facts:
    a, b = (float(jnp.linalg.norm(half.astype(jnp.float32))) for half in (adapter.a, adapter.b))
    # The scale is a number of Python's, so that a change beyond float32 has its size here.
    change = delta_norm(replace(adapter, scale=1.0)) * abs(float(np.asarray(adapter.scale)))
    return Facts(adapter, (a, b, change), effective_rank(adapter))


def _row(name: str, facts: Facts) -> tuple[str, ...]:
    one = facts.adapter
    a, b, *_ = in_file(one).values()
    shapes = (str(half.shape) for half in (a, b))
    magnitude = [] if one.magnitude is None else [f"{jnp.linalg.norm(one.magnitude):.4g}"]
    norms = (f"{value:.4g}" for value in facts.norms)
    dtype = "/".join(dict.fromkeys([one.a.dtype.name, one.b.dtype.name]))
    scale = f"{one.scale:g}"
    effective = f"{facts.effective_rank:.1f}"
    return (name, *shapes, dtype, str(rank(one)), scale, *norms, effective, *magnitude)


def _headings(file: AdapterFile) -> tuple[str, ...]:
    """Return the headings; DoRA's ``|ΔW|`` needs the model, so its columns are of A·B alone."""
    if not file.config.use_dora:
        return _HEADINGS
    return (*("|s·A·B|" if one == "|ΔW|" else one for one in _HEADINGS), "|magnitude|")


def _configuration(file: AdapterFile) -> list[str]:
    default = type(file.config)()
    lines = [f"base model: {file.base_model}", f"task type: {file.task_type}"]
    for field in dataclasses.fields(file.config):
        value = getattr(file.config, field.name)
        if not field.compare:
            continue
        always = field.name in ("r", "lora_alpha", "target_modules")
        if always or value != getattr(default, field.name):
            lines.append(f"{field.name}: {value}")
    return lines


def _full(adapters: Adapters) -> list[str]:
    return [
        f"{name}: trained in full, {tuple(one.value.shape)} {one.value.dtype}"
        for name, one in adapters.items()
        if isinstance(one, Full)
    ] + [
        f"{name}: rows {', '.join(map(str, one.indices))} trained, {tuple(one.values.shape)} "
        f"{one.values.dtype}"
        for name, one in adapters.items()
        if isinstance(one, Rows)
    ]
