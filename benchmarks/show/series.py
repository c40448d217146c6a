"""What the plots show, as numbers: a report's ratios, its points under the roof, its lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..measure.harness import Result
from ..measure.stats import Comparison, spread
from .growth import along, fit
from .report import Report, comparisons


@dataclass(frozen=True)
class Point:
    """A contestant under the roof.

    Args:
        case: its case.
        contestant: its name.
        intensity: the case's least FLOPs over its least bytes.
        rate: the case's least FLOPs over the contestant's median seconds.
    """

    case: str
    contestant: str
    intensity: float
    rate: float


@dataclass(frozen=True)
class Line:
    """How one contestant's time grows with one size, the other sizes held.

    Args:
        contestant: its name.
        sizes: in rising order.
        seconds: the median at each.
        exponent: of the power law that fits best; none for a single size.
    """

    contestant: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    exponent: float | None


@dataclass(frozen=True)
class Scaling:
    """The lines of one group along one size.

    Args:
        group: its name.
        size: what varies.
        held: the other sizes.
        lines: one for each contestant, ours first.
    """

    group: str
    size: str
    held: Mapping[str, int]
    lines: tuple[Line, ...]

    @property
    def name(self) -> str:
        """The group, the size and what is held, for a title.

        >>> Scaling("layer", "tokens", {"r": 16}, ()).name
        'layer by tokens, r = 16'
        """
        held = "".join(f", {name} = {value}" for name, value in self.held.items())
        return f"{self.group} by {self.size}{held}"


def contestants(report: Report) -> list[str]:
    """Return the names of all that were timed, in the order in which they appear."""
    names = (timing.contestant for result in report.results for timing in result.timings)
    return list(dict.fromkeys(names))


def ratios(report: Report) -> dict[str, dict[str, Comparison]]:
    """Return ours against each other one, by the other's name, then by case."""
    found: dict[str, dict[str, Comparison]] = {}
    for result in report.results:
        for name, comparison in comparisons(result).items():
            found.setdefault(name, {})[result.case] = comparison
    return found


def points(report: Report, dtype: str) -> list[Point]:
    """Return the points of the cases in this dtype that state their FLOPs and their bytes."""
    return [
        Point(
            result.case,
            timing.contestant,
            result.needed.flops / result.needed.bytes,
            result.needed.flops / spread(timing.seconds).median,
        )
        for result in report.results
        if result.needed.dtype == dtype and result.needed.flops and result.needed.bytes
        for timing in result.timings
    ]


def scalings(report: Report) -> list[Scaling]:
    """Return the lines of every group along every size that varies in it."""
    return [
        Scaling(one.group, one.axis, one.fixed, _lines(one.axis, one.results))
        for one in along(report)
    ]


def _lines(size: str, results: Sequence[Result]) -> tuple[Line, ...]:
    medians: dict[str, dict[int, float]] = {}
    for result in results:
        for timing in result.timings:
            of = medians.setdefault(timing.contestant, {})
            of[result.sizes[size]] = spread(timing.seconds).median
    return tuple(
        Line(name, tuple(found), tuple(found.values()), _exponent(found))
        for name, found in medians.items()
    )


def _exponent(medians: Mapping[int, float]) -> float | None:
    """Return the slope of the straight line through the logarithms."""
    if len(medians) < 2:
        return None
    return fit(list(medians), list(medians.values())).every.exponent
