"""The harness: contestants are first checked for equal results, then timed in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

from lora_jax.errors import LoraError, raise_all

from . import environment

Step = Callable[[], float]
"""One step of the work, waited for: it returns a result, such as the loss, as a number."""

Progress = Callable[[str], None]
Clock = Callable[[], float]


class BenchmarkError(LoraError):
    """A case that cannot be run, or whose contestants do not do the same work."""


@dataclass(frozen=True)
class Contestant:
    """One implementation of a case's work.

    Args:
        name: what tables call it.
        setup: builds everything outside the timed step; imports its libraries itself.
        packages: the distributions whose versions decide its speed.
        settings: what else does, asked for after ``setup``: threads, precision, flags.
    """

    name: str
    setup: Callable[[], Step]
    packages: tuple[str, ...] = ()
    settings: Callable[[], Mapping[str, str]] = dict


@dataclass(frozen=True)
class Case:
    """The same work done by several contestants; ratios are the first one's to each other's.

    Args:
        name: what ``--cases`` calls it.
        title: what is done, with its sizes and precision.
        contestants: ours first.
        tolerance: how far the results may differ, relative to the result; and the reason.
        checked: how many steps are compared; the results must not all be equal.
        warm_up: untimed rounds before the timed ones.
        rounds: timed rounds, one step of each contestant in each.
    """

    name: str
    title: str
    contestants: tuple[Contestant, ...]
    tolerance: float
    checked: int = 4
    warm_up: int = 2
    rounds: int = 20

    @property
    def steps(self) -> int:
        """How many steps ``run`` takes, of all contestants together."""
        return len(self.contestants) * (self.checked + self.warm_up + self.rounds)


@dataclass(frozen=True)
class Timing:
    """One contestant's figures.

    Args:
        contestant: its name.
        versions: of its packages.
        settings: its settings.
        setup_seconds: building, without the first step.
        first_seconds: the first step, which compiles.
        results: of the steps that were compared.
        seconds: of each timed step, in order.
    """

    contestant: str
    versions: Mapping[str, str]
    settings: Mapping[str, str]
    setup_seconds: float
    first_seconds: float = 0.0
    results: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Result:
    """A case's figures.

    Args:
        case: its name.
        title: its title.
        tolerance: how far the contestants' results were allowed to differ.
        difference: how far they did.
        timings: of the contestants, in the case's order.
        cores_elsewhere: how many cores other processes used meanwhile, where that is known.
    """

    case: str
    title: str
    tolerance: float
    difference: float
    timings: tuple[Timing, ...]
    cores_elsewhere: float | None


@dataclass(frozen=True)
class _Ready:
    contestant: Contestant
    step: Step
    known: Timing


def run(
    case: Case,
    *,
    clock: Clock = time.perf_counter,
    elsewhere: Callable[[], float | None] = environment.elsewhere,
    progress: Progress = lambda phase: None,
) -> Result:
    """Check the contestants for equal results, then time them in turns: A B A B.

    Args:
        case: what is run.
        clock: in seconds.
        elsewhere: the CPU seconds that other processes have used.
        progress: called after each step with what it was for.

    Raises:
        BenchmarkError: a contestant's library is missing, results differ, are not finite, or
            could not show a difference.
    """
    ready = [_prepare(contestant, case, clock, progress) for contestant in case.contestants]
    difference = _check(case, [one.known.results for one in ready])
    _take_turns(ready, case.warm_up, clock, lambda: progress(f"{case.name}: warming up"))
    start, used = clock(), elsewhere()
    seconds = _take_turns(ready, case.rounds, clock, lambda: progress(f"{case.name}: timing"))
    wall, used_then = clock() - start, elsewhere()
    timings = tuple(
        replace(one.known, seconds=series) for one, series in zip(ready, seconds, strict=True)
    )
    cores = None if used is None or used_then is None else (used_then - used) / wall
    return Result(case.name, case.title, case.tolerance, difference, timings, cores)


def _take_turns(
    ready: Sequence[_Ready], rounds: int, clock: Clock, progress: Callable[[], None]
) -> list[tuple[float, ...]]:
    """Return the seconds of each contestant's steps, taken A B A B."""
    seconds: list[list[float]] = [[] for _ in ready]
    for _ in range(rounds):
        for one, series in zip(ready, seconds, strict=True):
            start = clock()
            result = one.step()
            series.append(clock() - start)
            _require_finite(one.contestant, result)
            progress()
    return [tuple(series) for series in seconds]


def _prepare(contestant: Contestant, case: Case, clock: Clock, progress: Progress) -> _Ready:
    start = clock()
    try:
        step = contestant.setup()
    except ImportError as error:
        raise BenchmarkError(
            f'{contestant.name}: {error.name} is not installed: pip install "lora_jax[bench]"'
        ) from error
    built = clock()
    timing = Timing(
        contestant.name,
        {package: version(package) for package in contestant.packages},
        dict(contestant.settings()),
        setup_seconds=built - start,
    )
    results = []
    for n in range(case.checked):
        start = clock()
        results.append(step())
        if n == 0:
            timing = replace(timing, first_seconds=clock() - start)
        _require_finite(contestant, results[-1])
        progress(f"{case.name}: checking {contestant.name}")
    return _Ready(contestant, step, replace(timing, results=tuple(results)))


def _check(case: Case, results: Sequence[Sequence[float]]) -> float:
    """Return the largest relative difference of any result to the first contestant's."""
    ours = results[0]
    if len(set(ours)) < 2:
        raise BenchmarkError(
            f"{case.name}: every step of {case.contestants[0].name} gave {ours[0]!r}, so the "
            "check could not see a difference; compare more steps or another result"
        )
    differences = {
        contestant.name: max(map(_difference, ours, theirs))
        for contestant, theirs in zip(case.contestants[1:], results[1:], strict=True)
    }
    raise_all(
        BenchmarkError,
        f"{case.name}: not timed, the contestants do not do the same work",
        [
            f"{name}: got a relative difference of {difference:.1e} to "
            f"{case.contestants[0].name}, wanted at most {case.tolerance:.1e}"
            for name, difference in differences.items()
            if not difference <= case.tolerance
        ],
    )
    return max(differences.values(), default=0.0)


def _difference(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))


def _require_finite(contestant: Contestant, result: float) -> None:
    if not math.isfinite(result):
        raise BenchmarkError(f"{contestant.name}: got the result {result}, wanted a finite number")
