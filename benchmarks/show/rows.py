"""A run's figures as text: the rows that the console, the page and the Markdown all show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..measure.harness import Result, Timing
from ..measure.limits import Limits
from ..measure.stats import Comparison, Spread, spread
from .report import Report, comparisons

HEADINGS = (
    "median",
    "middle half",
    "of the limit",
    "compile",
    "first step",
    "peak memory",
    "FLOPs",
    "rounds",
    "ratio (middle half)",
)

PROFILE = ("operation", "result = operands", "in a step", "time in a step")

# So many rows of a profile are shown.
OPERATIONS = 12


@dataclass(frozen=True)
class Row:
    """One contestant of a case.

    Args:
        contestant: its name.
        cells: a text for each of ``HEADINGS``; empty where there is no figure.
        verdict: ours against this one; empty for ours.
        skipped: why it did not take part; empty where it did.
        ratio: the median ratio, ours over this one's; none for ours, for noise and for skipped.
    """

    contestant: str
    cells: tuple[str, ...] = ("",) * len(HEADINGS)
    verdict: str = ""
    skipped: str = ""
    ratio: float | None = None

    @property
    def word(self) -> str:
        """The verdict in a word: ``slower``, ``faster``, ``equal``, ``noisy``, ``skipped``."""
        if self.skipped:
            return "skipped"
        first = self.verdict.partition(" ")[0]
        short = {"no": "equal" if self.verdict.startswith("no difference") else "noisy"}
        return short.get(first, first)


def rows(result: Result, limits: Limits | None) -> list[Row]:
    """Return ours, then the others, the fastest first, then those that were skipped."""
    against = comparisons(result)
    ours, *others = result.timings
    others = sorted(others, key=lambda timing: spread(timing.seconds).median)
    shown = [_row(result, one, limits, against.get(one.contestant)) for one in (ours, *others)]
    return shown + [Row(name, skipped=why) for name, why in result.skipped.items()]


def checked(result: Result) -> str:
    """Return in a sentence how equal the results were."""
    return (
        f"results equal within {result.difference:.1e} (allowed {result.tolerance:.1e}) over "
        f"{result.steps_checked} steps"
    )


def share(result: Result, timing: Timing, limits: Limits | None) -> float | None:
    """Return the share of the limit that a contestant reaches; none where it is not known."""
    least = 0.0 if limits is None else limits.least(result.needed)
    return least / spread(timing.seconds).median if least else None


def operations(result: Result) -> list[tuple[str, ...]]:
    """Return the profile's longest operations as rows, the shortest of them together."""
    longest, rest = result.profile[:OPERATIONS], result.profile[OPERATIONS:]
    found = [(one.kind, one.shapes, f"{one.count:g}", clock(one.seconds)) for one in longest]
    if rest:
        seconds = clock(sum(one.seconds for one in rest))
        found.append(("others", "", f"{sum(one.count for one in rest):g}", seconds))
    return found


def facts(report: Report) -> dict[str, str]:
    """Return the environment and the peaks."""
    return {**report.environment, **({} if report.limits is None else _peaks(report.limits))}


def stated(report: Report) -> dict[str, str]:
    """Return versions by package, and settings by contestant; several values are all told."""
    found: dict[str, list[str]] = {}
    for name, value in _stated(report):
        values = found.setdefault(name, [])
        values += [value] * (value not in values)
    return {name: ", ".join(values) for name, values in found.items()}


def clock(seconds: float) -> str:
    """Return a time in the unit that suits it.

    >>> clock(2.5), clock(0.5), clock(0.00012)
    ('2.50 s', '500.00 ms', '120.00 µs')
    """
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.2f} µs"


def _stated(report: Report) -> Iterator[tuple[str, str]]:
    timings = [timing for result in report.results for timing in result.timings]
    for timing in timings:
        yield from timing.versions.items()
    for timing in timings:
        for name, value in timing.settings.items():
            yield f"{timing.contestant}, {name}", value


def _row(result: Result, timing: Timing, limits: Limits | None, against: Comparison | None) -> Row:
    found, reached = spread(timing.seconds), share(result, timing, limits)
    cells = (
        clock(found.median),
        f"{clock(found.lower)} to {clock(found.upper)}",
        "" if reached is None else f"{reached:.0%}",
        "" if timing.compile_seconds is None else f"{timing.compile_seconds:.2f} s",
        f"{timing.first_seconds:.2f} s",
        "" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:,.0f} MiB",
        "" if timing.flops is None else f"{timing.flops:.3g}",
        str(len(timing.seconds)),
        _ratio(against),
    )
    if against is None:
        return Row(timing.contestant, cells)
    ratio = None if against.noise else against.ratio.median
    return Row(timing.contestant, cells, against.verdict, ratio=ratio)


def _peaks(limits: Limits) -> dict[str, str]:
    peaks = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {dtype}" for dtype, rate in limits.flops.items())
    shares = ", ".join(
        f"{rate / limits.published[name]:.0%} of the published {name}"
        for name, rate in {**limits.flops, "bandwidth": limits.bandwidth}.items()
        if name in limits.published
    )
    found = {"measured peaks": f"{peaks}, {limits.bandwidth / 1e9:,.1f} GB/s ({limits.device})"}
    return found | ({"published peaks": shares} if shares else {})


def _ratio(comparison: Comparison | None) -> str:
    """The ratio of ours to the row's contestant; noise is not shown as a figure."""
    if comparison is None:
        return ""
    return "noisy" if comparison.noise else _quartiles(comparison.ratio)


def _quartiles(values: Spread) -> str:
    return f"{values.median:.3f} ({values.lower:.3f} to {values.upper:.3f})"
