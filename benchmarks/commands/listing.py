"""``python -m benchmarks list``: what can be run."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Column, Table

from ..cases import CASES
from ..show.tables import console


@dataclass(frozen=True)
class ListOptions:
    """List the cases and their contestants."""


def main(options: ListOptions) -> int:
    """Print the table."""
    table = Table(Column("case", no_wrap=True), "what is done", "contestants")
    for case in CASES.values():
        names = (contestant.name for contestant in case.contestants)
        table.add_row(case.name, case.title, ", ".join(names))
    console().print(table)
    return 0
