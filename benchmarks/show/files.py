"""Reports from files, every bad one named at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_jax.core.errors import raise_all

from ..case import BenchmarkError
from .report import Report, from_json


def read(files: Sequence[Path]) -> list[Report]:
    """Return the reports that these files hold.

    Raises:
        BenchmarkError: there is none, or some cannot be read or are no report.
    """
    reports, problems = [], [] if files else ["got no file"]
    for file in files:
        try:
            reports.append(from_json(file.read_bytes()))
        except (OSError, BenchmarkError) as error:
            problems.append(f"{file}: {getattr(error, 'strerror', None) or error}")
    raise_all(BenchmarkError, "these reports cannot be read", problems)
    return reports
