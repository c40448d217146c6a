"""What the figures should be, from ``goals.toml``, and what a run's are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median

from ..case import BenchmarkError
from ..measure.harness import Result
from . import listed
from .report import Report, comparisons
from .rows import share

FILE = Path(__file__).parents[1] / "goals.toml"

TIME, MEMORY, LIMIT, COMPILE = "time", "memory", "limit", "compile"


@dataclass(frozen=True)
class Goal:
    """A figure that is wanted of all the cases and contestants that its patterns name.

    Args:
        what: in a sentence.
        cases: patterns of cases' names.
        against: patterns of contestants' names.
        most: the largest figure that will do.
        measure: ``time`` and ``memory`` are ours over each contestant's, ``limit`` is the named
            contestant's own time over the least that the machine needs, and ``compile`` the
            seconds of its compilation.
        middle: the median over cases and contestants is what counts, not each of them.
        why: what a profile shows about a goal that is missed.
    """

    what: str
    cases: list[str]
    against: list[str]
    most: float
    measure: str = TIME
    middle: bool = False
    why: str = ""


@dataclass(frozen=True)
class Figure:
    """One figure for a goal.

    Args:
        case: its name.
        contestant: its name.
        value: the figure.
        noisy: whether the run gives no verdict on it.
    """

    case: str
    contestant: str
    value: float
    noisy: bool = False


@dataclass(frozen=True)
class Outcome:
    """What was found for a goal; no figures where nothing was measured."""

    goal: Goal
    figures: tuple[Figure, ...]

    @property
    def worst(self) -> Figure:
        """The figure that is the largest."""
        return max(self.figures, key=lambda figure: figure.value)

    @property
    def missed(self) -> tuple[Figure, ...]:
        """The figures that are too large."""
        return tuple(one for one in self.figures if one.value > self.goal.most)

    @property
    def middle(self) -> float:
        """The median of the figures."""
        return median(one.value for one in self.figures)

    @property
    def verdict(self) -> str:
        """Whether the goal was reached, in a few words.

        >>> goal = Goal("a step", ["step"], ["PEFT"], most=0.8)
        >>> Outcome(goal, (Figure("step", "PEFT", 0.75), Figure("step", "PEFT", 0.9))).verdict
        'missed in 1 of 2'
        """
        if not self.figures:
            return "not measured"
        if self.goal.middle:
            return "reached" if self.middle <= self.goal.most else "missed"
        if self.missed:
            return f"missed in {len(self.missed)} of {len(self.figures)}"
        return "reached"


def parse(text: str) -> list[Goal]:
    """Return the goals in their order.

    Raises:
        BenchmarkError: as ``listed.parse`` does, or a measure is not known.
    """
    goals = listed.parse(text, Goal, "goal")
    known = (TIME, MEMORY, LIMIT, COMPILE)
    if wrong := sorted({goal.measure for goal in goals} - {*known}):
        raise BenchmarkError(f"measure: got {wrong}, wanted one of {list(known)}")
    return goals


def outcomes(goals: Sequence[Goal], reports: Sequence[Report]) -> list[Outcome]:
    """Return what these runs say about each goal."""
    return [Outcome(goal, tuple(_figures(goal, reports))) for goal in goals]


def _figures(goal: Goal, reports: Sequence[Report]) -> Iterator[Figure]:
    for report in reports:
        for result in report.results:
            if _named(result.case, goal.cases):
                yield from _of(goal, report, result)


def _of(goal: Goal, report: Report, result: Result) -> Iterator[Figure]:
    against, ours = comparisons(result), result.timings[0]
    for one in result.timings:
        if not _named(one.contestant, goal.against):
            continue
        noisy, value = False, None
        if goal.measure == TIME and one.contestant in against:
            found = against[one.contestant]
            noisy, value = bool(found.noise), found.ratio.median
        elif goal.measure == MEMORY and one is not ours:
            value = _ratio(ours.peak_bytes, one.peak_bytes)
        elif goal.measure == LIMIT:
            reached = share(result, one, report.limits)
            value = None if reached is None else 1 / reached
        elif goal.measure == COMPILE:
            value = one.compile_seconds
        if value is not None:
            yield Figure(result.case, one.contestant, value, noisy)


def _ratio(ours: int | None, theirs: int | None) -> float | None:
    return ours / theirs if ours and theirs else None


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
