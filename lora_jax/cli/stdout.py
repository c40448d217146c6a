"""The command's way to the terminal: what is written there, and what cannot be."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from ..core.errors import OutputError
from ..core.io.intake import reason
from ..core.shown_text import LONGEST, escaped, escaped_lines, shortened

# Longer messages than this are nobody's to read.
_LONGEST_MESSAGE = 10 * LONGEST

UNFORESEEN = (
    OSError,
    UnicodeError,
    RecursionError,
    MemoryError,
    OverflowError,
    jax.errors.JaxRuntimeError,
)
"""What the machine or the interpreter raises where nothing better was said."""


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    r"""Have every character fit the terminal's encoding, and a warning be one line of the command.

    An ASCII terminal shows ``é`` as ``\xe9``; a text that no encoding takes does not end anything.
    """
    before, warnings.formatwarning = warnings.formatwarning, _warned
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore
    try:
        yield
    finally:
        warnings.formatwarning = before


def show(text: str) -> None:
    """Write lines to standard output, control characters escaped, and make sure that they arrive.

    Raises:
        BrokenPipeError: nobody reads them any more.
        OutputError: they cannot be written, such as to a full disk.
    """
    write(escaped_lines(text))


def write(text: str) -> None:
    """Write what ``show`` does, as it is; for JSON, which has its own way to escape."""
    stream = sys.stdout
    if stream is None:
        raise OutputError("the result cannot be shown: standard output is closed")
    try:
        stream.write(f"{text}\n")
        stream.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        # The interpreter flushes again at its end, and would complain.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        raise OutputError(
            f"the result cannot be written to standard output: {reason(error)}"
        ) from error


def takes(text: str) -> bool:
    """Tell whether standard output's encoding has every character of a text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:
        return False
    return True


def message(text: str) -> str:
    """Return a message as it is shown: escaped, and no longer than anybody reads."""
    lines = shortened(text, _LONGEST_MESSAGE).split("\n")
    return "\n".join(shortened(escaped(line)) for line in lines)


def unforeseen(error: BaseException) -> str:
    """Return one line for an error that nobody has put into words.

    >>> unforeseen(MemoryError())
    'the memory is not enough for this; try a smaller batch_size, max_length or r'
    """
    out_of_memory = "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
    if isinstance(error, MemoryError) or out_of_memory:
        return "the memory is not enough for this; try a smaller batch_size, max_length or r"
    if isinstance(error, RecursionError):
        return "something in these files is nested too deeply"
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{reason(error)}{where}"
    return f"{type(error).__name__}: {shortened(escaped(error), 400)}"


@contextlib.contextmanager
def short_usage() -> Iterator[None]:
    """Turn what the parser of the arguments prints in a box into one message.

    Raises:
        SystemExit: as the parser does, with the message in the place of its number.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as stop:
        if stop.code in (None, 0) or not box.getvalue():
            raise
        raise SystemExit(_unboxed(box.getvalue())) from stop


def _unboxed(box: str) -> str:
    r"""Return the first part of a box's text.

    >>> _unboxed("╭─ Value error ───╮\n│ no such thing │\n│ ─────── │\n│ more │\n╰───╯")
    'no such thing; see lora-jax --help'
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [re.fullmatch(r"[│|](.*)[│|]", line.strip()) for line in plain.splitlines()]
    inside = [row[1].strip() for row in rows if row]
    said = itertools.takewhile(lambda line: not re.fullmatch(r"[─\-]*", line), inside)
    said = " ".join(said) or " ".join(plain.split()) or "these arguments cannot be read"
    return f"{said}; see lora-jax --help"


_shown = message


def _warned(message: Any, category: Any, filename: str, lineno: int, line: Any = None) -> str:
    return f"lora-jax: warning: {_shown(str(message))}\n"
