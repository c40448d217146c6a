"""Tensors by name: nested inputs as flat names, and what PyTorch calls each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ParityError, raise_all

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class To:
    """How PyTorch holds a tensor: ``jax.transpose(axes).reshape(shape)`` under another name.

    Args:
        name: PyTorch's name.
        axes: the order of JAX's axes; None keeps it.
        shape: PyTorch's shape, where axes are split or joined.

    >>> To("query.weight", axes=(1, 2, 0), shape=(6, 4)).there(np.ones((4, 3, 2))).shape
    (6, 4)
    """

    name: str
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    def there(self, value: NDArray[Any]) -> NDArray[Any]:
        """Return PyTorch's array for JAX's."""
        moved = value if self.axes is None else value.transpose(self.axes)
        return np.ascontiguousarray(moved if self.shape is None else moved.reshape(self.shape))

    def back(self, value: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
        """Return JAX's array, which has this shape, for PyTorch's."""
        axes = range(len(shape)) if self.axes is None else self.axes
        moved = value.reshape([shape[axis] for axis in axes])
        return moved.transpose(np.argsort(axes)) if self.axes is not None else moved


Mapped = Mapping[str, To | str] | Callable[[str], To | str]
"""JAX's name to PyTorch's, with the layout where it differs; names that are alike may be left out.
"""


def to(mapping: Mapped | None, name: str) -> To:
    """Return what a mapping makes of a name; a name that it leaves out stays as it is."""
    found = mapping(name) if callable(mapping) else (mapping or {}).get(name, name)
    return To(found) if isinstance(found, str) else found


def check(mapping: Mapped | None, names: Sequence[str]) -> None:
    """Raise unless the mapping's names exist and no two become one.

    Raises:
        ParityError: lists every name that is unknown or ambiguous.
    """
    given = set() if mapping is None or callable(mapping) else set(mapping)
    problems = [f"{name}: mapped, but there is no such tensor" for name in given - set(names)]
    targets = [to(mapping, name).name for name in names]
    problems += [
        f"{name}: becomes {target!r}, as another tensor does"
        for name, target in zip(names, targets, strict=True)
        if targets.count(target) > 1
    ]
    raise_all(ParityError, "this mapping does not fit the tensors", sorted(problems))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings and sequences by dotted names.

    >>> flatten({"params": {"w": 1, "layers": [2, 3]}, "x": 4})
    {'params.w': 1, 'params.layers.0': 2, 'params.layers.1': 3, 'x': 4}
    """
    if isinstance(tree, Mapping):
        children: Any = tree.items()
    elif isinstance(tree, list | tuple):
        children = enumerate(tree)
    else:
        return {prefix.rstrip("."): tree}
    return {
        name: leaf
        for key, child in children
        for name, leaf in flatten(child, f"{prefix}{key}.").items()
    }
