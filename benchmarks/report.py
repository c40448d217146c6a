"""A run's figures as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from .harness import BenchmarkError, Result, Timing
from .stats import Comparison, Spread, compare, spread

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """The results of a run and where they were taken."""

    environment: Mapping[str, str]
    results: tuple[Result, ...]


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
    content = {"schema": SCHEMA, "environment": dict(report.environment), "results": results}
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
        return Report(fields["environment"], tuple(map(_result, fields["results"])))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BenchmarkError):
            raise
        raise BenchmarkError(f"this is no benchmark report: {error!r}") from error


def render(report: Report) -> Group:
    """Return the tables for a console."""
    facts = "\n".join(f"{name}: {value}" for name, value in report.environment.items())
    return Group(*(part for result in report.results for part in _render(result)), facts)


def _render(result: Result) -> Iterator[Table | str]:
    table = Table(title=f"{result.case}: {result.title}", title_justify="left")
    table.add_column("contestant")
    for heading in ("median (middle half)", "first step", "rounds", "ratio (middle half)"):
        table.add_column(heading, justify="right")
    against = comparisons(result)
    for timing in result.timings:
        table.add_row(
            timing.contestant,
            _quartiles(spread(timing.seconds), 1e3, " ms", 1),
            f"{timing.first_seconds:.2f} s",
            str(len(timing.seconds)),
            _ratio(against.get(timing.contestant)),
        )
    yield table
    yield (
        f"results equal within {result.difference:.1e} (allowed {result.tolerance:.1e}) over "
        f"{len(result.timings[0].results)} steps"
    )
    for name, comparison in against.items():
        yield f"{result.timings[0].contestant} against {name}: {comparison.verdict}"
    for timing in result.timings:
        facts = {**timing.versions, **timing.settings}
        yield f"{timing.contestant}: {', '.join(f'{k} {v}' for k, v in facts.items())}"


def _ratio(comparison: Comparison | None) -> str:
    """The ratio of ours to the row's contestant; noise is not shown as a figure."""
    if comparison is None:
        return ""
    return "noisy" if comparison.noise else _quartiles(comparison.ratio, 1, "", 3)


def _quartiles(values: Spread, factor: float, unit: str, digits: int) -> str:
    low, middle, high = (
        f"{factor * value:.{digits}f}" for value in (values.lower, values.median, values.upper)
    )
    return f"{middle}{unit} ({low} to {high})"


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
        Timing(**timing | {name: tuple(timing[name]) for name in ("results", "seconds")})
        for timing in fields["timings"]
    )
    raw = {name: value for name, value in fields.items() if name not in ("summary", "timings")}
    return Result(**raw, timings=timings)
