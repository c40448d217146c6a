"""The plan as a plain-text table."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.shown_text import escaped
from .leaf_plan import LeafPlan

_HEADINGS = ("path", "shape", "decision", "r", "scale", "A", "B", "sites")


def render(leaves: Sequence[LeafPlan], totals: str) -> str:
    """Return one line for each parameter, then the totals."""
    rows = [_HEADINGS, *([escaped(cell) for cell in _row(leaf)] for leaf in leaves)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", totals])


def totals(leaves: Sequence[LeafPlan], trainable: int, base: int) -> str:
    """Return the trainable and base counts, the share, and the adapters' size in float32.

    The share is PEFT's: trained values over base values plus those that LoRA adds.
    """
    added = sum(leaf.trained for leaf in leaves if leaf.adapted or leaf.rows)
    share = 100 * trainable / max(base + added, 1)
    return (
        f"trainable {trainable:,} of {base + added:,} ({share:.4f} %), "
        f"base {base:,}, adapters {4 * trainable:,} bytes in float32"
    )


def _row(leaf: LeafPlan) -> tuple[str, ...]:
    why = f"{leaf.why}, author's derivative forms dW" if leaf.dense_gradient else leaf.why
    why += ", DoRA" if leaf.dora else ""
    why += ", with a bias" if leaf.biased else ""
    why += ", aLoRA" if leaf.masked else ""
    why += f", W + AB is formed: {leaf.materialized}" if leaf.materialized else ""
    if not leaf.adapted:
        return (leaf.path, str(leaf.shape), why, "", "", "", "", str(leaf.sites))
    return (
        leaf.name,
        f"{leaf.shape} {leaf.axes}",
        why,
        str(leaf.r),
        f"{leaf.scale:g}",
        str(leaf.a_shape),
        str(leaf.b_shape),
        str(leaf.sites),
    )
