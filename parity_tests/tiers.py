"""Which cases of a table run by default, and which with ``-m slow``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def cases(
    items: Iterable[Any],
    *,
    slow: Collection[str] = (),
    quick: Collection[str] | None = None,
    name: Callable[[Any], str] = str,
) -> list[Any]:
    """Return the items as pytest's parameters by their names.

    Args:
        items: rows of a table.
        slow: the names of those that are slow.
        quick: the names of those that are not, where the others are.
        name: of an item.
    """
    return [
        pytest.param(
            item,
            id=name(item),
            marks=[pytest.mark.slow]
            * (name(item) in slow or (quick is not None and name(item) not in quick)),
        )
        for item in items
    ]
