"""A compiled program's text, as far as the benchmarks read it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)")
_CALLED_SEVERAL = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        name: which no other one of its program has.
        type: of its result, as XLA writes it.
        opcode: what it does.
        rest: its operands and everything after them.
    """

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        depth, end = 1, len(self.rest)
        for n, letter in enumerate(self.rest):
            depth += {"(": 1, ")": -1}.get(letter, 0)
            if not depth:
                end = n
                break
        return re.findall(r"%([\w.-]+)", self.rest[:end])

    @property
    def called(self) -> Iterable[str]:
        """The names of the computations that it runs."""
        yield from _CALLED.findall(self.rest)
        for several in _CALLED_SEVERAL.findall(self.rest):
            yield from (name.strip().lstrip("%") for name in several.split(","))


@dataclass
class Program:
    """A program: its computations' instructions by name, and which of them is the entry."""

    entry: str = ""
    computations: dict[str, list[Instruction]] = field(default_factory=dict)


def parse(text: str) -> Program:
    """Return the program that ``compiled.as_text()`` wrote; lines that are none are passed over.

    >>> program = parse('''ENTRY %main (p: f32[4]) -> f32[4] {
    ...   %p = f32[4]{0} parameter(0)
    ...   ROOT %n = f32[4]{0} negate(%p)
    ... }''')
    >>> [(one.opcode, one.operands) for one in program.computations[program.entry]]
    [('parameter', []), ('negate', ['p'])]
    """
    program, body = Program(), list[Instruction]()
    for line in text.splitlines():
        if header := _HEADER.match(line):
            body = program.computations.setdefault(header[2], [])
            if header[1]:
                program.entry = header[2]
        elif found := _INSTRUCTION.match(line):
            body.append(Instruction(*found.groups()))
    return program
