"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence

from .shown_text import escaped


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns under their headings.

    >>> print(table(["module", "r"], [["layer.0.q", "8"]]))
    module     r
    ---------  -
    layer.0.q  8
    """
    rows = [[escaped(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [headings, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
