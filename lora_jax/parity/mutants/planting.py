"""How a bug is planted: a wrong function in the place of a right one, for a while."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock


def instead(home: Any, name: str, wrong: Callable[..., Any]) -> Callable[[], Any]:
    """Return what plants ``wrong(right, *args)`` in the place of a function."""

    def plant() -> Any:
        return mock.patch.object(home, name, partial(wrong, getattr(home, name)))

    return plant


def method(home: type, name: str, wrong: Callable[..., Any]) -> Callable[[], Any]:
    """Return what plants ``wrong(right, self, *args)`` in the place of a method."""
    right = getattr(home, name)

    def planted(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrong(right, self, *args, **kwargs)

    return lambda: mock.patch.object(home, name, planted)


def entry(table: dict[Any, Any], key: Any, wrong: Callable[..., Any]) -> Callable[[], Any]:
    """Return what plants ``wrong(right, *args)`` in a table."""
    return lambda: mock.patch.dict(table, {key: partial(wrong, table[key])})
