"""A process that is killed before its n-th file operation, played in this one.

At the n-th operation that changes something on the disk an exception is raised that nobody catches,
and every later one raises it again, clean-up included: the disk is left as by SIGKILL. Locks go as
their files are closed, which is let through.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

OPERATIONS = ("open", "replace", "rename", "unlink", "remove", "rmdir", "mkdir", "link", "fsync")


class Killed(BaseException):
    """In the place of the signal that cannot be caught."""


class Killer:
    """Counts operations and kills at one of them.

    Args:
        at: before which operation, from 0; none lives.
    """

    def __init__(self, at: int | None) -> None:
        self.at, self.seen = at, 0
        self.log: list[str] = []

    def step(self, what: str) -> None:
        self.seen += 1
        self.log.append(what)
        if self.at is not None and self.seen > self.at:
            raise Killed(what)

    @property
    def dead(self) -> bool:
        return self.at is not None and self.seen > self.at


@contextlib.contextmanager
def killed_at(at: int | None, patch: pytest.MonkeyPatch) -> Iterator[Killer]:
    """Kill what the block does before its operation ``at``; nothing is killed where it is None."""
    killer = Killer(at)

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            reads = name == "open" and not args[1] & (os.O_CREAT | os.O_TRUNC)
            if not reads:
                killer.step(f"{name} {' '.join(map(str, args[:2]))}")
            # A disk that is busy with other tests may take seconds, and no kill can tell.
            return None if name == "fsync" else real(*args, **kwargs)

        return call

    def opened(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+"):
                return real(file, mode, *args, **kwargs)
            killer.step(f"create {file}")
            stream = real(file, mode, *args, **kwargs)
            try:
                killer.step(f"write {file}")
            except Killed:
                stream.close()
                raise
            return stream

        return call

    with patch.context() as here:
        for name in OPERATIONS:
            here.setattr(os, name, watched(name, getattr(os, name)))
        here.setattr(io, "open", opened(io.open))
        here.setattr(builtins, "open", opened(builtins.open))
        try:
            yield killer
        except Killed:
            assert killer.dead
