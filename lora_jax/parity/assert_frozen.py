"""``assert_frozen``: what must not move has not, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import paths


def assert_frozen(before: Any, after: Any) -> None:
    """Raise unless every leaf is bitwise what it was.

    Args:
        before: a pytree of arrays of JAX or numpy, or a state dict of PyTorch, copied before.
        after: the same afterwards.

    Raises:
        AssertionError: lists every leaf that moved, came or went.

    >>> assert_frozen({"w": np.ones(3)}, {"w": np.ones(3)})
    >>> assert_frozen({"w": np.zeros(3), "b": np.ones(2)}, {"w": -np.zeros(3), "b": np.ones(2)})
    Traceback (most recent call last):
        ...
    AssertionError: these leaves moved and should not have:
      w: 3 of 3 elements, the largest by 0.0e+00
    """
    if found := moved(before, after):
        raise AssertionError("\n  ".join(["these leaves moved and should not have:", *found]))


def moved(before: Any, after: Any) -> list[str]:
    """Return a line for every leaf that is not bitwise what it was.

    >>> moved({"w": np.ones(2)}, {"w": np.array([1.0, 1.5]), "b": np.ones(1)})
    ['w: 1 of 2 elements, the largest by 5.0e-01', 'b: was not there']
    """
    old, new = (
        {path: _array(leaf) for path, leaf in paths.flatten(tree).items()}
        for tree in (before, after)
    )
    found = [f"{path}: is gone" for path in old.keys() - new.keys()]
    found += [line for path in old if path in new if (line := _line(path, old[path], new[path]))]
    return [*found, *(f"{path}: was not there" for path in sorted(new.keys() - old.keys()))]


def _line(path: str, old: NDArray[Any], new: NDArray[Any]) -> str:
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"{path}: was {old.dtype}{list(old.shape)}, is {new.dtype}{list(new.shape)}"
    differ = (_bytes(old) != _bytes(new)).any(axis=-1)
    if not differ.any():
        return ""
    # NaN and infinity differ by NaN.
    with np.errstate(invalid="ignore"):
        apart = np.abs(new.astype(np.float64) - old.astype(np.float64)).max()
    return f"{path}: {differ.sum()} of {differ.size} elements, the largest by {apart:.1e}"


def _bytes(value: NDArray[Any]) -> NDArray[np.uint8]:
    flat = np.ascontiguousarray(value).reshape(-1)
    return flat.view(np.uint8).reshape(flat.size, value.dtype.itemsize)


def _array(leaf: Any) -> NDArray[Any]:
    if hasattr(leaf, "detach"):
        from .sides.torch_side import to_numpy

        return to_numpy(leaf)
    return np.asarray(leaf)
