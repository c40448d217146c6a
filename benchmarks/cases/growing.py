"""The decoder's step with more layers, width and rank; ``decoder_step`` is what they grow about."""

from __future__ import annotations

from dataclasses import replace

from ..case import Case
from . import decoder_step
from .decoder import Sizes

LAYERS, WIDTHS, RANKS = (1, 2, 8), (64, 128, 512), (4, 64, 256)


def wide(width: int, sizes: Sizes = decoder_step.SIZES) -> Sizes:
    """Return sizes of this width with the same proportions: heads of one size."""
    hidden = sizes.hidden * width // sizes.width
    return replace(sizes, width=width, hidden=hidden, heads=width // sizes.head)


def cases() -> tuple[Case, ...]:
    """Return the cases of each axis, all else as in ``decoder_step``."""
    base = decoder_step.SIZES
    found = {
        **{f"{n}_layers": decoder_step.case(replace(base, layers=n)) for n in LAYERS},
        **{f"width_{n}": decoder_step.case(wide(n)) for n in WIDTHS},
        **{f"rank_{n}": decoder_step.case(base, n) for n in RANKS},
    }
    return tuple(
        replace(case, name=f"decoder_{name}", memory=False, rounds=20)
        for name, case in found.items()
    )
