"""``RESULTS.md``: goals, the tables of some runs, and the log of what was tried, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ..aot import facts as ahead
from ..aot.facts import Facts
from ..measure.environment import command
from ..measure.harness import Result
from ..measure.limits import Limits
from ..measure.stats import Comparison
from .attempts import Attempt
from .goals import COMPILE, Outcome
from .report import Report, comparisons
from .rows import HEADINGS, PROFILE, checked, facts, operations, rows, stated

HEAD = """# Results of the benchmarks

Written by `{command}`; not edited by hand.

Every case is first checked for equal results between the contestants, then timed in turns. A
ratio is that of the first contestant over the row's, pair by pair, and lower is better; a verdict
holds the interval of its median. A noisy run gets no verdict."""

# What a page of text has no room for.
SHOWN = (
    "median",
    "middle half",
    "of the limit",
    "compile",
    "peak memory",
    "FLOPs",
    "ratio (middle half)",
)


def to_markdown(
    reports: Sequence[Report],
    attempts: Sequence[Attempt],
    outcomes: Sequence[Outcome],
    written_by: str,
    compiled: Sequence[Facts] = (),
) -> str:
    """Return the document.

    Args:
        reports: the runs, one section each.
        attempts: what was tried.
        outcomes: what the runs say about the goals.
        written_by: the command that writes this.
        compiled: what was compiled ahead of time.
    """
    parts = [HEAD.format(command=written_by), "## Goals", *_goals(outcomes)]
    for report in reports:
        parts += _run(report)
    if compiled:
        parts += [f"## Compiled ahead of time: {ahead.LABEL}"]
    for one in compiled:
        parts += _compiled(one)
    parts += ["## What was tried", *_attempts(attempts)]
    return "\n\n".join(parts) + "\n"


def _goals(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield (
        "Ours over theirs, lower is better. A figure of a noisy run is shown as one, and counts "
        "like the others."
    )
    yield _table(
        ("goal", "at most", "median", "largest", "of", "verdict"),
        [
            (one.goal.what, f"{one.goal.most:g}{_unit(one)}", *_found(one), one.verdict)
            for one in outcomes
        ],
    )
    if reasons := {
        one.goal.what: one.goal.why
        for one in outcomes
        if one.goal.why and one.verdict.startswith("missed")
    }:
        yield "Why they were missed; what was tried is at the end."
        yield _list(reasons)


def _found(outcome: Outcome) -> tuple[str, str, str]:
    if not outcome.figures:
        return "", "", ""
    worst, unit = outcome.worst, _unit(outcome)
    noisy = " (noisy)" if worst.noisy else ""
    return (
        f"{outcome.middle:.3f}{unit}",
        f"{worst.value:.3f}{unit}{noisy}",
        f"{worst.case}, {worst.contestant}",
    )


def _unit(outcome: Outcome) -> str:
    return " s" if outcome.goal.measure == COMPILE else ""


def _run(report: Report) -> Iterator[str]:
    known = facts(report)
    machine = known.get("processor", "an unknown machine")
    yield f"## {_plain(machine)}, {known.get('date', 'no date')}"
    if "command" in known:
        yield f"    {known['command']}"
    told = {name: value for name, value in known.items() if name != "command"}
    yield _list(told)
    if len(report.results) > 1:
        yield "Ratios at a glance; ~ before those that get no verdict:"
        yield _glance(report)
    for result in report.results:
        yield from _case(result, report.limits)
    if report.failed:
        yield "### Cases that gave no result"
        yield _list(report.failed)
    yield "### Versions and settings"
    yield _list(stated(report))


def _glance(report: Report) -> str:
    """Return a table of the median ratios: a row for each case, a column for each contestant."""
    found = {result.case: comparisons(result) for result in report.results}
    names = list(dict.fromkeys(name for against in found.values() for name in against))
    return _table(
        ("case", *names),
        [
            (case, *(_ratio(against[name]) if name in against else "" for name in names))
            for case, against in found.items()
        ],
    )


def _ratio(found: Comparison) -> str:
    return f"{'' if found.shown else '~'}{found.ratio.median:.2f}"


def _case(result: Result, limits: Limits | None) -> Iterator[str]:
    yield f"### {_plain(result.case)}"
    yield f"{_plain(result.title)}; {checked(result)}."
    found = rows(result, limits)
    cells = [
        (
            row.contestant,
            *("" if row.skipped else row.cells[HEADINGS.index(name)] for name in SHOWN),
            f"skipped: {row.skipped}" if row.skipped else row.verdict,
        )
        for row in found
    ]
    yield _table(("contestant", *SHOWN, "verdict"), cells)
    if result.profile:
        yield (
            f"What {result.timings[0].contestant} does in a step, profiled after the timing; "
            "several may run at once:"
        )
        yield _table(PROFILE, operations(result))


def _compiled(facts: Facts) -> Iterator[str]:
    yield f"### {_plain(ahead.title(facts))}"
    yield f"    {command('aot', facts.request)}"
    told = ahead.sizes(facts) | {name: f"{n} of {size}" for name, n, size in ahead.moved(facts)}
    yield _list(told | {"verdict": facts.verdict, "versions": ahead.versions(facts)})
    if facts.notes:
        yield _plain("; ".join(facts.notes))


def _attempts(attempts: Sequence[Attempt]) -> Iterator[str]:
    if not attempts:
        yield "Nothing is in the log yet."
        return
    yield _table(
        ("date", "case", "tried", "before", "after", "change", "kept", "why"),
        [
            (
                one.date.isoformat(),
                one.case,
                one.tried,
                f"{one.before:g} {one.unit}",
                f"{one.after:g} {one.unit}",
                f"{one.change:+.1%}",
                "yes" if one.kept else "no",
                one.why,
            )
            for one in attempts
        ],
    )


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([_plain(cell) for cell in row] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(told: Mapping[str, str]) -> str:
    return "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in told.items())


def _plain(text: str) -> str:
    """Return a text in one line that Markdown shows as it is."""
    marks = r"([\\`*\[\]<>|]|(?<!\w)_|_(?!\w))"
    return " ".join(re.sub(marks, r"\\\1", text).split())
