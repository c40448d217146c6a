"""Signals that ask a process to end: all of them end it as Ctrl-C does, and none in mid-write."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C; what schedulers send before they kill, preemption too; the end of the terminal.
ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)

# What Python or the system put there. A handler of somebody else's, and a signal that is ignored
# (as under nohup), stay as they are.
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Ended(KeyboardInterrupt):
    """A signal that asks to end, raised where the program was; ``number`` tells which."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def number_of(stop: KeyboardInterrupt) -> int:
    """Return the signal that an interrupt stands for."""
    return getattr(stop, "number", signal.SIGINT)


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return the exit code of a process that a signal ended.

    >>> exit_code(KeyboardInterrupt()), exit_code(Ended(signal.SIGTERM))
    (130, 143)
    """
    return 128 + number_of(stop)


def interrupted(stop: KeyboardInterrupt) -> str:
    """Return how to say it.

    >>> interrupted(KeyboardInterrupt()), interrupted(Ended(signal.SIGTERM))
    ('interrupted', 'interrupted by SIGTERM')
    """
    number = number_of(stop)
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    return f"interrupted{by}"


@contextmanager
def ending(*, once: bool = False) -> Iterator[Callable[[], None]]:
    """Raise ``Ended`` on every signal that asks to end; the handlers before are put back.

    Args:
        once: only the first one raises, so that the next cannot break off what it begins: saving.

    Yields:
        A check that raises ``Ended`` if a signal has come. An exception out of a handler can get
        lost, in a finaliser say; a loop that checks ends all the same.
    """
    seen: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if not once or len(seen) == 1:
            raise Ended(number)

    def check() -> None:
        if seen:
            raise Ended(seen[0])

    handler.ours = True  # pyright: ignore[reportFunctionMemberAccess]
    replaced = _install(handler, lambda old: old in _DEFAULTS or getattr(old, "ours", False))
    try:
        yield check
    finally:
        _put_back(replaced)


@contextmanager
def waiting() -> Iterator[None]:
    """Hold the signals that ask to end back until the block is done."""
    pending: list[int] = []
    # One that is ignored stays so, and the system's own end cannot wait.
    replaced = _install(lambda number, frame: pending.append(number), callable)
    try:
        yield
    finally:
        _put_back(replaced)
    for number in pending:
        signal.raise_signal(number)


def _install(handler: Any, where: Callable[[Any], bool]) -> dict[int, Any]:
    """Set a handler for each signal whose present one is such; return the present ones."""
    # Only the main thread may; one that Python did not install (None) cannot be put back.
    if threading.current_thread() is not threading.main_thread():
        return {}
    present = {number: signal.getsignal(number) for number in ENDING}
    chosen = {number: old for number, old in present.items() if old is not None and where(old)}
    for number in chosen:
        signal.signal(number, handler)
    return chosen


def _put_back(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
