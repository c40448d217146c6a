"""Which cases of a table run by default, and which with ``-m slow``.

Of a test with many cases the default run takes every fifth: laws and subjects take turns, so that
each law and each subject is still there. ``cases`` marks by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest

# A test with more cases than this is thinned, to every fifth of them.
LONG, EVERY = 5, 5


def thin(items: Iterable[pytest.Item]) -> None:
    """Mark as slow all but every fifth case of a test that has many."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not (item.get_closest_marker("slow") or item.get_closest_marker("every_case")):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for several in tests.values():
        for n, item in enumerate(several if len(several) > LONG else ()):
            if n % EVERY:
                item.add_marker(pytest.mark.slow)


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
