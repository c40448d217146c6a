"""How the small checks hold tensors: to the rule with a truth, or to equality."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..tensors import Tensors
from ..verdicts import UNIT_ROUNDOFF, TensorVerdict, judge

UNIT = UNIT_ROUNDOFF["float32"]
CHAIN = 32.0  # roundings behind one tensor, as in ``compare``


def held(ours: Tensors, theirs: Tensors, truth: Tensors, cond: float = 1.0) -> Iterator[Any]:
    """Hold every tensor to the rule; names that differ are an error."""
    if ours.keys() != theirs.keys():
        raise AssertionError(f"differing names: {sorted(ours.keys() ^ theirs.keys())}")
    for name in theirs:
        yield judge(
            name, ours[name], theirs[name], truth[name], unit_roundoff=UNIT, cond=CHAIN * cond
        )


def same(name: str, ours: Any, theirs: Any) -> TensorVerdict:
    """Hold values to equality."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return judge(name, ours, theirs, theirs, unit_roundoff=UNIT, exact=True)
