"""``python -m benchmarks report``: a run as one page and as pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_jax.core.io.atomic_files import write_atomic

from ..case import BenchmarkError
from ..show import files
from ..show.page import to_html
from ..show.plots import pictures

PAGE = "index.html"


@dataclass(frozen=True)
class ReportOptions:
    """Write a run as one self-contained HTML page, and its plots as PNG.

    Args:
        file: the JSON of the run.
        out: the folder for the page and the plots; it is made where it is missing.
    """

    file: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]


def main(options: ReportOptions) -> int:
    """Write the page and the plots, and say where."""
    (report,) = files.read([options.file])
    plots = {f"{plot.name}.png": plot.png for plot in pictures(report)}
    content = {PAGE: to_html(report).encode(), **plots}
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"out: {error}") from error
    write_atomic({options.out / name: data for name, data in content.items()})
    print(f"{options.out / PAGE}, and {len(plots)} plots beside it")
    return 0
