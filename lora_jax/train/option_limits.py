"""What options may be at most: checked before anything of their size is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..core.errors import ConfigError, raise_all
from ..core.shown_text import shortened

TOKENS = 1 << 20
"""Tokens in a step: 100 GB and more in the smallest of models."""

STEPS = (1 << 31) - 1
"""Steps of a training, which the schedule counts in 32 bits."""

SEED = (1 << 32) - 1
EPOCHS = 1_000_000
RATE = 1e6

_DIGITS = 40


class Range(NamedTuple):
    """An option's value and the least and the most that it may be.

    Args:
        name: of the option.
        value: what was given.
        least: the least; with ``above`` the value must be more.
        most: the most.
        above: whether ``least`` itself is too little.
    """

    name: str
    value: int | float
    least: int | float
    most: int | float
    above: bool = False


def problems(ranges: Iterable[Range]) -> list[str]:
    """Return a line for every value that is out of its range.

    >>> problems([Range("epochs", 0, 1, 10), Range("rate", 0, 0, 5, True), Range("r", 1, 1, 2)])
    ['epochs: got 0, wanted 1 to 10', 'rate: got 0, wanted more than 0 and at most 5']
    """
    return [
        f"{one.name}: got {_said(one.value)}, wanted {_wanted(one)}"
        for one in ranges
        if not (one.least < one.value if one.above else one.least <= one.value)
        or not one.value <= one.most
    ]


def step_problems(batch_size: int, max_length: int) -> list[str]:
    """Return why a step of this size cannot be held, or nothing.

    >>> step_problems(16, 64), len(step_problems(1_000_000, 64))
    ([], 1)
    """
    found = problems(
        [Range("batch_size", batch_size, 1, TOKENS), Range("max_length", max_length, 1, TOKENS)]
    )
    if found or batch_size * max_length <= TOKENS:
        return found
    return [
        f"batch_size: got {batch_size} texts of max_length {max_length}, which are "
        f"{batch_size * max_length:,} tokens in a step, wanted at most {TOKENS:,}"
    ]


def check_length(max_length: int, positions: int) -> None:
    """Raise where texts would be longer than the model reads.

    Raises:
        ConfigError: names both numbers.
    """
    ranges = [Range("max_length", max_length, 1, positions)]
    raise_all(ConfigError, "the model has not as many positions", problems(ranges))


def _wanted(one: Range) -> str:
    least, most = (f"{limit:,}" for limit in (one.least, one.most))
    return f"more than {least} and at most {most}" if one.above else f"{least} to {most}"


def _said(value: int | float) -> str:
    try:
        return shortened(str(value), _DIGITS)
    except ValueError:  # Python converts no integer of more than 4,300 digits
        return f"a number of {value.bit_length():,} bits"  # pyright: ignore
