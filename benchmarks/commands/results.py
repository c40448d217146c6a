"""``python -m benchmarks results``: write ``RESULTS.md`` from runs, goals and attempts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_jax.files import write_atomic

from .. import attempts, files, goals
from ..case import BenchmarkError
from ..results import to_markdown

TARGET = Path(__file__).parents[1] / "RESULTS.md"


@dataclass(frozen=True)
class ResultsOptions:
    """Write the goals, the tables of runs, and the log of what was tried, as Markdown.

    Args:
        files: the JSON of each run.
        out: the file to write.
        attempts: the log of what was tried.
        goals: what the figures should be.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path = TARGET
    attempts: Path = attempts.FILE
    goals: Path = goals.FILE


def main(options: ResultsOptions) -> int:
    """Write the file, and say where."""
    reports = files.read(options.files)
    tried = attempts.parse(_text(options.attempts))
    found = goals.outcomes(goals.parse(_text(options.goals)), reports)
    names = " ".join(file.name for file in options.files)
    text = to_markdown(reports, tried, found, f"python -m benchmarks results {names}")
    write_atomic({options.out: text.encode()})
    print(options.out)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path}: {error}") from error
