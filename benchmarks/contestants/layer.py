"""One linear layer with LoRA: the numbers that each contestant gets, and what the work needs.

``y = x·W + s·(x·A)·B``, and with ``backward`` also dx, dA and dB of ``sum(y·g)``. Everything is
random and nothing is zero. Both paths are of one size, so an error in either shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from ..case import Needed

SCALE = 2


@dataclass(frozen=True)
class Layer:
    """The sizes and the precision of a layer, and which work is done.

    Args:
        tokens: rows of x ``(tokens, inputs)``.
        inputs: rows of W ``(inputs, outputs)``.
        outputs: columns of it.
        r: rank of A ``(inputs, r)`` and B ``(r, outputs)``, which are in float32.
        dtype: of x, W, y and g.
        backward: also the gradients.
    """

    tokens: int
    inputs: int
    outputs: int
    r: int
    dtype: str = "float32"
    backward: bool = True

    @property
    def alpha(self) -> int:
        """The ``lora_alpha`` that makes the scale ``SCALE``."""
        return SCALE * self.r

    @property
    def needed(self) -> Needed:
        """The least that the work costs: in the cheapest order of products, each array once.

        The low-rank path is ``(x·A)·B``, or a part of ``W + s·A·B``; dA and dB are products of
        x, g, A and B, or of A, B and ``dW = xᵀ·g``.
        """
        t, i, o, r = self.tokens, self.inputs, self.outputs, self.r
        frozen, apart, within = 2 * t * i * o, 2 * t * r * (i + o), 2 * r * i * o
        flops = frozen + min(apart, within)
        narrow, wide = t * (i + o), r * (i + o)
        if self.backward:
            flops += frozen + min(2 * apart, frozen + 2 * within)
            narrow, wide = 2 * narrow, 2 * wide
        size = jnp.dtype(self.dtype).itemsize
        return Needed(flops, size * (narrow + i * o) + 4 * wide, self.dtype)


@dataclass(frozen=True)
class Given:
    """What each contestant gets, in float32; x, w and g hold numbers of the layer's dtype."""

    layer: Layer
    x: np.ndarray
    w: np.ndarray
    a: np.ndarray
    b: np.ndarray
    g: np.ndarray

    @property
    def merged(self) -> np.ndarray:
        """``W + s·A·B``: with it a layer without LoRA does the same."""
        return self.w + SCALE * self.a @ self.b

    def chained(self, dw: np.ndarray) -> Mapping[str, np.ndarray]:
        """Return dA and dB that follow from the gradient of the merged weight."""
        return {"dA": SCALE * dw @ self.b.T, "dB": SCALE * self.a.T @ dw}


def draw(layer: Layer) -> Given:
    """Return the same random numbers at each call."""
    rng = np.random.default_rng(0)

    def normal(rows: int, columns: int, size: float = 1.0) -> np.ndarray:
        return rng.standard_normal((rows, columns), np.float32) * np.float32(size)

    def rounded(array: np.ndarray) -> np.ndarray:
        return array.astype(jnp.dtype(layer.dtype)).astype(np.float32)

    t, i, o, r = layer.tokens, layer.inputs, layer.outputs, layer.r
    return Given(
        layer,
        x=rounded(normal(t, i)),
        w=rounded(normal(i, o, i**-0.5)),
        a=normal(i, r, i**-0.5),
        b=normal(r, o, r**-0.5 / SCALE),
        g=rounded(normal(t, o)),
    )
