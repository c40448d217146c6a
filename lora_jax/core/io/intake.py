"""Reading untrusted files: regular files of a sane size, and JSON of a sane depth.

A pipe in the place of a file waits for ever, a device never ends, and a link in somebody's model
directory may lead to the reader's own secrets.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

MIB = 1 << 20

# Configurations, records and indices. The largest that are known, of tokenizers, have 40 MB.
LARGEST = 256 * MIB

MOST_VALUES = 1 << 21
"""Values in JSON. The largest index of shards that is known has 300,000."""

_KINDS = {
    stat.S_ISDIR: "Is a directory",
    stat.S_ISFIFO: "Is a named pipe",
    stat.S_ISCHR: "Is a device",
    stat.S_ISBLK: "Is a device",
    stat.S_ISSOCK: "Is a socket",
}


def require_regular(path: str | Path) -> None:
    """Raise unless the path leads to a regular file; nothing is opened.

    Raises:
        OSError: there is no such file, or its ``strerror`` says what is there instead.

    >>> require_regular("/dev/null")
    Traceback (most recent call last):
        ...
    OSError: [Errno 22] Is a device, wanted a regular file: '/dev/null'
    """
    _refuse_special(os.stat(path).st_mode, path)


def problem_of(path: str | Path) -> str | None:
    """Return in a few words why a path leads to no regular file, or None.

    >>> problem_of("/no/such/file"), problem_of("/dev/null")
    ('missing', 'Is a device, wanted a regular file')
    """
    try:
        require_regular(path)
    except FileNotFoundError:
        return "missing"
    # ValueError: a zero byte in the name.
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def reason(error: Exception) -> str:
    """Return in a few words what an error says, without the number and path of an ``OSError``.

    >>> reason(FileNotFoundError(2, "No such file or directory", "x")), reason(KeyError("x"))
    ('No such file or directory', "KeyError('x')")
    """
    said = getattr(error, "strerror", None) or str(error)
    return said if said and isinstance(error, OSError | ValueError) else repr(error)


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a regular file for reading; anything else is refused at once, without waiting for it.

    Raises:
        OSError: as ``require_regular``.
    """
    # Without it, opening a pipe waits for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _refuse_special(os.fstat(handle).st_mode, path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: str | Path, limit: int = LARGEST) -> bytes:
    """Return what a regular file holds.

    Args:
        path: where it is.
        limit: how many bytes it may hold.

    Raises:
        OSError: as ``require_regular``, or the file is longer.
    """
    content = bytearray()
    with open_regular(path) as stream:
        too_long = os.fstat(stream.fileno()).st_size > limit
        # A part at a time: to read n bytes at once, Python allocates n.
        while not too_long and (part := stream.read(MIB)):
            content += part
            too_long = len(content) > limit
    if too_long:
        said = f"it holds more than the {limit:,} bytes that such a file may have"
        raise OSError(errno.EFBIG, said, str(path))
    return bytes(content)


def parse_json(content: bytes | str) -> Any:
    """Return what JSON says, as ``json.loads``, which gives up on deep nesting in its own way.

    A value of three bytes takes a hundred in memory, so that their number is looked at first.

    Raises:
        ValueError: it is not JSON, nested too deeply, or holds more values than ``MOST_VALUES``.

    >>> parse_json("[" * 100_000 + "]" * 100_000)
    Traceback (most recent call last):
        ...
    ValueError: it is nested too deeply
    """
    refuse_many(content)
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def refuse_many(content: bytes | str) -> None:
    """Raise where JSON holds more values than ``MOST_VALUES``, by what separates them.

    Raises:
        ValueError: it does.
    """
    if isinstance(content, bytes):
        marks = sum(map(content.count, (b",", b"[", b"{")))
    else:
        marks = sum(map(content.count, ",[{"))
    if marks > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES:,} values")


def is_inside(path: Path, directory: Path) -> bool:
    """Tell whether a path is a regular file that belongs to a directory.

    A link belongs to it if it leads to a file below, or to where the hub's cache keeps the
    contents of the snapshot that the directory is: ``…/blobs`` beside ``…/snapshots/commit``.

    Args:
        path: a name below the directory.
        directory: of a model, say.
    """
    try:
        target, home = path.resolve(strict=True), directory.resolve(strict=True)
    # RuntimeError: links in a circle, before Python 3.13.
    except (OSError, RuntimeError):
        return False
    homes = [home, *(one.parent / "blobs" for one in home.parents if one.name == "snapshots")]
    return target.is_file() and any(one in target.parents for one in homes)


def _refuse_special(mode: int, path: str | Path) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for test, name in _KINDS.items() if test(mode)), "Is no file")
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(code, f"{kind}, wanted a regular file", str(path))
