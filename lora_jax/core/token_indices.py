"""What numbers of rows must be, in ``trainable_token_indices`` and for the rows themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def problems(indices: Iterable[Any], size: int | None = None) -> list[str]:
    """Return what is wrong with the numbers of rows of an axis of this size.

    PEFT reads a row from the end for −1 when it starts and fails when it runs, and with a row
    said twice it is open which of the two values counts; neither is let in here.

    >>> problems([3, 1, 3]), problems([0, 5], size=5), problems([])
    (['3 is said twice'], ['5 is not below 5'], ['none is given'])
    """
    given = list(indices)
    good = [n for n in given if type(n) is int and n >= 0]
    found = [] if given else ["none is given"]
    found += [f"{n!r} is no number from 0" for n in given if type(n) is not int or n < 0]
    found += [f"{n} is said twice" for n, times in Counter(good).items() if times > 1]
    if size is not None:
        found += [f"{n} is not below {size}" for n in dict.fromkeys(good) if n >= size]
    return found


def as_tuples(given: Any) -> Any:
    """Return lists as tuples, in a mapping, too; what is neither stays for ``token_problems``."""
    if isinstance(given, Mapping):
        return {name: as_tuples(tokens) for name, tokens in given.items()}
    return tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else given


def token_problems(given: Any) -> list[str]:
    """Return what is wrong with ``trainable_token_indices``, once ``as_tuples`` has seen them.

    >>> token_problems({"wte": (3,), "lm_head": 7})
    ["trainable_token_indices['lm_head']: got 7, wanted a list of tokens"]
    """
    name_of = "trainable_token_indices"
    if given is None:
        return []
    if not isinstance(given, Mapping):
        by_name = {name_of: given}
    else:
        by_name = {f"{name_of}[{name!r}]": tokens for name, tokens in given.items()}
    found = [] if by_name else [f"{name_of}: got {{}}, wanted tokens by module name"]
    if isinstance(given, Mapping):
        nameless = [name for name in given if not (isinstance(name, str) and name)]
        found += [f"{name_of}: got {name!r}, wanted the name of a module" for name in nameless]
    for name, tokens in by_name.items():
        if isinstance(tokens, tuple):
            found += [f"{name}: {problem}" for problem in problems(tokens)]
        else:
            found.append(f"{name}: got {tokens!r}, wanted a list of tokens")
    return found
