"""The log of optimisations that were tried, from ``attempts.toml``."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from . import listed

FILE = Path(__file__).parents[1] / "attempts.toml"


@dataclass(frozen=True)
class Attempt:
    """One optimisation.

    Args:
        date: when it was measured.
        case: on which case.
        tried: what was done.
        before: the figure without it.
        after: the figure with it.
        unit: of both; lower is better.
        kept: whether it stayed.
        why: the reason.
    """

    date: datetime.date
    case: str
    tried: str
    before: float
    after: float
    unit: str
    kept: bool
    why: str

    @property
    def change(self) -> float:
        """The gain, negative, or the loss, as a share of the figure before."""
        return self.after / self.before - 1


def parse(text: str) -> tuple[Attempt, ...]:
    """Return the attempts, by date; none from a text that holds none.

    Raises:
        BenchmarkError: as ``listed.parse`` does.

    >>> parse("")
    ()
    """
    return tuple(sorted(listed.parse(text, Attempt, "attempt"), key=lambda one: one.date))
