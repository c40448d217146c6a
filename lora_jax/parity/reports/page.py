"""A report as one page of HTML that needs no network, for a browser on a desk or a phone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from ..verdicts import TensorVerdict, Verdict
from . import differences as against_
from .charts import chart
from .checks import LEVELS, CheckResult
from .report import Report
from .summary import (
    Cell,
    caught,
    cells,
    columns,
    judges,
    largest_ratio,
    median_ratio,
    ratio_text,
    sentences,
    worst_of,
)
from .templating import template

TEMPLATE = "report.html.jinja"

# A verdict's shape, so that no one needs to see its colour.
SHAPES = {
    Verdict.EXACT: "=",
    Verdict.ORDER_ONLY: "≈",
    Verdict.BIASED: "▲",
    Verdict.MISMATCH: "✕",
    Verdict.VACUOUS: "○",
}

# What a verdict means, in the legend's words.
MEANINGS = {
    Verdict.EXACT: "bit for bit the same",
    Verdict.ORDER_ONLY: "as close to the truth as another order of summation",
    Verdict.BIASED: "close, but off by a common factor",
    Verdict.MISMATCH: "one of the two is wrong",
    Verdict.VACUOUS: "would pass whatever the code did",
}

# The columns of a tensor's details, and whether each holds text rather than a number.
DETAILS = {
    "tensor": True,
    "verdict": True,
    "JAX": False,
    "PyTorch": False,
    "ratio": False,
    "further away": True,
    "bound": False,
    "slope": False,
    "its limit": False,
    "shape": True,
    "dtype": True,
}

# A ratio of four, or of a quarter, has the full colour.
FULL_COLOUR = 2.0

NOT_THERE = "–"


def to_html(report: Report, against: Report | None = None) -> str:
    """Return the report as one self-contained page.

    It holds the grid of error ratios with every tensor's figures on click, the trajectories with
    their noise bands, the mutants and what caught them, and the environment.

    Args:
        report: what to show.
        against: an earlier report; what changed since stands below the summary.

    Raises:
        ParityError: jinja2 is not installed; says the command that installs it.

    >>> check = CheckResult("demo", 1, (TensorVerdict("y", Verdict.EXACT, shape=(2,)),))
    >>> page = to_html(Report({"seed": 0}, [check]))
    >>> page.startswith("<!doctype html>"), "demo" in page
    (True, True)
    """
    return template(TEMPLATE).render(
        ok=report.ok,
        worst=worst_of(report.checks),
        sentences=sentences(report),
        tiles=_tiles(report),
        changes=None if against is None else against_.differences(report, against),
        levels=[_level(*one) for one in _by_level(report.checks)],
        data={
            "columns": list(DETAILS.items()),
            "tensors": [[_tensor(one) for one in check.tensors] for check in report.checks],
        },
        trajectories={name: (chart(t), t) for name, t in report.trajectories.items()},
        kills=_kills(report.kills),
        environment=list(_flat(report.environment)),
        shapes=SHAPES,
        meanings=MEANINGS,
    )


def _tiles(report: Report) -> list[tuple[str, str]]:
    """Return the figures at the top: what it is, and the figure."""
    ran = [check for check in report.checks if check.verdict is not None]
    hold = sum(check.verdict is not None and check.verdict.ok for check in ran)
    ratios = [largest_ratio(check.tensors) for check in ran]
    largest = max((ratio for ratio in ratios if not math.isnan(ratio)), default=math.nan)
    return [
        ("checks that hold", f"{hold} of {len(ran)}"),
        ("tensors compared", f"{sum(len(check.tensors) for check in ran):,}"),
        ("median error, JAX ÷ PyTorch", ratio_text(report.ratio)),
        ("largest error, JAX ÷ PyTorch", ratio_text(largest)),
        ("time", _clock(math.fsum(check.seconds for check in ran))),
    ]


def _by_level(checks: Sequence[CheckResult]) -> Iterator[tuple[int, list[tuple[int, CheckResult]]]]:
    """Yield each level with its checks and their places in the report."""
    placed = sorted(enumerate(checks), key=lambda one: one[1].level)
    for level, group in groupby(placed, key=lambda one: one[1].level):
        yield level, list(group)


def _level(level: int, placed: list[tuple[int, CheckResult]]) -> dict[str, Any]:
    checks = [check for _, check in placed]
    names = columns(checks)
    return {
        "name": f"Level {level}" if level in LEVELS else "A pair of your own",
        "title": LEVELS.get(level, ""),
        "columns": names,
        "figures": _figures(checks),
        "rows": [
            {
                "place": place,
                "check": check,
                "cells": {name: _cell(one) for name, one in cells(check, names).items()},
            }
            for place, check in placed
        ],
    }


def _figures(checks: Sequence[CheckResult]) -> str:
    """Return a level in a line: how many checks, the worst verdict, the median ratio."""
    ran = [check for check in checks if check.verdict is not None]
    bad = sum(check.verdict is not None and not check.verdict.ok for check in ran)
    median = median_ratio(ran)
    said = [f"{len(checks)} {'check' if len(checks) == 1 else 'checks'}"]
    said += [f"{bad} {'fails' if bad == 1 else 'fail'}"] * bool(bad)
    said += [f"worst {worst_of(ran)}"] if ran else ["skipped"]
    return " · ".join(said + [f"median {ratio_text(median)}"] * (not math.isnan(median)))


def _cell(cell: Cell) -> dict[str, Any]:
    share, side = _colour(cell.ratio)
    return {
        "verdict": cell.verdict,
        "shape": SHAPES[cell.verdict],
        "ratio": "" if math.isnan(cell.ratio) else ratio_text(cell.ratio),
        "share": share,
        "side": side,
        "tensors": cell.tensors,
    }


def _colour(ratio: float) -> tuple[int, str]:
    """Return the strength of a cell's colour in percent, and whose error is the larger one."""
    if math.isnan(ratio) or ratio == 1:
        return 0, "neither"
    side = "jax" if ratio > 1 else "torch"
    if ratio <= 0 or math.isinf(ratio):
        return 100, side
    return round(100 * min(1.0, abs(math.log2(ratio)) / FULL_COLOUR)), side


