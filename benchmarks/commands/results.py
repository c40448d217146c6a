"""``python -m benchmarks results``: write ``RESULTS.md`` from runs and the log of attempts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_jax.files import write_atomic

from .. import attempts, files
from ..case import BenchmarkError
from ..results import to_markdown

TARGET = Path(__file__).parents[1] / "RESULTS.md"


@dataclass(frozen=True)
class ResultsOptions:
    """Write the tables of runs, and the log of what was tried, as Markdown.

    Args:
        files: the JSON of each run.
        out: the file to write.
        attempts: the log of what was tried.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path = TARGET
    attempts: Path = attempts.FILE


def main(options: ResultsOptions) -> int:
    """Write the file, and say where."""
    reports = files.read(options.files)
    try:
        tried = attempts.parse(options.attempts.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{options.attempts}: {error}") from error
    names = " ".join(file.name for file in options.files)
    text = to_markdown(reports, tried, f"python -m benchmarks results {names}")
    write_atomic({options.out: text.encode()})
    print(options.out)
    return 0
