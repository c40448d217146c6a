"""The log of optimisations that were tried, from ``attempts.toml``."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_jax.errors import raise_all

from .case import BenchmarkError

FILE = Path(__file__).with_name("attempts.toml")


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


# A field's TOML types by its annotation; a figure may be written without a point.
TYPES: Mapping[str, tuple[type, ...]] = {
    "datetime.date": (datetime.date,),
    "str": (str,),
    "float": (float, int),
    "bool": (bool,),
}


def parse(text: str) -> tuple[Attempt, ...]:
    """Return the attempts, by date; none from a text that holds none.

    Raises:
        BenchmarkError: this is no TOML, or entries miss fields, have others or of other types.

    >>> parse("")
    ()
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BenchmarkError(f"the attempts are no TOML: {error}") from error
    entries = content.pop("attempt", [])
    problems = [f"got {name!r}, wanted only [[attempt]]" for name in content]
    if not isinstance(entries, list):
        problems, entries = [*problems, "attempt: got one table, wanted [[attempt]]"], []
    for place, entry in enumerate(entries, 1):
        problems += [f"attempt {place}: {problem}" for problem in _problems(entry)]
    raise_all(BenchmarkError, "the attempts cannot be used", problems)
    return tuple(sorted((Attempt(**entry) for entry in entries), key=lambda one: one.date))


def _problems(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return [f"got {entry!r}, wanted a table"]
    wanted = {field.name: TYPES[str(field.type)] for field in fields(Attempt)}
    found = [f"{name}: not known" for name in entry if name not in wanted]
    for name, types in wanted.items():
        if name not in entry:
            found.append(f"{name}: missing")
        elif type(entry[name]) not in types:
            found.append(f"{name}: got {entry[name]!r}, wanted a {types[0].__name__}")
        elif types[0] is float and not entry[name] > 0:
            found.append(f"{name}: got {entry[name]!r}, wanted more than 0")
        elif types[0] is str and not entry[name].strip():
            found.append(f"{name}: is empty")
    return found
