"""What a series of times says, and when it says nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

NOISE_LIMIT = 0.10
"""A series whose middle half spans more than this share of its median is noise."""

CROWD_LIMIT = 0.1
"""Other processes that use more cores than this decide who looks faster."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """The quartiles of a series."""

    lower: float
    median: float
    upper: float

    @property
    def relative(self) -> float:
        """How much of the median the middle half spans."""
        return (self.upper - self.lower) / self.median


def spread(values: Sequence[float]) -> Spread:
    """Return the quartiles.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    Spread(lower=2.0, median=3.0, upper=4.0)
    """
    return Spread(*(float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))))


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return an interval that holds the true median with ``CONFIDENCE``; none if there is none.

    Its ends are two of the values: as many of n fair coins show heads as values lie below the
    median, so nothing is assumed about the distribution.

    >>> interval([5.0, 1.0, 4.0, 2.0, 6.0, 3.0])
    (1.0, 6.0)
    """
    n, ordered, tail, cut = len(values), sorted(values), 0.0, 0
    while (tail := tail + math.comb(n, cut) / 2**n) <= (1 - CONFIDENCE) / 2:
        cut += 1
    return (ordered[cut - 1], ordered[n - cut]) if cut else None


@dataclass(frozen=True)
class Comparison:
    """Two series, as the ratio of each pair: below 1, the first is faster.

    Args:
        ratio: the pairs' ratios.
        interval: where the true median of the ratio lies; none where the series are too short.
        noise: why the series cannot be judged by; empty when they can.
    """

    ratio: Spread
    interval: tuple[float, float] | None
    noise: tuple[str, ...]

    @property
    def shown(self) -> bool:
        """Whether the series can be judged by."""
        return not self.noise and self.interval is not None

    @property
    def verdict(self) -> str:
        """What has been shown, or why nothing has."""
        if self.noise:
            return f"no verdict: {'; '.join(self.noise)}"
        if self.interval is None:
            return "no verdict: too few rounds"
        low, high = self.interval
        if low <= 1 <= high:
            return f"no difference shown ({low:.3f} to {high:.3f})"
        return f"{'faster' if high < 1 else 'slower'} ({low:.3f} to {high:.3f})"


def compare(
    ours: Sequence[float], theirs: Sequence[float], cores_elsewhere: float | None = None
) -> Comparison:
    """Compare two series pair by pair.

    Args:
        ours: seconds.
        theirs: seconds, in the same order.
        cores_elsewhere: how many cores other processes used meanwhile, where that is known.

    >>> compare([0.9, 0.91, 0.92, 0.9, 0.9, 0.91], [1.0, 1.0, 1.01, 1.0, 1.0, 1.01]).verdict
    'faster (0.900 to 0.911)'
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    series = {"our times": ours, "their times": theirs, "the ratios": ratios}
    return Comparison(spread(ratios), interval(ratios), noise(series, cores_elsewhere))


def compare_apart(
    after: Sequence[float], before: Sequence[float], crowds: Sequence[float | None] = ()
) -> Comparison:
    """Compare two series that were not taken in turns, over every pair of one with the other.

    The median of all ratios is the estimate of Hodges and Lehmann; the interval's ends are two of
    the ratios, as many from each end as the rank sum of Mann and Whitney allows. It holds what
    the series' own scatter does to the ratio, not what differed between the two runs.

    Args:
        after: seconds, the ratio's numerator.
        before: seconds.
        crowds: how many cores other processes used in each run, where that is known.

    >>> compare_apart([0.9, 0.91, 0.92, 0.9], [1.0, 1.0, 1.01, 1.0]).verdict
    'faster (0.891 to 0.920)'
    """
    ratios = np.sort(np.divide.outer(np.asarray(after), np.asarray(before)).ravel()).tolist()
    n, m = len(after), len(before)
    deviation = math.sqrt(n * m * (n + m + 1) / 12)
    cut = math.floor(n * m / 2 - NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * deviation)
    ends = (ratios[cut - 1], ratios[-cut]) if cut > 0 else None
    series = {"the times before": before, "the times after": after}
    crowded = max((crowd for crowd in crowds if crowd is not None), default=None)
    return Comparison(spread(ratios), ends, noise(series, crowded))


def noise(
    series: Mapping[str, Sequence[float]], cores_elsewhere: float | None = None
) -> tuple[str, ...]:
    """Return why these series cannot be judged by; nothing when they can.

    >>> noise({"the times": [1.0, 1.5, 2.0]}, cores_elsewhere=0.0)
    ('noisy, the middle half of the times spans 33% of its median',)
    """
    reasons = [
        f"noisy, the middle half of {name} spans {share:.0%} of its median"
        for name, values in series.items()
        if (share := spread(values).relative) > NOISE_LIMIT
    ]
    if cores_elsewhere is not None and cores_elsewhere > CROWD_LIMIT:
        reasons.append(f"crowded, other processes used {cores_elsewhere:.2f} cores")
    return tuple(reasons)
