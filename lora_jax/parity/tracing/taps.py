"""Taps by name: the places in a model where two frameworks are held to each other."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...core.errors import ParityError, raise_all
from ..tensors import Mapped, To

Shape = tuple[int, ...]

INPUT, OUTPUT = "input", "output"
# What masks attention is the least number of its dtype, so another one in float64; it is shown as
# one that is the same in every dtype, and that hides nothing beside it.
MASK = 1024.0
_CALL = re.compile(r"(.*)\[(\d+)\]")


@dataclass(frozen=True)
class Place:
    """One floating tensor that enters or leaves a module, in one of its calls.

    Args:
        name: the module's, with dots.
        kind: ``"input"`` or ``"output"``.
        index: which of its tensors of that kind.
        call: which of its calls.
    """

    name: str
    kind: str
    index: int = 0
    call: int = 0


@dataclass
class Calls:
    """Counts how often a place has been met, which tells one call from another."""

    met: Counter[tuple[str, str, int]] = field(default_factory=Counter)

    def place(self, name: str, kind: str, index: int) -> Place:
        """Return the next call's place."""
        call = self.met[name, kind, index]
        self.met[name, kind, index] += 1
        return Place(name, kind, index, call)


@dataclass(frozen=True)
class Pair:
    """A place of JAX's, what it is called, and PyTorch's place with its layout."""

    ours: Place
    label: str
    theirs: Place
    to: To


@dataclass(frozen=True)
class Unpaired:
    """A tap that was not compared: whose it is, and why."""

    side: str
    label: str
    why: str

    def __str__(self) -> str:
        return f"{self.side} {self.label}: {self.why}"


def largest(dtype_max: float) -> float:
    """Return the absolute value from which on a number only masks, for its dtype's maximum."""
    return min(1e18, dtype_max / 4)


def labels(places: Collection[Place]) -> dict[Place, str]:
    """Return what to call each place's module: with the call's number where it has several.

    >>> once, again = Place("act", OUTPUT), Place("act", OUTPUT, call=1)
    >>> labels([once]), list(labels([once, again]).values())
    ({Place(name='act', kind='output', index=0, call=0): 'act'}, ['act[0]', 'act[1]'])
    """
    several = {place.name for place in places if place.call}
    return {p: f"{p.name}[{p.call}]" if p.name in several else p.name for p in places}


def pair(
    ours: Mapping[Place, Shape], theirs: Mapping[Place, Shape], names: Mapped | None = None
) -> tuple[list[Pair], list[Unpaired]]:
    """Return JAX's places with their partners, in JAX's order, and the places without one.

    Args:
        ours: JAX's places with the shapes there.
        theirs: PyTorch's.
        names: PyTorch's name, with its layout, by JAX's, both with a call's number in brackets
            where a module is called several times; names that are alike may be left out.

    Raises:
        ParityError: lists every name that is no tap of the side it should be of.
    """
    called = labels(ours)
    if names is not None and not callable(names):
        names = {name.replace("/", "."): to for name, to in names.items()}
        _check(names, ours, theirs)
    pairs: list[Pair] = []
    unpaired: dict[tuple[str, str], Unpaired] = {}
    taken: set[Place] = set()
    for place, shape in ours.items():
        to = _to(names, place, called[place])
        partner = next((p for p in _candidates(to.name, place, theirs) if p in theirs), None)
        if partner is None:
            why = f"no {place.kind} of PyTorch's {to.name!r}"
        elif partner in taken:
            why = f"PyTorch's {to.name!r} has a partner already"
        elif (fits := _layout(to, place, shape, theirs[partner])) is None:
            why = f"{place.kind}: jax {shape}, torch {theirs[partner]}; name its layout with To"
            taken.add(partner)
        else:
            taken.add(partner)
            pairs.append(Pair(place, called[place], partner, fits))
            continue
        unpaired[f"jax {place.kind}", called[place]] = Unpaired("jax", called[place], why)
    found = [*_merged(unpaired.values())]
    rest = [name for place, name in labels(theirs).items() if place not in taken]
    reached = {name for place, name in labels(theirs).items() if place in taken}
    found += [
        Unpaired("torch", name, "no partner in JAX")
        for name in dict.fromkeys(rest)
        if name not in reached
    ]
    return pairs, found


def _to(names: Mapped | None, place: Place, label: str) -> To:
    if callable(names):
        found = names(label)
    else:
        given = names or {}
        found = given.get(label, given.get(place.name, place.name))
    return To(found) if isinstance(found, str) else found


def _candidates(name: str, place: Place, theirs: Collection[Place]) -> Iterator[Place]:
    """Yield the places that a name may mean, the likeliest first."""
    yield Place(name, place.kind, place.index, place.call)
    if numbered := _CALL.fullmatch(name):
        yield Place(numbered[1], place.kind, place.index, int(numbered[2]))
    if Place(name, place.kind, place.index, 1) not in theirs:
        yield Place(name, place.kind, place.index)


def _layout(to: To, place: Place, ours: Shape, theirs: Shape) -> To | None:
    """Return the layout that makes PyTorch's shape of JAX's; an input may have a simpler one."""
    simpler = [To(to.name, axes=to.axes), To(to.name)] if place.kind == INPUT else []
    for one in (to, *simpler):
        if one.axes is not None and sorted(one.axes) != list(range(len(ours))):
            continue
        if one.shape is not None and np.prod(one.shape) != np.prod(ours):
            continue
        if one.there(np.zeros(ours, np.int8)).shape == theirs:
            return one
    return None


def _merged(unpaired: Collection[Unpaired]) -> list[Unpaired]:
    """Return one entry for each tap, which has an input and an output."""
    whys: dict[tuple[str, str], list[str]] = {}
    for one in unpaired:
        whys.setdefault((one.side, one.label), []).append(one.why)
    return [Unpaired(side, label, "; ".join(why)) for (side, label), why in whys.items()]


def _check(
    names: Mapping[str, To | str], ours: Collection[Place], theirs: Collection[Place]
) -> None:
    known = {place.name for place in ours} | set(labels(ours).values())
    targets = {place.name for place in theirs} | set(labels(theirs).values())
    wanted = {name: to if isinstance(to, str) else to.name for name, to in names.items()}
    problems = [f"{name}: no tap of JAX's{_close(name, known)}" for name in wanted.keys() - known]
    problems += [
        f"{name}: {target!r} is no tap of PyTorch's{_close(target, targets)}"
        for name, target in wanted.items()
        if target not in targets
    ]
    raise_all(ParityError, "these names do not fit the taps", sorted(problems))


def _close(name: str, known: Collection[str]) -> str:
    found: Sequence[str] = difflib.get_close_matches(name, sorted(known), n=3)
    return f"; close: {', '.join(found)}" if found else ""
