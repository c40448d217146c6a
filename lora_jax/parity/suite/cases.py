"""The inputs of the layer checks: all sizes different, B away from zero, no exact scale."""

from __future__ import annotations

from typing import Any

import numpy as np

from .lora_oracle import Case

# n, in, r, out: all different within a shape; 16 / r is in none of them exact in bfloat16.
SHAPES = ((5, 7, 3, 11), (16, 96, 6, 31), (9, 33, 6, 5), (3, 64, 5, 129))
ALPHA = 16


def random_case(shape: tuple[int, int, int, int], seed: int, *, rslora: bool = False) -> Case:
    """Return a LoRA linear of float32 normals, with alpha 16."""
    n, fan_in, r, out = shape
    rng = np.random.default_rng(seed)

    def normal(*shape: int, std: float = 1.0) -> Any:
        return (std * rng.standard_normal(shape)).astype(np.float32)

    return Case(
        x=normal(n, fan_in),
        w=normal(fan_in, out, std=fan_in**-0.5),
        bias=normal(out),
        a=normal(fan_in, r, std=fan_in**-0.5),
        b=normal(r, out, std=0.3),
        g=normal(n, out),
        scale=ALPHA / (r**0.5 if rslora else r),
    )


def exact_case(seed: int) -> Case:
    """Return small integers and a dyadic scale: every order of summation is exact, in bfloat16 too.

    Alpha is 2 and r is 4.
    """
    rng = np.random.default_rng(seed)
    shapes = {"x": (3, 7), "w": (7, 5), "bias": (5,), "a": (7, 4), "b": (4, 5), "g": (3, 5)}
    values: Any = {k: rng.integers(-1, 2, shape).astype(np.float32) for k, shape in shapes.items()}
    return Case(**values, scale=0.5)
