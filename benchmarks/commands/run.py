"""``python -m benchmarks run``: check the contestants, time them in turns, print and write."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lora_jax.core.errors import raise_all
from lora_jax.core.io.atomic_files import write_atomic

from ..case import BenchmarkError, Case
from ..cases import CASES
from ..measure import environment, limits, memory
from ..measure.harness import Result, Timing, run
from ..show.report import Report, to_json
from ..show.tables import console, render


@dataclass(frozen=True)
class RunOptions:
    """Time lora_jax against its peers on this machine, after checking for equal results.

    Args:
        cases: which ones; patterns such as `layer*`; all when not given.
        against: which other contestants, patterns such as `PEFT*`; all when not given.
        rounds: timed steps of each contestant; the case's own number when not given.
        seconds: stop timing a case after this long, though not before six rounds.
        profile: also tell what XLA's instructions take in our own step.
        memory: also run each contestant alone, in a process of its own, for its peak memory;
            not on TPUs, which serve one process at a time.
        json: also write every figure to this file.
    """

    cases: tuple[str, ...] = ("*",)
    against: tuple[str, ...] = ("*",)
    rounds: int | None = None
    seconds: float | None = None
    profile: bool = False
    memory: bool = True
    json: Path | None = None


def main(options: RunOptions) -> int:
    """Run the cases, print the tables and write the JSON; 1 if a case gave no result."""
    report = measure(options)
    console().print(render(report))
    return 1 if report.failed else 0


def measure(options: RunOptions) -> Report:
    """Run the cases and write the JSON after each, so that a run cut short loses none.

    A case that fails is in the report with its reason, and the next one runs.

    Raises:
        BenchmarkError: the options cannot be used.
    """
    _check(options)
    # JAX would take most of a GPU's memory beforehand, and leave PyTorch none.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    chosen = [_narrowed(case, options) for case in matching(options.cases)]
    facts = environment.describe() | {"command": environment.command("run", options)}
    peaks = limits.measure()
    results, failed = list[Result](), dict[str, str]()
    report = Report(facts, (), peaks)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(case.steps for case in chosen))

        def show(phase: str, advance: int = 1) -> None:
            bar.update(task, advance=advance, description=phase)

        for n, case in enumerate(chosen, 1):
            try:
                result = run(case, seconds=options.seconds, profiled=options.profile, progress=show)
                results.append(_with_memory(case, result, show) if options.memory else result)
            except BenchmarkError as error:
                failed[case.name] = str(error)
            bar.update(task, completed=sum(one.steps for one in chosen[:n]))
            report = Report(facts, tuple(results), peaks, failed)
            if options.json is not None:
                write_atomic({options.json: to_json(report)})
    return report


def matching(patterns: Sequence[str]) -> list[Case]:
    """Return the cases that any of these patterns names, in the table's order."""
    return [
        case
        for name, case in CASES.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _narrowed(case: Case, options: RunOptions) -> Case:
    """Return the case with these rounds, and ours against the chosen contestants alone."""
    ours, *others = case.contestants
    chosen = [
        one
        for one in others
        if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in options.against)
    ]
    return dataclasses.replace(
        case, contestants=(ours, *chosen), rounds=options.rounds or case.rounds
    )


def _with_memory(case: Case, result: Result, show: Callable[[str, int], None]) -> Result:
    if not case.memory or memory.resident_peak() is None or memory.exclusive():
        return result

    def measured(timing: Timing) -> Timing:
        show(f"{case.name}: memory of {timing.contestant}", 0)
        found = memory.measure(case, timing.contestant)
        peak = found.peak if found.device is None else found.device
        return replace(timing, peak_bytes=peak, base_bytes=found.base)

    return replace(result, timings=tuple(map(measured, result.timings)))


def _check(options: RunOptions) -> None:
    problems = [
        f"cases: {pattern!r} matches none of {', '.join(CASES)}"
        for pattern in options.cases
        if not matching([pattern])
    ]
    names = {one.name for case in matching(options.cases) for one in case.contestants[1:]}
    problems += [
        f"against: {pattern!r} matches none of {', '.join(sorted(names))}"
        for pattern in options.against
        if names and not fnmatch.filter(names, pattern)
    ]
    if not options.cases:
        problems.append(f"cases: got none, wanted at least one of {', '.join(CASES)}")
    if options.rounds is not None and options.rounds < 1:
        problems.append(f"rounds: got {options.rounds}, wanted at least 1")
    if options.seconds is not None and not options.seconds > 0:
        problems.append(f"seconds: got {options.seconds}, wanted more than 0")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        problems.append(f"json: got {options.json}, wanted a file in an existing directory")
    raise_all(BenchmarkError, "these options cannot be used", problems)
