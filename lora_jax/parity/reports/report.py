"""What a run of the suite found, as data: written and read as JSON, shown as Markdown."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ...core.errors import ParityError
from ...core.io.intake import parse_json
from ..verdicts import TensorVerdict, Verdict
from .checks import CheckResult

FORMAT = 1
PACKAGES = ("lora_jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "peft", "transformers")


@dataclass(frozen=True)
class Report:
    """One run of checks.

    Args:
        environment: versions, CPU, threads, precision and seed; see ``environment``.
        checks: the results, in the order in which they ran.
        trajectories: for each trajectory by name, the distances at every step and the noise band.
        kills: for each mutant by name, the verdicts that a check or a common test gave it.
    """

    environment: Mapping[str, Any]
    checks: Sequence[CheckResult]
    trajectories: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kills: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether something ran and no check was ``MISMATCH``, ``BIASED`` or ``VACUOUS``."""
        ran = [check.verdict for check in self.checks if check.verdict is not None]
        return bool(ran) and all(verdict.ok for verdict in ran)

    @property
    def ratio(self) -> float:
        """The median of JAX's error over PyTorch's, both against the truth."""
        found = sorted(one.ratio for check in self.checks for one in check.tensors if one.ratio > 0)
        return found[len(found) // 2] if found else math.nan


def environment(seed: int) -> dict[str, Any]:
    """Return what a reader must know to judge or repeat the run."""
    import jax

    return {
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "backend": jax.default_backend(),
        "devices": [str(device) for device in jax.devices()],
        "x64": bool(jax.config.jax_enable_x64),  # pyright: ignore[reportAttributeAccessIssue]
        "matmul_precision": jax.config.jax_default_matmul_precision,  # pyright: ignore
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "seed": seed,
    }


def to_json(report: Report) -> str:
    """Return the report as JSON; NaN and infinity become strings."""
    fields = {"format": FORMAT, **asdict(report)}
    return json.dumps(_encoded(fields), indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> Report:
    """Return the report that ``to_json`` wrote.

    Raises:
        ParityError: not a report, or one of another format.
    """
    try:
        fields = parse_json(text)
        if fields["format"] != FORMAT:
            raise ParityError(f"got a report of format {fields['format']}, wanted {FORMAT}")
        checks = tuple(_check(one) for one in fields["checks"])
        trajectories = _decoded(fields["trajectories"])
        return Report(fields["environment"], checks, trajectories, fields["kills"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, ParityError):
            raise
        raise ParityError(
            f"not a parity report: {error!r}; write one with lora-jax parity"
        ) from error


def _check(fields: Mapping[str, Any]) -> CheckResult:
    tensors = tuple(_tensor(one) for one in fields["tensors"])
    return CheckResult(**{**fields, "tensors": tensors})


def _tensor(fields: Mapping[str, Any]) -> TensorVerdict:
    numbers = ("jax", "torch", "bound", "slope", "slope_limit")
    found: dict[str, Any] = {**fields, **{name: float(fields[name]) for name in numbers}}
    found |= {"verdict": Verdict(fields["verdict"]), "shape": tuple(fields["shape"])}
    return TensorVerdict(**found)


def _encoded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encoded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decoded(value: Any) -> Any:
    """Return what ``_encoded`` was given, where texts stand for numbers alone."""
    if isinstance(value, Mapping):
        return {key: _decoded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    """Return the CPU's model and those of its flags that decide how sums are formed."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {"model": platform.processor(), "flags": []}
    lines: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        lines[name.strip()] = value.strip()
    wanted = ("avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
    flags = set(lines.get("flags", lines.get("Features", "")).split())
    model = lines.get("model name", platform.processor())
    return {"model": model, "flags": [flag for flag in wanted if flag in flags]}
