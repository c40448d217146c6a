"""How time grows with a size: the exponent p of ``seconds ~ size^p``, fitted on logarithms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import special

from lora_jax.core.errors import raise_all

from ..case import BenchmarkError
from ..measure.harness import Result, Timing
from ..measure.stats import CONFIDENCE, noise, spread
from .report import Report

# A fixed cost bends the line at small sizes; what is left at these many largest ones is growth.
LARGEST = 3


@dataclass(frozen=True)
class Slope:
    """The exponent that some sizes show.

    Args:
        exponent: p.
        interval: holds p with ``stats.CONFIDENCE`` if the points scatter about one straight line;
            it is wide where they bend. None for two sizes, through which every line is exact.
        sizes: which ones.
    """

    exponent: float
    interval: tuple[float, float] | None
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Growth:
    """The exponent over all sizes, and over the largest alone.

    Args:
        every: over all sizes.
        largest: over the largest ``LARGEST``, where a fixed cost weighs least.
    """

    every: Slope
    largest: Slope


@dataclass(frozen=True)
class Found:
    """The growth of one contestant's time along one axis of a group of cases.

    Args:
        group: the cases' group.
        contestant: its name.
        axis: the size that varies, such as ``"tokens"``.
        growth: the exponents.
        fixed: the group's other sizes, which are equal in all these cases.
        noise: why the exponents cannot be judged by; empty when they can.
    """

    group: str
    contestant: str
    axis: str
    growth: Growth
    fixed: Mapping[str, int] = field(default_factory=dict)
    noise: tuple[str, ...] = ()


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> Growth:
    """Return the exponent p of ``seconds = c * size^p`` by least squares on the logarithms.

    With ``u = log size - mean`` and ``v = log seconds - mean`` over n sizes::

        p = sum(u v) / sum(u^2)
        interval = p -+ t * sqrt(sum((v - p u)^2) / (n - 2) / sum(u^2))

    where t is the quantile of Student's distribution with n - 2 degrees of freedom.

    Args:
        sizes: all different.
        seconds: one for each size.

    Raises:
        BenchmarkError: no exponent follows from these; lists every reason.

    >>> found = fit([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0])
    >>> round(found.every.exponent, 6), found.largest.sizes
    (1.0, (2, 4, 8))
    """
    raise_all(BenchmarkError, "no exponent can be fitted", _problems(sizes, seconds))
    points = sorted(zip(sizes, seconds, strict=True))
    return Growth(_slope(points), _slope(points[-LARGEST:]))


@dataclass(frozen=True)
class Along:
    """The cases of a group that differ in one size alone, two of them or more.

    Args:
        group: its name.
        axis: the size that varies.
        fixed: the other sizes.
        results: in rising order of that size.
    """

    group: str
    axis: str
    fixed: Mapping[str, int]
    results: tuple[Result, ...]


def along(report: Report) -> list[Along]:
    """Return every group's cases along every size of which it has two values or more.

    The other sizes stay the same. So a group may vary one size, or several in turns about a common
    case.
    """
    found: dict[tuple[str, str, tuple[tuple[str, int], ...]], dict[int, Result]] = {}
    for result in report.results:
        for axis, size in result.sizes.items() if result.group else ():
            fixed = tuple(sorted((k, v) for k, v in result.sizes.items() if k != axis))
            found.setdefault((result.group, axis, fixed), {})[size] = result
    axes = list(dict.fromkeys(key[:2] for key in found))
    return [
        Along(group, axis, dict(fixed), tuple(by_size[size] for size in sorted(by_size)))
        for (group, axis, fixed), by_size in sorted(
            found.items(), key=lambda item: axes.index(item[0][:2])
        )
        if len(by_size) > 1
    ]


def growths(report: Report) -> tuple[Found, ...]:
    """Return the growth of every contestant's median time, along every size of every group."""
    return tuple(found for one in along(report) for found in _growths(one))


def _growths(cases: Along) -> Iterator[Found]:
    lines: dict[str, dict[int, _Point]] = {}
    for result in cases.results:
        for timing in result.timings:
            of = lines.setdefault(timing.contestant, {})
            of[result.sizes[cases.axis]] = _Point(result, timing)
    for contestant, points in lines.items():
        if len(points) < 2:
            continue
        seconds = [spread(point.timing.seconds).median for point in points.values()]
        why = tuple(reason for point in points.values() for reason in point.noise())
        growth = fit(list(points), seconds)
        yield Found(cases.group, contestant, cases.axis, growth, cases.fixed, why)


@dataclass(frozen=True)
class _Point:
    result: Result
    timing: Timing

    def noise(self) -> list[str]:
        reasons = noise({"the times": self.timing.seconds}, self.result.cores_elsewhere)
        return [f"{self.result.case}: {reason}" for reason in reasons]


def _slope(points: Sequence[tuple[int, float]]) -> Slope:
    u, v = (np.log(values) - np.mean(np.log(values)) for values in zip(*points, strict=True))
    exponent, spare = float(u @ v / (u @ u)), len(points) - 2
    sizes = tuple(size for size, _ in points)
    if not spare:
        return Slope(exponent, None, sizes)
    left = v - exponent * u
    error = math.sqrt(float(left @ left) / spare / float(u @ u))
    reach = float(special.stdtrit(spare, (1 + CONFIDENCE) / 2)) * error
    return Slope(exponent, (exponent - reach, exponent + reach), sizes)


def _problems(sizes: Sequence[int], seconds: Sequence[float]) -> Iterator[str]:
    if len(sizes) != len(seconds):
        yield f"seconds: got {len(seconds)}, wanted one for each of {len(sizes)} sizes"
    if len(set(sizes)) < 2:
        yield f"sizes: got {sorted(set(sizes))}, wanted at least two"
    if len(set(sizes)) < len(sizes):
        yield f"sizes: got {list(sizes)}, wanted each once"
    if wrong := [size for size in sizes if not size > 0]:
        yield f"sizes: got {wrong}, wanted more than 0"
    if wrong := [value for value in seconds if not 0 < value < math.inf]:
        yield f"seconds: got {wrong}, wanted more than 0 and finite"
