"""Inputs on which every order of summation is exact, so that the tolerance is zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .tensors import Tensors


def exact_inputs(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0, largest: int = 1, dtype: Any = np.float32
) -> Tensors:
    """Return small integers as floats: sums and products of them are exact in any order.

    With a dyadic scale (1/2, 2, …) y, dx, dA, dB and an SGD step of a LoRA layer are then bitwise
    equal between frameworks, in float32 and, while sums stay below 256, in bfloat16.

    Args:
        shapes: of every tensor, by name.
        seed: of the draw.
        largest: the largest absolute value.
        dtype: of the arrays.

    >>> exact_inputs({"x": (2, 3)})["x"]
    array([[ 1.,  0.,  0.],
           [-1., -1., -1.]], dtype=float32)
    """
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(-largest, largest + 1, shape).astype(dtype)
        for name, shape in shapes.items()
    }
