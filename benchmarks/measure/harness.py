"""The harness: contestants are first checked for equal results, then timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from ..case import Arrays, BenchmarkError, Case, Contestant, Needed, Unsupported, Work
from . import checking, environment, profiling, turns
from .profiling import Operation
from .turns import Clock

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Timing:
    """One contestant's figures.

    Args:
        contestant: its name.
        versions: of its packages.
        settings: its settings.
        setup_seconds: building, without compiling and without the first step.
        compile_seconds: compiling ahead of time, where it does.
        first_seconds: the first step, which compiles for those who do not ahead of time.
        seconds: of a step in each round, in order.
        flops: of a step, as its program counts them; none where that is unknown.
        peak_bytes: the most memory of a process that does this alone; none where not measured.
        base_bytes: what that process had before it set up: the libraries.
    """

    contestant: str
    versions: Mapping[str, str]
    settings: Mapping[str, str]
    setup_seconds: float
    compile_seconds: float | None = None
    first_seconds: float = 0.0
    seconds: tuple[float, ...] = ()
    flops: int | None = None
    peak_bytes: int | None = None
    base_bytes: int | None = None


@dataclass(frozen=True)
class Result:
    """A case's figures.

    Args:
        case: its name.
        title: its title.
        tolerance: how far the contestants' results were allowed to differ.
        difference: how far they did.
        steps_checked: over how many steps.
        timings: of the contestants, in the case's order.
        cores_elsewhere: how many cores other processes used meanwhile, where that is known.
        needed: what the work costs at least.
        sizes: as the case has them.
        group: likewise.
        skipped: contestants that did not take part, and why.
        profile: what our own step does, see ``profiling``; empty where it was not asked for.
    """

    case: str
    title: str
    tolerance: float
    difference: float
    steps_checked: int
    timings: tuple[Timing, ...]
    cores_elsewhere: float | None
    needed: Needed = Needed()
    sizes: Mapping[str, int] = field(default_factory=dict)
    group: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)
    profile: tuple[Operation, ...] = ()


@dataclass(frozen=True)
class _Ready:
    contestant: Contestant
    work: Work
    results: tuple[Arrays, ...]
    known: Timing


def run(
    case: Case,
    *,
    seconds: float | None = None,
    profiled: bool = False,
    clock: Clock = time.perf_counter,
    elsewhere: Callable[[], float | None] = environment.elsewhere,
    progress: Progress = lambda phase: None,
) -> Result:
    """Check the contestants for equal results, then time them in turns, see ``turns.order``.

    A contestant whose library is missing, or that says that it cannot, is left out, with its
    reason in the result; the first one must take part.

    Args:
        case: what is run.
        seconds: stop timing after this long, though not before ``turns.FEWEST_ROUNDS`` rounds.
        profiled: profile our own step afterwards.
        clock: in seconds.
        elsewhere: the CPU seconds that other processes have used.
        progress: called after each step that is checked and each turn, with what it was for.

    Raises:
        BenchmarkError: our own contestant cannot take part, results differ, are not finite, or
            could not show a difference.
    """
    ready, skipped = _prepare_all(case, clock, progress)
    difference = checking.difference(case, {r.contestant.name: r.results for r in ready})
    works = [(one.contestant.name, one.work) for one in ready]
    turns.take(works, case.warm_up, lambda: progress(f"{case.name}: warming up"), clock=clock)
    start, used = clock(), elsewhere()
    last = None if seconds is None else start + seconds
    series = turns.take(
        works, case.rounds, lambda: progress(f"{case.name}: timing"), clock=clock, last=last
    )
    wall, used_then = clock() - start, elsewhere()
    return Result(
        case.name,
        case.title,
        case.tolerance,
        difference,
        case.checked,
        tuple(replace(one.known, seconds=s) for one, s in zip(ready, series, strict=True)),
        None if used is None or used_then is None or not wall else (used_then - used) / wall,
        case.needed,
        case.sizes,
        case.group,
        skipped,
        profiling.profile(ready[0].work) if profiled else (),
    )


def _prepare_all(
    case: Case, clock: Clock, progress: Progress
) -> tuple[list[_Ready], dict[str, str]]:
    ready, skipped = [], dict[str, str]()
    for contestant in case.contestants:
        try:
            ready.append(_prepare(contestant, case, clock, progress))
        except ImportError as error:
            skipped[contestant.name] = (
                f'{error.name} is not installed: pip install "lora_jax[bench]"'
            )
        except Unsupported as reason:
            skipped[contestant.name] = str(reason)
    ours = case.contestants[0].name
    if ours in skipped:
        raise BenchmarkError(f"{case.name}: {ours}: {skipped[ours]}")
    return ready, skipped


def _prepare(contestant: Contestant, case: Case, clock: Clock, progress: Progress) -> _Ready:
    start = clock()
    work = contestant.setup()
    setup = clock() - start - (work.compile_seconds or 0.0)
    results, first = list[Arrays](), 0.0
    for n in range(case.checked):
        work.prepare()
        start = clock()
        result = work.step()
        first = first if n else clock() - start
        results.append(_copied(work, result))
        checking.require_finite(contestant.name, results[-1])
        progress(f"{case.name}: checking {contestant.name}")
    timing = Timing(
        contestant.name,
        {package: version(package) for package in contestant.packages},
        dict(contestant.settings()),
        setup,
        work.compile_seconds,
        first,
        flops=work.flops,
    )
    return _Ready(contestant, work, tuple(results), timing)


def _copied(work: Work, result: Any) -> Arrays:
    """Return a result that the next step cannot write over."""
    return {name: value.copy() for name, value in work.read(result).items()}
