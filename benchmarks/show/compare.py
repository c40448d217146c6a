"""Two runs side by side: what got slower or faster, and what else differs between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..measure.harness import Result, Timing
from ..measure.stats import Comparison, compare_apart, spread
from .report import Report
from .rows import stated

# What differs between any two runs and explains nothing.
ALWAYS_OTHER = ("date", "load before the run", "command")

ABSENT = "not there"


@dataclass(frozen=True)
class Change:
    """One contestant of one case in two runs.

    Args:
        case: its name.
        contestant: its name.
        before: the median seconds of the earlier run.
        after: the median seconds of the later one.
        found: the later times over the earlier ones.
    """

    case: str
    contestant: str
    before: float
    after: float
    found: Comparison

    @property
    def verdict(self) -> str:
        """One of ``slower``, ``faster``, ``no difference shown``, ``noisy``, ``too few rounds``."""
        if self.found.noise:
            return "noisy"
        if self.found.interval is None:
            return "too few rounds"
        return self.found.verdict.partition(" (")[0]

    def exceeds(self, limit: float) -> bool:
        """Return whether the whole interval of the ratio lies above ``limit``; noise shows none."""
        interval = self.found.interval
        return not self.found.noise and interval is not None and interval[0] > limit


def changes(before: Report, after: Report) -> tuple[Change, ...]:
    """Return every contestant that both runs timed at the same work, in the later run's order."""
    earlier = _timings(before)
    return tuple(
        _change(*earlier[key], *later)
        for key, later in _timings(after).items()
        if key in earlier and _work(earlier[key][0]) == _work(later[0])
    )


def unmatched(before: Report, after: Report) -> list[str]:
    """Return what only one of the runs has, or has with other work, a sentence for each."""
    one, two = ({r.case: r for r in report.results} for report in (before, after))
    found = [
        f"{case}: only in the earlier run{_why(after, case)}" for case in one if case not in two
    ]
    found += [
        f"{case}: only in the later run{_why(before, case)}" for case in two if case not in one
    ]
    for case in one.keys() & two.keys():
        found += _unmatched(one[case], two[case])
    return sorted(found)


def differences(before: Report, after: Report) -> list[tuple[str, str, str]]:
    """Return what differs in environment, versions, settings and peaks: name, before, after."""
    one, two = (_facts(report) for report in (before, after))
    return [
        (name, one.get(name, ABSENT), two.get(name, ABSENT))
        for name in dict.fromkeys([*one, *two])
        if one.get(name) != two.get(name)
    ]


def _timings(report: Report) -> dict[tuple[str, str], tuple[Result, Timing]]:
    return {(r.case, t.contestant): (r, t) for r in report.results for t in r.timings}


def _work(result: Result) -> tuple[Any, ...]:
    return result.title, dict(result.sizes), result.needed


def _change(one: Result, before: Timing, two: Result, after: Timing) -> Change:
    crowds = (one.cores_elsewhere, two.cores_elsewhere)
    return Change(
        two.case,
        after.contestant,
        spread(before.seconds).median,
        spread(after.seconds).median,
        compare_apart(after.seconds, before.seconds, crowds),
    )


def _why(report: Report, case: str) -> str:
    return f"; the other one failed: {report.failed[case]}" if case in report.failed else ""


def _unmatched(one: Result, two: Result) -> Iterator[str]:
    if _work(one) != _work(two):
        yield f"{two.case}: not compared, its work is another: {one.title!r}, then {two.title!r}"
        return
    before, after = ({t.contestant for t in result.timings} for result in (one, two))
    for name in sorted(before ^ after):
        run, other = ("earlier", two) if name in before else ("later", one)
        why = f"; skipped in the other: {other.skipped[name]}" if name in other.skipped else ""
        yield f"{two.case}: {name}: only in the {run} run{why}"


def _facts(report: Report) -> dict[str, str]:
    facts = {k: v for k, v in report.environment.items() if k not in ALWAYS_OTHER}
    if (limits := report.limits) is not None:
        facts["device"] = limits.device
        facts |= {f"peak, {k}": f"{rate / 1e9:,.0f} GFLOP/s" for k, rate in limits.flops.items()}
        facts["bandwidth"] = f"{limits.bandwidth / 1e9:,.1f} GB/s"
    return facts | stated(report)