def _tensor(one: TensorVerdict) -> list[str]:
    """Return a row of the details, in the order of ``DETAILS``, and the reason at its end."""
    return [
        one.name,
        f"{SHAPES[one.verdict]} {one.verdict}",
        _number(one.jax),
        _number(one.torch),
        ratio_text(one.ratio),
        {"jax": "JAX", "torch": "PyTorch"}.get(one.further, "neither"),
        _number(one.bound),
        _number(one.slope, "+.1e"),
        _number(one.slope_limit, ".1e"),
        " × ".join(map(str, one.shape)) or "scalar",
        one.dtype,
        one.why,
    ]


def _kills(kills: Mapping[str, Mapping[str, object]]) -> dict[str, Any] | None:
    """Return the rows of the kill matrix and how many mutants each test caught."""
    if not kills:
        return None
    tests = judges(kills)
    rows = {name: [caught(said.get(test)) for test in tests] for name, said in kills.items()}
    totals = [sum(one is True for one in column) for column in zip(*rows.values(), strict=True)]
    alive = [name for name, row in rows.items() if True not in row]
    return {"tests": tests, "rows": rows, "totals": totals, "count": len(rows), "alive": alive}


def _flat(environment: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every entry of the environment as a name and a text."""
    for name, value in environment.items():
        said = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            # The names of packages stay as they are.
            for key, one in value.items():
                yield (str(key) if name == "versions" else f"{said}, {key}"), _text(one)
        else:
            yield said, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or NOT_THERE
    if isinstance(value, bool):
        return "on" if value else "off"
    return NOT_THERE if value is None or value == "" else str(value)


def _number(value: float, form: str = ".2e") -> str:
    return NOT_THERE if math.isnan(value) else "∞" if math.isinf(value) else format(value, form)


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
