"""Where a step's time goes: XLA's instructions, by what they do and to what shapes."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..case import Work
from . import hlo

STEPS = 3

# Their time is that of the instructions they run.
_OUTER = ("while", "call", "conditional")

# What a fusion does, by the first of these opcodes that is in it.
_KINDS = {
    "dot": "product",
    "convolution": "product",
    "dynamic-update-slice": "written into a stack",
    "dynamic-slice": "taken out of a stack",
    "gather": "gather",
    "scatter": "scatter",
    "sort": "sort",
    "reduce": "reduction",
    "reduce-window": "reduction",
}
_MOVES = {"copy", "transpose", "bitcast", "reshape", "slice", "concatenate", "pad", "broadcast"}
_ARRAY = re.compile(r"\b[a-z]+\d*\[[\d,]*\]")


@dataclass(frozen=True)
class Operation:
    """The instructions of one kind and of the same shapes.

    Args:
        kind: what they do, in a word or two.
        shapes: of the result and the operands; empty where the program is not known.
        count: how many run in a step.
        seconds: of all of them, in a step, on a device. Several may run at once, so that all
            operations can take longer than the step.
    """

    kind: str
    shapes: str
    count: float
    seconds: float


def profile(work: Work, steps: int = STEPS) -> tuple[Operation, ...]:
    """Return the operations of a step, the longest first; none of what JAX does not run.

    Args:
        work: what is profiled; it has taken a step already.
        steps: how many are averaged over.
    """
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(steps):
                work.prepare()
                work.step()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        devices = by_device(data)
    described = _describe(work.program)
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    share = 1 / (steps * max(len(devices), 1))
    for name, seconds in itertools.chain.from_iterable(devices):
        kind, shapes = described.get(name) or (re.sub(r"[.\d]+$", "", name), "")
        if kind not in _OUTER:
            totals[kind, shapes][0] += share
            totals[kind, shapes][1] += share * seconds
    found = (Operation(*key, round(count, 2), s) for key, (count, s) in totals.items())
    return tuple(sorted(found, key=lambda one: -one.seconds))


def by_device(data: Any) -> list[list[tuple[str, float]]]:
    """Return the runs of instructions, names and seconds, on each device.

    Where accelerators ran something the host did not: what it tells is that it launched them.

    Args:
        data: a ``jax.profiler.ProfileData``.
    """
    found = {plane.name: list(_events(plane)) for plane in data.planes}
    on_devices = [runs for name, runs in found.items() if runs and name.startswith("/device:")]
    return on_devices or [runs for runs in found.values() if runs]


def _events(plane: Any) -> Iterator[tuple[str, float]]:
    """Yield each run of an instruction: TPUs tell its text, others its name beside the event."""
    for line in plane.lines:
        for event in line.events:
            text = event.name if line.name == "XLA Ops" else dict(event.stats).get("hlo_op")
            if text and (name := re.match(r"%?([\w.-]+)", str(text))):
                yield name[1], event.duration_ns / 1e9


def _describe(text: Callable[[], str] | None) -> Mapping[str, tuple[str, str]]:
    """Return each instruction's kind and shapes by its name."""
    if text is None:
        return {}
    program, found = hlo.parse(text()), {}
    for body in program.computations.values():
        types = {one.name: one.type for one in body}
        for one in body:
            operands = (types.get(name, "") for name in one.operands)
            shapes = f"{_shape(one.type)} = {', '.join(filter(None, map(_shape, operands)))}"
            found[one.name] = (_kind(one, program), shapes)
    return found


def _kind(one: hlo.Instruction, program: hlo.Program) -> str:
    """Return what an instruction does, by the opcodes of what it fuses."""
    if one.opcode in _OUTER:
        return one.opcode
    inside = {one.opcode} | {
        inner.opcode for name in one.called for inner in program.computations.get(name, ())
    }
    if kind := next((kind for opcode, kind in _KINDS.items() if opcode in inside), None):
        return kind
    if one.opcode != "fusion":
        return one.opcode
    return "copy" if inside <= _MOVES | {"fusion", "parameter", "constant"} else "elementwise"


def _shape(type_: str) -> str:
    """Return a type without its layout."""
    return " ".join(_ARRAY.findall(type_))
