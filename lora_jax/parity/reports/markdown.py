"""A report as Markdown."""

from __future__ import annotations

from typing import Any

from ...core.shown_text import in_markdown
from .report import Report


def to_markdown(report: Report, against: Report | None = None) -> str:
    """Return the summary, a table with a row for each check, and what is wrong with which tensor.

    Args:
        report: what to show.
        against: an earlier report; what changed since stands below the summary.
    """
    # Here, since both are about reports.
    from .differences import differences
    from .summary import largest_ratio, ratio_text, sentences

    lines = [*map(_in_table, sentences(report)), ""]
    if against is not None:
        changed = [f"- {_in_table(one)}" for one in differences(report, against)]
        lines += ["Since the earlier report:", "", *(changed or ["- nothing changed"]), ""]
    lines += [
        "| check | verdict | tensors | worst ratio jax/torch | seconds |",
        "|---|---|---|---|---|",
    ]
    for check in report.checks:
        ratio = ratio_text(largest_ratio(check.tensors))
        verdict = check.verdict or f"skipped: {check.skipped}"
        cells = (check.name, verdict, len(check.tensors), ratio, f"{check.seconds:.1f}")
        lines.append(f"| {' | '.join(map(_in_table, cells))} |")
    bad = [
        f"- {_in_table(check.name)}: {_in_table(said)}"
        for check in report.checks
        for said in (check.error, *(one for one in check.tensors if not one.verdict.ok))
        if said
    ]
    return "\n".join([*lines, *([""] * bool(bad)), *bad]) + "\n"


def _in_table(value: Any) -> str:
    """Return a text that stays in its cell."""
    return in_markdown(" ".join(str(value).split()))
