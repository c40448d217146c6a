"""A run's figures, and their JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..case import BenchmarkError, Needed
from ..measure.harness import Result, Timing
from ..measure.limits import Limits
from ..measure.profiling import Operation
from ..measure.stats import Comparison, compare, spread

SCHEMA = 2


@dataclass(frozen=True)
class Report:
    """The results of a run and where they were taken.

    Args:
        environment: the machine, the date and the flags.
        results: one for each case.
        limits: the peaks of the machine; none where they were not measured.
        failed: cases that gave no result, and why.
    """

    environment: Mapping[str, str]
    results: tuple[Result, ...]
    limits: Limits | None = None
    failed: Mapping[str, str] = field(default_factory=dict)


def comparisons(result: Result) -> dict[str, Comparison]:
    """Return how the first contestant compares to each other one, by the other's name."""
    ours, *others = result.timings
    return {
        theirs.contestant: compare(ours.seconds, theirs.seconds, result.cores_elsewhere)
        for theirs in others
    }


def to_json(report: Report) -> bytes:
    """Return every figure, raw, and the medians and ratios that follow from them.

    >>> from_json(to_json(Report({"cores": "2"}, ()))).environment
    {'cores': '2'}
    """
    results = [asdict(result) | {"summary": _summary(result)} for result in report.results]
    content = {
        "schema": SCHEMA,
        "environment": dict(report.environment),
        "limits": None if report.limits is None else asdict(report.limits),
        "results": results,
        "failed": dict(report.failed),
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def from_json(content: bytes) -> Report:
    """Return the report that ``to_json`` wrote.

    Raises:
        BenchmarkError: this is no such report.
    """
    try:
        fields = json.loads(content)
        if fields["schema"] != SCHEMA:
            raise BenchmarkError(f"schema: got {fields['schema']!r}, wanted {SCHEMA}")
        limits = fields["limits"]
        return Report(
            fields["environment"],
            tuple(map(_result, fields["results"])),
            None if limits is None else Limits(**limits),
            fields["failed"],
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BenchmarkError):
            raise
        raise BenchmarkError(f"this is no benchmark report: {error!r}") from error


def _summary(result: Result) -> dict[str, Any]:
    return {
        "seconds": {t.contestant: asdict(spread(t.seconds)) for t in result.timings},
        "ratios": {
            name: asdict(comparison) | {"verdict": comparison.verdict}
            for name, comparison in comparisons(result).items()
        },
    }


def _result(fields: Mapping[str, Any]) -> Result:
    timings = tuple(
        Timing(**timing | {"seconds": tuple(timing["seconds"])}) for timing in fields["timings"]
    )
    raw = {name: value for name, value in fields.items() if name not in ("summary", "timings")}
    profile = tuple(Operation(**one) for one in fields.get("profile", ()))
    needed = Needed(**fields["needed"])
    return Result(**raw | {"timings": timings, "needed": needed, "profile": profile})
