"""Lists of records from TOML, every bad entry named."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from lora_jax.core.errors import raise_all

from ..case import BenchmarkError

T = TypeVar("T")

# A field's TOML types by its annotation; a figure may be written without a point.
TYPES: Mapping[str, tuple[type, ...]] = {
    "datetime.date": (datetime.date,),
    "str": (str,),
    "float": (float, int),
    "bool": (bool,),
    "list[str]": (list,),
}


def parse(text: str, kind: type[T], name: str) -> list[T]:
    r"""Return the records of a text that holds ``[[name]]`` tables and nothing else.

    Args:
        text: TOML.
        kind: a dataclass whose fields are annotated by the names in ``TYPES``.
        name: of the tables.

    Raises:
        BenchmarkError: this is no TOML, or entries miss fields, have others or of other types.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Run:
    ...     steps: float
    >>> parse("[[run]]\nsteps = 3", Run, "run")
    [Run(steps=3)]
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BenchmarkError(f"the {name}s are no TOML: {error}") from error
    entries = content.pop(name, [])
    problems = [f"got {other!r}, wanted only [[{name}]]" for other in content]
    if not isinstance(entries, list):
        problems, entries = [*problems, f"{name}: got one table, wanted [[{name}]]"], []
    for place, entry in enumerate(entries, 1):
        problems += [f"{name} {place}: {problem}" for problem in _problems(entry, kind)]
    raise_all(BenchmarkError, f"the {name}s cannot be used", problems)
    return [kind(**entry) for entry in entries]


def _problems(entry: Any, kind: type) -> list[str]:
    if not isinstance(entry, dict):
        return [f"got {entry!r}, wanted a table"]
    wanted = {field.name: TYPES[str(field.type)] for field in fields(kind)}
    optional = {field.name for field in fields(kind) if field.default is not MISSING}
    found = [f"{name}: not known" for name in entry if name not in wanted]
    for name, types in wanted.items():
        if name not in entry:
            found += [f"{name}: missing"] * (name not in optional)
        elif type(entry[name]) not in types:
            found.append(f"{name}: got {entry[name]!r}, wanted a {types[0].__name__}")
        elif types[0] is float and not entry[name] > 0:
            found.append(f"{name}: got {entry[name]!r}, wanted more than 0")
        elif types[0] is str and not entry[name].strip():
            found.append(f"{name}: is empty")
        elif types[0] is list and not all(isinstance(one, str) for one in entry[name]):
            found.append(f"{name}: got {entry[name]!r}, wanted strings")
    return found
