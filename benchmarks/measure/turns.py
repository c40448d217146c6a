"""Whose turn it is, and what is timed in a turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from ..case import Work
from . import checking

Clock = Callable[[], float]

FEWEST_ROUNDS = 6
"""A series shorter than this has no interval for its median, see ``stats.interval``."""

SETTLED = 0.02
"""Seconds until the threads of another library are asleep."""

MOST_STEPS = 20
"""The most steps that pass these seconds."""


def order(contestants: int, turn: int) -> Sequence[int]:
    """Return who follows whom in a round: two take turns A B A B, more as a Williams design has it.

    A contestant's time depends on whoever came before, by what is left in the caches. Over as many
    rounds as there are contestants, or twice as many where they are odd, each follows each other
    one equally often.

    Args:
        contestants: how many.
        turn: the round's number, from 0.

    Source: E. J. Williams, Australian Journal of Scientific Research A 2, 149 (1949).

    >>> [order(4, turn) for turn in range(4)]
    [[0, 1, 3, 2], [1, 2, 0, 3], [2, 3, 1, 0], [3, 0, 2, 1]]
    """
    if contestants < 3:
        return range(contestants)
    zigzag = [-n // 2 if n % 2 == 0 else n // 2 + 1 for n in range(contestants)]
    row = [(place + turn) % contestants for place in zigzag]
    mirrored = contestants % 2 == 1 and turn // contestants % 2 == 1
    return row[::-1] if mirrored else row


def take(
    works: Sequence[tuple[str, Work]],
    rounds: int,
    progress: Callable[[], None],
    *,
    clock: Clock = time.perf_counter,
    last: float | None = None,
) -> list[tuple[float, ...]]:
    """Return the seconds of a step of each contestant in each round, until the ``last`` moment.

    Where steps are short a turn takes untimed ones before those that it times, and their median
    counts: a library's threads wait actively for some milliseconds after a step, and take the
    processor from the next contestant.

    Args:
        works: of the contestants, with their names.
        rounds: how many.
        progress: called after each turn.
        clock: in seconds.
        last: when to stop, though not before ``FEWEST_ROUNDS`` rounds.

    Raises:
        BenchmarkError: a result is not finite.
    """
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(rounds):
        if last is not None and turn >= FEWEST_ROUNDS and clock() > last:
            break
        untimed = _untimed(seconds)
        for n in order(len(works), turn):
            name, work = works[n]
            for _ in range(untimed):
                _timed(work, clock)
            several = [_timed(work, clock) for _ in range(max(untimed, 1))]
            seconds[n].append(median(time for time, _ in several))
            result = several[-1][1]
            # Reading a large array would push the next contestant's out of the cache.
            if isinstance(result, float) or turn + 1 == rounds:
                checking.require_finite(name, work.read(result))
            progress()
    return [tuple(series) for series in seconds]


def _timed(work: Work, clock: Clock) -> tuple[float, Any]:
    work.prepare()
    start = clock()
    result = work.step()
    return clock() - start, result


def _untimed(seconds: Sequence[Sequence[float]]) -> int:
    """Return how many steps come before the timed ones: as many for every contestant."""
    before = [series[-1] for series in seconds if series]
    if not before or max(before) > SETTLED:
        return 0
    return min(math.ceil(SETTLED / max(min(before), SETTLED / MOST_STEPS)), MOST_STEPS)
