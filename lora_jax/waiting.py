"""Waiting for others, never without a limit: what is waited for is said, and so is giving up.

A server may answer nothing, a byte at a time, or that one should come back tomorrow, and its client
may wait for all of that. So the client works in a thread of its own, which is left behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import AssetError

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How long is waited, in seconds.

    Args:
        said: after this long a line says what is waited for, and again each time it doubles.
        stalled: after this long with less than ``least`` new bytes it is given up.
        least: bytes.
        poll: how often is looked.
    """

    said: float = 5.0
    stalled: float = 60.0
    least: int = 1 << 16
    poll: float = 0.5


LIMITS = Limits()


def within(
    work: Callable[[], T],
    what: str,
    *,
    arrived: Callable[[], int] = lambda: 0,
    say: Callable[[str], object] | None = None,
    limits: Limits | None = None,
) -> T:
    """Return what ``work`` returns, or give up where nothing comes any more.

    Args:
        work: is called in a thread; when it is given up, nobody asks for its result.
        what: is waited for, for messages.
        arrived: how many bytes are there.
        say: called with a line where it takes long.
        limits: see ``Limits``; by default ``LIMITS``.

    Raises:
        AssetError: it was given up.
        Exception: what ``work`` raises.

    >>> within(lambda: 3, "three")
    3
    """
    limits = LIMITS if limits is None else limits
    done, result = threading.Event(), {}

    def run() -> None:
        try:
            result["value"] = work()
        except BaseException as error:  # raised again by the one who waits
            result["error"] = error
        done.set()

    threading.Thread(target=run, daemon=True).start()
    began = since = time.monotonic()
    seen, next_line = arrived(), limits.said
    while not done.wait(min(limits.poll, limits.stalled / 4)):
        now = time.monotonic()
        if (there := arrived()) - seen >= limits.least:
            seen, since = there, now
        if now - since >= limits.stalled:
            raise AssetError(
                f"{what}: given up after {now - began:.0f} s, the last {now - since:.0f} of them "
                f"with {max(there - seen, 0):,} new bytes"
            )
        if say is not None and now - began >= next_line:
            say(f"{what}: waiting for {now - began:.0f} s, {there:,} bytes are there")
            next_line *= 2
    if "error" in result:
        raise result["error"]
    return result["value"]


def bytes_in(directory: Path) -> int:
    """Return how many bytes the files below a directory hold, whatever happens to them meanwhile.

    >>> bytes_in(Path("/no/such/directory"))
    0
    """
    total = 0
    try:
        for path in directory.rglob("*"):
            try:
                total += path.lstat().st_size
            except OSError:
                continue
    except OSError:
        pass
    return total


def failure(error: BaseException) -> str:
    """Return what a client's error says, with the status that the server answered.

    Clients tell of a missing file in their cache and keep to themselves that the server said 429.
    """
    said = " ".join(str(error).split()) or type(error).__name__
    one: BaseException | None = error
    while one is not None:
        status: Any = getattr(getattr(one, "response", None), "status_code", None)
        if status is not None:
            return said if str(status) in said else f"HTTP status {status}: {said}"
        one = one.__cause__ or one.__context__
    return said
