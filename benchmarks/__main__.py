"""``python -m benchmarks``: check, time and report."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from lora_jax.errors import LoraError, raise_all
from lora_jax.files import write_atomic

from . import environment
from .cases import CASES
from .harness import BenchmarkError, run

try:
    import tyro
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from .report import Report, render, to_json
except ImportError as error:
    raise SystemExit(f'{error.name} is not installed: pip install "lora_jax[bench]"') from error


@dataclass(frozen=True)
class Options:
    """Time lora_jax against its peers on this machine, after checking for equal results.

    Args:
        cases: which ones; all when not given.
        rounds: timed steps of each contestant; the case's own number when not given.
        json: also write every figure to this file.
    """

    cases: tuple[str, ...] = tuple(CASES)
    rounds: int | None = None
    json: Path | None = None


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one message and exit status 1."""
    options = tyro.cli(Options, prog="python -m benchmarks", args=arguments)
    try:
        measure(options)
    except LoraError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def measure(options: Options) -> Report:
    """Run the cases, print the table and write the JSON.

    Raises:
        BenchmarkError: the options, or a case, cannot be run.
    """
    _check(options)
    chosen = [
        dataclasses.replace(CASES[name], rounds=options.rounds or CASES[name].rounds)
        for name in dict.fromkeys(options.cases)
    ]
    facts = environment.describe()
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(case.steps for case in chosen))

        def show(phase: str) -> None:
            bar.update(task, advance=1, description=phase)

        results = tuple(run(case, progress=show) for case in chosen)
    report = Report(facts, results)
    Console().print(render(report))
    if options.json is not None:
        write_atomic({options.json: to_json(report)})
    return report


def _check(options: Options) -> None:
    problems = [
        f"cases: got {name!r}, wanted one of {', '.join(CASES)}"
        for name in options.cases
        if name not in CASES
    ]
    if not options.cases:
        problems.append(f"cases: got none, wanted at least one of {', '.join(CASES)}")
    if options.rounds is not None and options.rounds < 1:
        problems.append(f"rounds: got {options.rounds}, wanted at least 1")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        problems.append(f"json: got {options.json}, wanted a file in an existing directory")
    raise_all(BenchmarkError, "these options cannot be used", problems)


if __name__ == "__main__":
    main()
