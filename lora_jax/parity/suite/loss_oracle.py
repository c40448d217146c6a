"""The truth about losses: the value and its gradient by the logits, in float64. numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..tensors import Tensors

IGNORED = -100


def cross_entropy(
    logits: NDArray[Any], labels: NDArray[Any], *, smoothing: float = 0.0, ignored: int = IGNORED
) -> Tensors:
    """Return the mean over the labels that count, and its gradient: ``loss`` and ``dlogits``.

    ``loss = −1/N · Σ_counted Σ_v qᵢᵥ·log softmax(logitsᵢ)ᵥ``, with
    ``q = (1 − ε)·onehot(label) + ε/V`` and N the number of rows that count.

    Args:
        logits: ``(n, V)``, any floating dtype.
        labels: ``(n,)``; rows of ``ignored`` do not count, not in N either.
        smoothing: ε.
        ignored: the label that stands for none.

    Returns:
        ``loss`` of shape ``()`` and ``dlogits`` ``(n, V)``. Both NaN where nothing counts.

    Source: ``torch.nn.CrossEntropyLoss``; smoothing of arXiv 1512.00567, section 7.

    >>> found = cross_entropy(np.zeros((2, 4)), np.array([1, IGNORED]))
    >>> round(float(found["loss"]), 4), found["dlogits"][0]
    (1.3863, array([ 0.25, -0.75,  0.25,  0.25]))
    """
    logits = logits.astype(np.float64)
    counts = labels != ignored
    n = counts.sum() or np.nan
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    wanted = np.eye(logits.shape[-1])[np.where(counts, labels, 0)]
    wanted = (1 - smoothing) * wanted + smoothing / logits.shape[-1]
    weights = (counts / n)[:, None]
    return {
        "loss": np.asarray(-(weights * wanted * logs).sum()),
        "dlogits": weights * (np.exp(logs) - wanted),
    }


def mean_squared(got: NDArray[Any], wanted: NDArray[Any]) -> Tensors:
    """Return ``mean((got − wanted)²)`` over all elements and its gradient: ``loss`` and ``dgot``.

    >>> mean_squared(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    {'loss': array(2.), 'dgot': array([0., 2.])}
    """
    apart = got.astype(np.float64) - wanted.astype(np.float64)
    return {"loss": np.asarray((apart**2).mean()), "dgot": 2 * apart / apart.size}
