"""A trajectory as geometry: where its line, its noise band, its axes and its horizon stand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Of the drawing, in its own units; a phone shows 10 of them as 8 pixels.
WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 46

Tick = tuple[float, str]
"""A place on an axis and its label."""


@dataclass(frozen=True)
class Chart:
    """What one drawing of a trajectory holds.

    Args:
        line: the points of the distance, ``x,y`` each.
        band: the points around the noise band; empty where it is zero everywhere.
        x_ticks: steps.
        y_ticks: powers of ten.
        horizon: where the two leave the band; None where they stay inside.
    """

    line: str
    band: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    horizon: Tick | None

    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def chart(trajectory: Mapping[str, Any]) -> Chart | None:
    """Return the drawing of ``distance``, ``band`` and ``horizon``.

    Args:
        trajectory: ``distance`` and ``band``, the upper edge of the noise, have a number for each
            of ``steps``, by default 1, 2, …; ``factor``, by default 1, is how many times the band
            the distance may be; ``horizon`` is a step or None. Values that are zero or not finite
            have no place on a logarithmic axis.

    Returns:
        None where no distance is above zero: the two are the same at every step.

    >>> found = chart({"distance": [1e-7, 2e-7], "band": [3e-7, 3e-7]})
    >>> [label for _, label in found.y_ticks]
    ['10⁻⁷', '10⁻⁶']
    >>> chart({"distance": [0.0, 0.0], "band": [0.0, 0.0]}) is None
    True
    """
    given = trajectory.get("steps") or range(1, len(trajectory["distance"]) + 1)
    steps = [float(step) for step in given]
    distance = _points(steps, trajectory["distance"])
    if not distance:
        return None
    factor = float(trajectory.get("factor", 1.0))
    band = _points(steps, [factor * float(value) for value in trajectory.get("band", ())])
    values = [value for _, value in distance + band]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 2)

    def y(value: float) -> float:
        share = (math.log10(value) - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)

    floor = HEIGHT - BOTTOM
    edge = " ".join(f"{x(step)},{y(value)}" for step, value in band)
    around = f"{x(band[0][0])},{floor} {edge} {x(band[-1][0])},{floor}" if band else ""
    horizon = trajectory.get("horizon")
    return Chart(
        line=" ".join(f"{x(step)},{y(value)}" for step, value in distance),
        band=around,
        x_ticks=tuple((x(step), f"{step:g}") for step in _round_steps(first, last)),
        y_ticks=tuple(
            (y(10.0**power), f"10{_raised(power)}") for power in _powers(int(low), int(high))
        ),
        horizon=None if horizon is None else (x(float(horizon)), f"{float(horizon):g}"),
    )


def _points(steps: Sequence[float], values: Sequence[Any]) -> list[tuple[float, float]]:
    """Return the places of the values that are finite and above zero."""
    found = zip(steps, map(float, values), strict=False)
    return [(step, value) for step, value in found if 0 < value < math.inf]


def _round_steps(first: float, last: float) -> list[float]:
    """Return about five round numbers from first to last."""
    rough = (last - first) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
    start = math.ceil(first / size)
    return [n * size for n in range(start, math.floor(last / size) + 1)]


def _powers(low: int, high: int) -> range:
    return range(low, high + 1, max(1, math.ceil((high - low) / 6)))


def _raised(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
