"""``python -m benchmarks results``: write ``RESULTS.md`` from runs, goals and attempts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_jax.core.io.atomic_files import write_atomic

from ..aot.facts import Facts, from_json
from ..case import BenchmarkError
from ..show import attempts, files, goals
from ..show.results import to_markdown

TARGET = Path(__file__).parents[1] / "RESULTS.md"


@dataclass(frozen=True)
class ResultsOptions:
    """Write the goals, the tables of runs, and the log of what was tried, as Markdown.

    Args:
        files: the JSON of each run.
        aot: the JSON of steps that were compiled ahead of time.
        out: the file to write.
        attempts: the log of what was tried.
        goals: what the figures should be.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    aot: tuple[Path, ...] = ()
    out: Path = TARGET
    attempts: Path = attempts.FILE
    goals: Path = goals.FILE


def main(options: ResultsOptions) -> int:
    """Write the file, and say where."""
    reports = files.read(options.files)
    tried = attempts.parse(_text(options.attempts))
    found = goals.outcomes(goals.parse(_text(options.goals)), reports)
    compiled = [_facts(file) for file in options.aot]
    names = " ".join(file.name for file in options.files)
    if options.aot:
        names += f" --aot {' '.join(file.name for file in options.aot)}"
    text = to_markdown(reports, tried, found, f"python -m benchmarks results {names}", compiled)
    write_atomic({options.out: text.encode()})
    print(options.out)
    return 0


def _facts(path: Path) -> Facts:
    text = _text(path)
    try:
        return from_json(json.loads(text))
    except (ValueError, BenchmarkError) as error:
        raise BenchmarkError(f"{path}: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path}: {error}") from error
