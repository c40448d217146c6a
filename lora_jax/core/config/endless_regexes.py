"""Regular expressions of a file that nobody has read: some would run for years on one name.

Python's ``re`` tries every way to split a name among repeats within repeats, and cannot be stopped
from within. So expressions of that kind, and no others, are tried in a process of their own first.
"""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SECONDS = 3.0

# Two to this power steps take about a second: a repeat tries every length that a name has, and
# an alternative or a "?" doubles the work. Most names have less than 64 characters.
_MOST_WORK = 27
_LENGTH, _CHOICE = 6, 1

_COUNTED = re.compile(r"\{(\d*)(,?)(\d*)\}")
_GROUP_KIND = re.compile(r"(\?[a-zA-Z:=!<>-]*)?")

# Comments and whitespace hide what is repeated, and what a backreference repeats is not known.
_HIDDEN = re.compile(r"\(\?#|\(\?[a-zA-Z-]*x|\\[1-9]|\(\?P=")

_CHILD = """
import json, re, sys
expressions, names = json.load(sys.stdin)
for regex, whole in expressions:
    compiled = re.compile(regex)
    for name in names:
        (compiled.fullmatch if whole else compiled.match)(name)
    print(flush=True)
"""


class Expression(NamedTuple):
    """A regular expression as it is used.

    Args:
        pattern: what the user wrote, for messages.
        regex: what is made of it.
        whole: whether it must match the whole name, not its beginning.
    """

    pattern: str
    regex: str
    whole: bool


def suffixed(pattern: str) -> str:
    """Return the expression that a key of ``rank_pattern`` is: for the end of a module's name."""
    return rf"(.*\.)?({pattern})$"


def in_layers(pattern: str) -> str:
    """Return the expression for a module in a list of this name, its number in the last group."""
    return rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\."


def hanging(expressions: Iterable[Expression], names: Iterable[str]) -> list[str]:
    """Return a line for the first expression that does not come to an end on these names.

    Expressions that are not suspicious are passed over, so that usually no process is started.

    Args:
        expressions: all of them can be compiled.
        names: what they will be matched with.

    >>> hanging([Expression("q|v", ".*(q|v)", True)], ["layers.0.q"])
    []
    """
    names = tuple(dict.fromkeys(names))
    longest = max(map(len, names), default=0)
    tried = tuple(one for one in dict.fromkeys(expressions) if is_suspicious(one.regex, longest))
    return list(_tried(tried, names)) if tried else []


def is_suspicious(regex: str, longest: int = 0) -> bool:
    r"""Tell whether a repeat holds something of variable length, or many are in a row.

    It is a guess from the text, which errs on the side of suspicion.

    Args:
        regex: the expression.
        longest: how many characters the longest name has: k repeats in a row try its kth power.

    >>> [is_suspicious(one) for one in (r"(a+)+$", r"(a|aa)*$", r"(.*a){9}", r".*.*.*.*.*x")]
    [True, True, True, True]
    >>> [is_suspicious(one) for one in (r".*\.(q|v)_proj", r"(.*\.)?layers\.(\d+)\..*", r"[+*]{2}")]
    [False, False, False]
    >>> is_suspicious(".*.*.*.*!"), is_suspicious(".*.*.*.*!", longest=2000)
    (False, True)
    """
    length = max(_LENGTH, longest.bit_length())
    if _HIDDEN.search(regex):
        return True
    varies = [False]  # of every open group: whether what it matches varies
    closed = False  # whether what was read last is a group that does
    work, place = 0, 0
    while place < len(regex):
        char, place = regex[place], place + 1
        if char in "*+?{" and (repeat := _repeat(regex, place - 1)):
            place, fewest, most = repeat
            if closed and most > 1:
                return True
            if fewest != most:
                work += length if most > 1 else _CHOICE
                varies[-1] = True
            continue
        closed = False
        if char == "\\":
            place += 1
        elif char == "[":
            place = _end_of_class(regex, place)
        elif char == "(":
            varies.append(False)
            place += len(_GROUP_KIND.match(regex, place)[0])  # pyright: ignore
        elif char == ")" and len(varies) > 1:
            closed = varies.pop()
            varies[-1] |= closed
        elif char == "|":
            work += 0 if varies[-1] else _CHOICE
            varies[-1] = True
    return work > _MOST_WORK


def _repeat(regex: str, place: int) -> tuple[int, float, float] | None:
    """Return where a quantifier ends, and the fewest and the most times that it repeats."""
    counted = _COUNTED.match(regex, place)
    if counted:
        low, comma, high = counted.groups()
        if not low and not comma:
            return None
        fewest = float(low or 0)
        end, most = counted.end(), float(high or math.inf) if comma else fewest
    elif regex[place] == "{":
        return None
    else:
        end, fewest = place + 1, float(regex[place] == "+")
        most = 1.0 if regex[place] == "?" else math.inf
    # A lazy or possessive one is the same quantifier.
    return end + (regex[end : end + 1] in ("?", "+")), fewest, most


def _end_of_class(regex: str, place: int) -> int:
    """Return the place behind a class whose ``[`` stands before ``place``."""
    place += regex.startswith("^", place)
    place += regex.startswith("]", place)
    while place < len(regex) and regex[place] != "]":
        place += 2 if regex[place] == "\\" else 1
    return place + 1


@functools.lru_cache(maxsize=16)
def _tried(expressions: Sequence[Expression], names: Sequence[str]) -> tuple[str, ...]:
    given = json.dumps([[(one.regex, one.whole) for one in expressions], names])
    command = [sys.executable, "-I", "-c", _CHILD]
    try:
        done = subprocess.run(
            command, input=given.encode(), capture_output=True, timeout=SECONDS, check=False
        )
        finished, why = done.stdout.count(b"\n"), done.stderr.decode(errors="replace")[-200:]
    except subprocess.TimeoutExpired as late:
        finished, why = (late.stdout or b"").count(b"\n"), f"still at it after {SECONDS:g} s"
    except OSError as error:
        finished, why = 0, f"cannot be tried: {error}"
    if finished == len(expressions):
        return ()
    first = expressions[finished]
    return (
        f"{first.pattern!r}: got a regular expression that comes to no end on the names of these "
        f"{len(names)} modules ({why.strip()}), wanted one without repeats inside repeats",
    )
