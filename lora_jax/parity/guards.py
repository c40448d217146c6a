"""What makes a comparison vacuous: it would pass whatever the code did. numpy only.

Each guard returns what is wrong, by name, and nothing where all is well. ``refuse`` raises it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .verdicts import Vacuous, norm, rel_l2

# A low-rank path that is a smaller share of what is compared could be wrong unseen.
SMALLEST_SHARE = 1e-2


def vacuity(
    *,
    factors: Mapping[str, NDArray[Any]] | None = None,
    scales: Mapping[str, float] | None = None,
    shapes: Iterable[Sequence[int]] | None = None,
    outputs: tuple[NDArray[Any], NDArray[Any]] | None = None,
    losses: Sequence[float] | None = None,
    truth: Mapping[str, NDArray[Any]] | None = None,
) -> list[str]:
    """Return every reason why a comparison of models would be vacuous; of what is given.

    Args:
        factors: A and B by name.
        scales: of the low-rank paths by name.
        shapes: of the adapted weights.
        outputs: of the model with and without its adapters.
        losses: of every step of a training run.
        truth: what both sides are held to, by name.

    >>> vacuity(factors={"q.lora_B": np.zeros((2, 3))}, scales={"q": 2.0}, losses=[1.0, 1.0])
    ['q.lora_B: is zero', 'q: bfloat16 holds the scale 2.0 exactly', 'the loss moved by 0.0e+00']
    """
    problems = list(zero(factors or {}))
    problems += exactly_held(scales or {})
    problems += square_only(shapes) if shapes is not None else []
    problems += unseen(*outputs) if outputs is not None else []
    problems += unmoved(losses) if losses is not None else []
    return problems + list(narrow(truth or {}))


def refuse(problems: Iterable[str]) -> None:
    """Raise if there is a reason why the comparison is vacuous.

    Raises:
        Vacuous: lists them all; a check that raises it fails the run.

    >>> refuse(unseen(np.ones(3), np.ones(3)))
    Traceback (most recent call last):
    lora_jax.parity.verdicts.Vacuous: the adapters are 0.0e+00 of the output, wanted 0.01
    """
    if found := list(problems):
        raise Vacuous("\n  ".join(found))


def zero(factors: Mapping[str, NDArray[Any]]) -> Iterable[str]:
    """Say which A or B is zero, so that the other gets no gradient and the path no weight."""
    return (f"{name}: is zero" for name, value in factors.items() if not np.any(value))


def exactly_held(scales: Mapping[str, float]) -> Iterable[str]:
    """Say which scale has 8 bits or fewer, so that rounding it to bfloat16 changes nothing."""
    return (
        f"{name}: bfloat16 holds the scale {scale} exactly"
        for name, scale in scales.items()
        if not np.float32(scale).view(np.uint32) & 0xFFFF
    )


def square_only(shapes: Iterable[Sequence[int]]) -> list[str]:
    """Say so where all weights are square, so that a transposed one has the right shape."""
    found = [tuple(shape) for shape in shapes]
    if any(len(set(shape)) > 1 for shape in found):
        return []
    return [f"the weights are all square: {', '.join(map(str, found)) or 'there are none'}"]


def unseen(
    adapted: NDArray[Any], base: NDArray[Any], smallest: float = SMALLEST_SHARE
) -> list[str]:
    """Say so where the adapters change an output too little for an error in them to show."""
    wide = np.asarray(adapted, np.float64)
    share = rel_l2(np.asarray(base), wide) if np.any(wide) else 0.0
    return (
        []
        if share >= smallest
        else [f"the adapters are {share:.1e} of the output, wanted {smallest}"]
    )


def unmoved(losses: Sequence[float]) -> list[str]:
    """Say so where a training run did not move its loss."""
    moved = (max(losses) - min(losses)) / (max(map(abs, losses)) or 1.0) if losses else 0.0
    return [] if moved >= SMALLEST_SHARE else [f"the loss moved by {moved:.1e}"]


def narrow(truth: Mapping[str, NDArray[Any]]) -> Iterable[str]:
    """Say which truth is not float64, or is one in name: every value of it fits in float32.

    >>> third = np.full(3, 1 / 3)
    >>> list(narrow({"y": third, "z": third.astype(np.float32).astype(np.float64)}))
    ['z: a float64 whose values are all those of float32']
    """
    for name, value in truth.items():
        if value.dtype not in (np.float64, np.longdouble):
            yield f"{name}: the truth is {value.dtype}, wanted float64 or wider"
        elif norm(value) and (value.astype(np.float32) == value).all():
            yield f"{name}: a float64 whose values are all those of float32"
