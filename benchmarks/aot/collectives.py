"""The collectives of a compiled program, read from its text: how often they run, and their bytes.

A loop's body stands there once and runs many times; a compiler may write one collective in several
places, under one channel; an asynchronous one is a start and a done.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..measure.hlo import Instruction, Program, parse

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_BITS = {"pred": 8, "s4": 4, "u4": 4}


@dataclass(frozen=True)
class Collective:
    """All runs of one kind in one step, on one device.

    Args:
        kind: as XLA names it.
        count: how often one runs.
        bytes: of all of them, the larger of what goes in and what comes out.
    """

    kind: str
    count: int
    bytes: int


def collectives(text: str) -> tuple[list[Collective], tuple[str, ...]]:
    """Return the collectives of a program by kind, and notes on what could not be read.

    Args:
        text: an optimised program, as ``compiled.as_text()`` returns it.

    >>> program = '''ENTRY %main (p: f32[4]) -> f32[8] {
    ...   %p = f32[4]{0} parameter(0)
    ...   ROOT %g = f32[8]{0} all-gather(%p), channel_id=1, dimensions={0}
    ... }'''
    >>> collectives(program)
    ([Collective(kind='all-gather', count=1, bytes=32)], ())
    """
    program, notes = parse(text), set[str]()
    runs = _runs(program, notes)
    # By channel, as clones of one collective share it; without a channel each is its own.
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for name, instructions in program.computations.items():
        types = {one.name: one.type for one in instructions}
        for one in instructions:
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS or not runs.get(name):
                continue
            channel = re.search(r"channel_id=(\d+)", one.rest)
            key = (kind, channel[1] if channel else f"{name}/{one.name}")
            found[key] = max(found.get(key, (0, 0)), (runs[name], _moved(one, types)))
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for (kind, _), (times, size) in found.items():
        totals[kind][0] += times
        totals[kind][1] += times * size
    return [Collective(k, *totals[k]) for k in sorted(totals)], tuple(sorted(notes))


def size_of(type_: str) -> int:
    """Return the bytes of a type as XLA writes it, a tuple's elements together.

    >>> size_of("(bf16[8,64]{1,0:T(8,128)(2,1)}, f32[])"), size_of("s4[3]")
    (1028, 2)
    """
    return sum(_sizes(type_))


def _sizes(type_: str) -> Iterator[int]:
    for dtype, dims in _ARRAY.findall(type_):
        bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["0"])[0])
        yield math.ceil(bits * math.prod(int(n) for n in dims.split(",") if n) / 8)


def _runs(program: Program, notes: set[str]) -> Mapping[str, int]:
    """Return how often each computation runs in one run of the entry."""
    runs: dict[str, int] = defaultdict(int)

    def enter(name: str, times: int) -> None:
        runs[name] += times
        for one in program.computations.get(name, ()):
            repeats = _trips(one, program, notes) if one.opcode == "while" else 1
            for callee in _callees(one):
                enter(callee, times * repeats)

    enter(program.entry, 1)
    return runs


def _callees(one: Instruction) -> Iterable[str]:
    if one.opcode.endswith(("-done", "-update")):
        return
    yield from one.called


def _trips(loop: Instruction, program: Program, notes: set[str]) -> int:
    """Return how often a loop runs: as XLA states it, or what its counter is compared to."""
    if stated := _TRIPS.search(loop.rest):
        return int(stated[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    body = program.computations.get(condition[1], ()) if condition else ()
    bounds = {
        int(one.rest.partition(")")[0])
        for one in body
        if one.opcode == "constant" and one.type.startswith(("s32[]", "u32[]", "s64[]"))
    }
    if len(bounds) == 1:
        return bounds.pop()
    notes.add("a loop whose number of steps the program does not state is counted as one step")
    return 1


def _moved(one: Instruction, types: Mapping[str, str]) -> int:
    operands = sum(size_of(types.get(name, "")) for name in one.operands)
    result = size_of(one.type)
    if one.opcode in ("all-gather-start", "collective-permute-start"):
        # Its result holds the operands, too.
        result -= operands
    return max(operands, result)
