"""The arrays that a plan was made from, for as long as somebody else keeps them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any


class Given:
    """A model's leaves by path, held weakly: a plan keeps no model alive.

    >>> import numpy as np
    >>> leaf = np.ones(3)
    >>> given = Given({"w": leaf})
    >>> given.get("w") is leaf, given.get("v")
    (True, None)
    >>> del leaf
    >>> given.get("w")
    """

    def __init__(self, leaves: Mapping[str, Any]):
        self._leaves = {path: found for path, one in leaves.items() if (found := _held(one))}

    def get(self, path: str) -> Any:
        """Return a leaf whose values can be read; None for shapes and for what is gone."""
        leaf = self._leaves[path]() if path in self._leaves else None
        deleted = getattr(leaf, "is_deleted", None)
        if deleted is not None and deleted():
            return None
        return leaf if getattr(leaf, "is_fully_addressable", True) else None

    def __reduce__(self) -> tuple[type[Given], tuple[dict[str, Any]]]:
        # Another process has none of these arrays.
        return Given, ({},)


def _held(leaf: Any) -> weakref.ref[Any] | None:
    try:
        return weakref.ref(leaf)
    except TypeError:  # a shape, or a number
        return None
