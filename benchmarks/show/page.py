"""A run as one page of HTML that needs no network, for a browser on a desk or a phone."""

from __future__ import annotations

import math
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora_jax.parity.reports.templating import template

from ..case import BenchmarkError
from ..measure.harness import Result
from .plots import DARK, LIGHT, Picture, pictures
from .report import Report
from .rows import HEADINGS, PROFILE, Row, checked, facts, operations, rows, stated
from .series import contestants

TEMPLATE = "report.html.jinja"

# A verdict's mark, so that no one needs to see its colour, and what it means.
MEANINGS = {
    "faster": ("▼", "ours takes less time"),
    "slower": ("▲", "ours takes more time"),
    "equal": ("=", "no difference shown"),
    "noisy": ("~", "nothing is shown: noise, a crowded machine or too few rounds"),
    "skipped": ("○", "did not take part"),
}

KINDS = {
    "ratios": ("Ratios", "Ours over each other one, pair by pair; the line is the middle half."),
    "roofline": (
        "Roofline",
        "Each contestant under what the machine could do at most, by the peaks measured in the "
        "same run. Cases that state no FLOPs or no bytes are left out.",
    ),
    "scaling": (
        "Growth",
        "Medians as one size grows, and the power that fits each line best.",
    ),
}

# A ratio of two, or of a half, has the full colour.
FULL_COLOUR = 1.0


def to_html(report: Report) -> str:
    """Return the report as one self-contained page, its plots for light paper and for dark.

    Raises:
        BenchmarkError: jinja2 is not installed.
    """
    found = {result.case: rows(result, report.limits) for result in report.results}
    results = sorted(report.results, key=lambda result: _worst(found[result.case]))
    counts = Counter(row.word for case in found.values() for row in case if row.word)
    return template(TEMPLATE, "benchmarks.show", BenchmarkError).render(
        date=report.environment.get("date", ""),
        ours=report.results[0].timings[0].contestant if report.results else "",
        failed=report.failed,
        tiles=_tiles(report, counts),
        meanings=MEANINGS,
        headings=HEADINGS,
        profile=PROFILE,
        others=contestants(report)[1:] + _never_timed(report),
        cases=[_case(result, found[result.case]) for result in results],
        plots=_plots(report),
        kinds=KINDS,
        environment=facts(report),
        versions=stated(report),
    )


def _worst(found: Sequence[Row]) -> float:
    """Return a key that puts first where ours is slower, the most so first of all."""
    ratios = [row.ratio for row in found if row.word == "slower" and row.ratio is not None]
    return -max(ratios, default=0.0)


def _tiles(report: Report, counts: Counter[str]) -> list[tuple[str, str]]:
    return [
        ("cases with a result", f"{len(report.results)}"),
        ("cases that failed", f"{len(report.failed)}"),
        *((f"pairs {word}", f"{counts[word]}") for word in MEANINGS),
    ]


def _never_timed(report: Report) -> list[str]:
    names = dict.fromkeys(name for result in report.results for name in result.skipped)
    return [name for name in names if name not in contestants(report)]


def _case(result: Result, found: Sequence[Row]) -> dict[str, Any]:
    return {
        "result": result,
        "rows": found,
        "cells": {row.contestant: _cell(row) for row in found if row.word},
        "checked": checked(result),
        "operations": operations(result),
        "figures": ", ".join(
            f"{count} {word}" for word, count in Counter(r.word for r in found if r.word).items()
        ),
    }


def _cell(row: Row) -> dict[str, Any]:
    strength = 0.0 if row.ratio is None else min(1.0, abs(math.log2(row.ratio)) / FULL_COLOUR)
    return {
        "word": row.word,
        "mark": MEANINGS[row.word][0],
        "ratio": row.word if row.ratio is None else f"{row.ratio:.2f}",
        "share": round(100 * strength) if row.word in ("faster", "slower") else 0,
        "said": row.verdict or row.skipped,
    }


def _plots(report: Report) -> dict[str, list[dict[str, str]]]:
    """Return the plots by their kind, as addresses that hold the pictures themselves."""
    found: dict[str, list[dict[str, str]]] = {}
    for light, dark in zip(pictures(report, LIGHT), pictures(report, DARK), strict=True):
        both = {"title": light.title, "light": _address(light), "dark": _address(dark)}
        found.setdefault(light.kind, []).append(both)
    return found


def _address(picture: Picture) -> str:
    return f"data:image/png;base64,{b64encode(picture.png).decode()}"
