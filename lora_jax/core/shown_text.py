"""What is shown of other people's texts: no control characters, and no more than one can read.

A name, label or header may hold characters that move the cursor, set the window's title, end the
line or turn the reading direction. All of them are shown escaped, here and nowhere else.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence

SHOWN = 20
"""How many offenders a message lists."""

LONGEST = 2000
"""How many characters a line of a message has."""

# Cc: C0, DEL and C1. Cf: what turns the direction or is not seen. Zl, Zp: what ends a line.
# Cs: half a character, which no encoding takes. Co, Cn are left: fonts show a box.
_HIDDEN = ("Cc", "Cf", "Zl", "Zp", "Cs")
_USUAL = "\u200c\u200d"  # joiners, which scripts and emoji are written with
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def escaped(text: object) -> str:
    r"""Return a text as one line in which control characters are seen, not obeyed.

    >>> print(escaped("a\x1b[31m\nb\u202e"))
    a\x1b[31m\nb\u202e
    """
    text = str(text)
    return text if text.isascii() and text.isprintable() else "".join(map(_escape, text))


def escaped_lines(text: object) -> str:
    r"""Return a text of several lines, each as ``escaped`` has it.

    >>> escaped_lines("one\ntwo\x07")
    'one\ntwo\\x07'
    """
    return "\n".join(map(escaped, str(text).split("\n")))


def shortened(text: str, longest: int = LONGEST) -> str:
    """Return a text, cut where it is longer than anybody reads.

    >>> shortened("abcdef", 4)
    'abc…'
    """
    return text if len(text) <= longest else text[: longest - 1] + "…"


def listed(lines: Sequence[str], most: int = SHOWN, *, more: int = 0) -> list[str]:
    """Return the first lines, escaped and cut, and how many more there are.

    >>> listed(["a", "b", "c"], 2)
    ['a', 'b', '… and 1 more']
    """
    first = [shortened(escaped(shortened(line))) for line in lines[:most]]
    more += max(len(lines) - most, 0)
    return [*first, f"… and {more:,} more"] if more else first


def in_json(value: object) -> str:
    r"""Return JSON on one line that is read back as the same, without a raw control character.

    Raises:
        ValueError: a number is not finite.

    >>> in_json({"é": "\x7f\u202e"})
    '{"é": "\\u007f\\u202e"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return "".join(char if _escape(char) == char else json.dumps(char)[1:-1] for char in text)


def in_markdown(text: object) -> str:
    r"""Return a text that Markdown shows as it is, on one line: no HTML, links or table cells.

    >>> in_markdown("<b>x</b>|[a](b)")
    '&lt;b&gt;x&lt;/b&gt;\\|\\[a](b)'
    """
    plain = escaped(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + char if char in "\\`*[|" else char for char in plain)


def _escape(char: str) -> str:
    if char.isprintable() or char in _USUAL or unicodedata.category(char) not in _HIDDEN:
        return char
    if char in _SHORT:
        return _SHORT[char]
    code = ord(char)
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )
