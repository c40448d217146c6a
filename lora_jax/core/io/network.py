"""Waiting for others, never without a limit: what is waited for is said, and so is giving up.

A server may answer nothing, a byte at a time, or that one should come back tomorrow, and its client
may wait for all of that. So the client works in a thread of its own, which is left behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import AssetError

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How long is waited, in seconds.

    Args:
        said: after this long a line says what is waited for, and again each time it doubles.
        stalled: after this long with less than ``least`` new bytes it is given up.
        least: bytes.
        poll: how often is looked.
        slowest: bytes in a second that are sent at least, where nobody counts them.
    """

    said: float = 5.0
    stalled: float = 60.0
    least: int = 1 << 16
    poll: float = 0.5
    slowest: int = 1 << 14

    def of_sending(self, size: int) -> Limits:
        """Return the limits of sending so many bytes, of which nobody tells how many are gone.

        >>> Limits(stalled=60.0, slowest=100).of_sending(500).stalled
        65.0
        """
        return replace(self, stalled=self.stalled + size / self.slowest)


LIMITS = Limits()


def within(
    work: Callable[[], T],
    what: str,
    *,
    arrived: Callable[[], int] | None = None,
    say: Callable[[str], object] | None = None,
    limits: Limits | None = None,
) -> T:
    """Return what ``work`` returns, or give up where nothing comes any more.

    Args:
        work: is called in a thread; when it is given up, nobody asks for its result.
        what: is waited for, for messages.
        arrived: how many bytes are there; None where that is not known.
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
    count = arrived or (lambda: 0)
    seen, next_line = count(), limits.said
    while not done.wait(min(limits.poll, limits.stalled / 4)):
        now = time.monotonic()
        if (there := count()) - seen >= limits.least:
            seen, since = there, now
        if now - since >= limits.stalled:
            few = (
                f", the last {now - since:.0f} of them with {max(there - seen, 0):,} new bytes"
                if arrived
                else ""
            )
            raise AssetError(f"{what}: given up after {now - began:.0f} s{few}")
        if say is not None and now - began >= next_line:
            known = f", {there:,} bytes are there" if arrived else ""
            say(f"{what}: waiting for {now - began:.0f} s{known}")
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
