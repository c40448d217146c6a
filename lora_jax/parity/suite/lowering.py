"""Every kind of layer as a linear one, so that ``lora_oracle`` is the truth of them all.

A convolution is a linear layer on its windows, an embedding one on one-hot rows, stacked experts
are several. numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ..tensors import Tensors
from . import lora_oracle
from .lora_oracle import Case


@dataclass(frozen=True)
class Lowered:
    """A layer as linear layers.

    Args:
        cases: one linear layer, or one for each expert. Their x are rows of the layer's input.
        reads: for a convolution, which element of its flat input each element of ``cases[0].x``
            is; ``size`` stands for padding. None where the rows are the input.
        shape: of the layer's input.
    """

    cases: tuple[Case, ...]
    reads: NDArray[np.int64] | None = None
    shape: tuple[int, ...] = ()


def windows(
    shape: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> NDArray[np.int64]:
    """Return which element of a flat ``(n, channels, *size)`` each output of a convolution reads.

    Returns:
        Indices ``(n · positions, channels · window)``; the input's size stands for padding.

    Source: the definition of ``torch.nn.ConvNd``: no flip, padding by zeros.

    >>> windows((1, 1, 4), (2,), (2,), (1,), (2,))
    array([[4, 1],
           [1, 3]])
    """
    size = int(np.prod(shape))
    border = [(0, 0), (0, 0), *((one, one) for one in padding)]
    index = np.pad(np.arange(size).reshape(shape), border, constant_values=size)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, window, strict=True)]
    axes = tuple(range(2, len(shape)))
    seen = sliding_window_view(index, spans, axes)
    steps = [slice(None, None, one) for one in (*stride, *dilation)]
    seen = np.moveaxis(seen[:, :, *steps], 1, len(axes) + 1)
    return seen.reshape(-1, shape[1] * int(np.prod(window)))


def gathered(x: NDArray[Any], reads: NDArray[np.int64]) -> NDArray[Any]:
    """Return the rows that a convolution of x multiplies its weight with."""
    return np.append(x.ravel(), x.dtype.type(0))[reads]


def truth(lowered: Lowered) -> Tensors:
    """Return y, dx, dA, dB (and dm) in float64: rows of y, dx as the input, A and B as matrices."""
    return _joined(lowered, [lora_oracle.truth(case) for case in lowered.cases])


def cond(lowered: Lowered) -> dict[str, float]:
    """Return ``‖the formula on absolute values‖ / ‖the formula‖`` for every tensor."""
    sums = _joined(lowered, [lora_oracle.majorant(case) for case in lowered.cases])
    values = truth(lowered)
    return {n: float(np.linalg.norm(sums[n]) / np.linalg.norm(v)) for n, v in values.items()}


def refuse_vacuous(lowered: Lowered, *, exact_scale: bool = False) -> None:
    """Raise ``Vacuous`` as ``lora_oracle.refuse_vacuous`` does, for each linear layer."""
    for case in lowered.cases:
        lora_oracle.refuse_vacuous(case, exact_scale=exact_scale)


def _joined(lowered: Lowered, found: Sequence[Mapping[str, Any]]) -> Tensors:
    if lowered.reads is None:
        return {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    (only,) = found
    size = int(np.prod(lowered.shape))
    back = np.bincount(lowered.reads.ravel(), only["dx"].ravel(), size + 1)[:size]
    return {**only, "dx": back.reshape(lowered.shape)}
