"""``python -m benchmarks compare``: two runs side by side, and a status for a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..case import BenchmarkError
from ..show import compare, files
from ..show.compare import Change
from ..show.report import Report
from ..show.rows import clock
from ..show.tables import console

NOT_IN_TURNS = (
    "These times were not taken in turns. The interval holds each run's own scatter, not what "
    "differed between the runs: only `run` compares contestants that took turns."
)


@dataclass(frozen=True)
class CompareOptions:
    """Compare two runs; exit with 1 if anything got slower than the limit.

    Args:
        before: the JSON of the earlier run.
        after: the JSON of the later run.
        limit: the ratio, later over earlier, that an interval must lie above to count.
    """

    before: Annotated[Path, tyro.conf.Positional]
    after: Annotated[Path, tyro.conf.Positional]
    limit: float = 1.05


def main(options: CompareOptions) -> int:
    """Print what differs, every ratio, and what was beyond the limit; 1 if there is any."""
    if not options.limit > 0:
        raise BenchmarkError(f"limit: got {options.limit}, wanted more than 0")
    before, after = files.read([options.before, options.after])
    found = compare.changes(before, after)
    console().print(render(before, after, found, options.limit))
    return 1 if any(change.exceeds(options.limit) for change in found) else 0


def render(before: Report, after: Report, found: Sequence[Change], limit: float) -> Group:
    """Return the comparison for a console: first what else differs, last what it comes to."""
    dates = [report.environment.get("date", "no date") for report in (before, after)]
    parts: list[str | Table] = [f"before: {dates[0]}\nafter: {dates[1]}"]
    other = compare.differences(before, after)
    if other:
        table = Table("differs", "before", "after", title="Not the same", title_justify="left")
        for row in other:
            table.add_row(*map(Text, row))
        parts.append(table)
    else:
        parts.append("environment, versions, settings and peaks are the same")
    parts += compare.unmatched(before, after)
    parts += [_table(found), NOT_IN_TURNS, *conclusion(found, limit)]
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def conclusion(found: Sequence[Change], limit: float) -> list[str]:
    """Return in words how many are beyond the limit and which, and how many show nothing."""
    if not found:
        return ["nothing to compare: no contestant of a case is in both runs"]
    beyond = [change for change in found if change.exceeds(limit)]
    unknown = [change for change in found if change.verdict in ("noisy", "too few rounds")]
    lines = [f"{len(beyond)} of {len(found)} slower than {limit:g} times, beyond the interval"]
    lines += [f"  {one.case}, {one.contestant}: {one.found.verdict}" for one in beyond]
    if unknown:
        lines.append(f"{len(unknown)} of {len(found)} show nothing:")
        lines += [f"  {one.case}, {one.contestant}: {one.found.verdict}" for one in unknown]
    return lines


def _table(found: Sequence[Change]) -> Table:
    table = Table("case", "contestant")
    for heading in ("before", "after", "after / before", "interval"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for one in found:
        interval, noisy = one.found.interval, bool(one.found.noise)
        table.add_row(
            Text(one.case),
            Text(one.contestant),
            clock(one.before),
            clock(one.after),
            "" if noisy else f"{one.found.ratio.median:.3f}",
            "" if noisy or interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
            one.verdict,
        )
    return table
