"""A run's figures as tables for a console."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..measure.harness import Result
from ..measure.limits import Limits
from ..measure.stats import CONFIDENCE
from .growth import Found, Slope, growths
from .report import Report
from .rows import HEADINGS, PROFILE, checked, facts, operations, rows

# A file or a pipe takes the tables unbroken.
WIDE = 160


def console() -> Console:
    """Return the standard output, wide where it is no terminal."""
    found = Console()
    if not found.is_terminal:
        found.width = max(found.width, WIDE)
    return found


def render(report: Report) -> Group:
    """Return the tables for a console."""
    parts: list[Table | str] = [
        part for result in report.results for part in _render(result, report.limits)
    ]
    if found := growths(report):
        parts.append(_growth(found))
    parts += [f"{name} gave no result: {why}" for name, why in report.failed.items()]
    parts.append("\n".join(f"{name}: {value}" for name, value in facts(report).items()))
    # A text in brackets, such as an extra's name, is no markup.
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def _render(result: Result, limits: Limits | None) -> Iterator[Table | str]:
    table = Table(title=f"{result.case}: {result.title}", title_justify="left")
    table.add_column("contestant", overflow="fold")
    for heading in _narrow(HEADINGS, "({})"):
        table.add_column(heading, justify="right")
    found = rows(result, limits)
    for row in found:
        table.add_row(row.contestant, *(("skipped",) if row.skipped else _narrow(row.cells)))
    yield table
    yield checked(result)
    for row in found:
        if row.verdict:
            yield f"{result.timings[0].contestant} against {row.contestant}: {row.verdict}"
    for row in found:
        if row.skipped:
            yield f"{row.contestant} skipped: {row.skipped}"
    if result.profile:
        yield _profile(result)
    for timing in result.timings:
        said = {**timing.versions, **timing.settings}
        yield f"{timing.contestant}: {', '.join(f'{k} {v}' for k, v in said.items())}"


def _profile(result: Result) -> Table:
    table = Table(title=f"what {result.timings[0].contestant} does", title_justify="left")
    for heading in PROFILE:
        table.add_column(heading)
    for row in operations(result):
        table.add_row(*map(Text, row))
    return table


def _growth(found: Sequence[Found]) -> Table:
    table = Table(
        title=f"growth: p of seconds ~ size^p ({CONFIDENCE:.0%} interval)", title_justify="left"
    )
    for heading in ("group", "contestant", "with", "sizes", "p", "p at the largest"):
        table.add_column(heading)
    for one in found:
        growth = one.growth
        fixed = "".join(f", {name} {size}" for name, size in one.fixed.items())
        exponents = ("noisy", "") if one.noise else map(_slope, (growth.every, growth.largest))
        sizes = ", ".join(map(str, growth.every.sizes))
        table.add_row(one.group, one.contestant, one.axis + fixed, sizes, *exponents)
    return table


def _slope(slope: Slope) -> str:
    if slope.interval is None:
        return f"{slope.exponent:.2f}"
    low, high = slope.interval
    return f"{slope.exponent:.2f} ({low:.2f} to {high:.2f})"


def _narrow(cells: Sequence[str], form: str = "{}") -> tuple[str, ...]:
    """Return the cells with the spread below its median, as a console is narrow."""
    median, half, *others = cells
    return f"{median}\n{form.format(half)}", *others
