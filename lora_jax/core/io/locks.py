"""Locks that the system takes away from a process that ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def try_lock(handle: int) -> bool | None:
    """Lock an open file for this process.

    Returns:
        True: it is ours. False: somebody else has it. None: there are no locks here, on this
        system or this file system, which is warned of.
    """
    if fcntl is None:
        return _unknown("this system has none")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        return _unknown(str(error.strerror or error))
    return True


def claim(directory: Path, stack: contextlib.ExitStack) -> bool:
    """Lock a directory until the stack ends; nothing is written for it. False: somebody has it.

    Raises:
        OSError: it cannot be read.
    """
    if fcntl is None:
        _unknown("this system has none")
        return True
    while True:
        handle = os.open(directory, os.O_RDONLY)
        stack.callback(os.close, handle)
        if try_lock(handle) is False:
            return False
        if is_at(handle, directory):
            return True
        directory.mkdir(parents=True, exist_ok=True)  # whoever had it has removed it


def is_at(handle: int, path: Path) -> bool:
    """Tell whether an open file is still the one of this name."""
    try:
        here = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), here)


def _unknown(why: str) -> None:
    warnings.warn(
        f"files cannot be locked ({why}): nothing notices a second run in the same directory",
        stacklevel=2,
    )
