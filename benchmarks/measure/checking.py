"""Contestants are timed only if they do the same work: their results must be equal, and say so."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from lora_jax.core.errors import raise_all

from ..case import Arrays, BenchmarkError, Case


def difference(case: Case, results: Mapping[str, Sequence[Arrays]]) -> float:
    """Return the largest relative difference of any contestant's result to the first one's.

    A result's difference is relative to its root of mean squares, so a small element of a large
    array is not held to its own size.

    Args:
        case: whose contestants these are.
        results: of each contestant, by its name, one for each checked step; the first one is ours.

    Raises:
        BenchmarkError: results differ by more than ``case.tolerance``, or could not show it.
    """
    (name, ours), *others = results.items()
    _could_differ(case, name, ours)
    lacks = {contestant.name: contestant.lacks for contestant in case.contestants}
    problems, largest = [], 0.0
    for other, theirs in others:
        for key, distance in _distances(ours, theirs, lacks[other]):
            if not distance <= case.tolerance:
                problems.append(
                    f"{other}: {key}: got a relative difference of {distance:.1e} to {name}, "
                    f"wanted at most {case.tolerance:.1e}"
                )
                break
            largest = max(largest, distance)
    raise_all(
        BenchmarkError,
        f"{case.name}: not timed, the contestants do not do the same work",
        problems,
    )
    return largest


def require_finite(contestant: str, result: Arrays) -> None:
    """Raise ``BenchmarkError`` where a result holds NaN or infinity."""
    for key, value in result.items():
        if not np.isfinite(value).all():
            raise BenchmarkError(f"{contestant}: {key} is not finite")


def _could_differ(case: Case, name: str, ours: Sequence[Arrays]) -> None:
    if case.same:
        still = [key for key, value in ours[0].items() if not value.any()]
        if still:
            raise BenchmarkError(f"{case.name}: {', '.join(still)} of {name} is zero everywhere")
    elif all(_alike(ours[0], step) for step in ours[1:]):
        raise BenchmarkError(
            f"{case.name}: every step of {name} gave the same result, so the check could not see "
            "a difference; compare more steps or another result"
        )


def _alike(one: Arrays, two: Arrays) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def _distances(
    ours: Sequence[Arrays], theirs: Sequence[Arrays], lacks: Collection[str]
) -> list[tuple[str, float]]:
    """Return how far each array of each step is from ours, infinitely where it is not there."""
    found = []
    for step, (one, two) in enumerate(zip(ours, theirs, strict=True), 1):
        for key in sorted((one.keys() | two.keys()).difference(lacks)):
            a, b = one.get(key), two.get(key)
            if a is None or b is None or a.shape != b.shape:
                found.append((f"{key} of step {step}", math.inf))
                continue
            size = max(float(np.linalg.norm(a)), float(np.linalg.norm(b)))
            gap = float(np.linalg.norm(a - b))
            found.append((f"{key} of step {step}", gap / size if gap else 0.0))
    return found
