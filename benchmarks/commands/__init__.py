"""The subcommands: a name, its options, and what they do. One module each, one row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import aot, compare, listing, report, results, run

COMMANDS: Mapping[str, tuple[type, Callable[[Any], int]]] = {
    "run": (run.RunOptions, run.main),
    "aot": (aot.AotOptions, aot.main),
    "list": (listing.ListOptions, listing.main),
    "compare": (compare.CompareOptions, compare.main),
    "report": (report.ReportOptions, report.main),
    "results": (results.ResultsOptions, results.main),
}
