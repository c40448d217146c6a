"""What compiling a step ahead of time tells; none of it was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from rich.console import Group
from rich.table import Table

from ..case import BenchmarkError
from .collectives import Collective

LABEL = "compile-time facts, not measurements: nothing ran"
MOVED = "collective", "runs in a step", "bytes on a device"
GIB = 2**30


@dataclass(frozen=True)
class Request:
    """What is compiled.

    Args:
        target: see ``targets.parse``.
        model: a key of ``model.MODELS``.
        tokens: on each device.
        length: of a sequence.
        rank: of the pairs.
        full: train everything instead.
        data: copies of the weights, see ``targets.Target.mesh``.
        optimization: XLA's level.
    """

    target: str
    model: Literal["tiny", "smollm2", "llama-8b"] = "smollm2"
    tokens: int = 2048
    length: int = 512
    rank: int = 16
    full: bool = False
    data: int | None = None
    optimization: Literal["O0", "default"] = "O0"


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Args:
        arguments: the weights, what is trained, its moments, and the tokens.
        outputs: of which ``aliased`` take the arguments' place.
        aliased: see there.
        temporaries: what the step holds between.
        peak: the most at once.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int


@dataclass(frozen=True)
class Facts:
    """What the compiler says of a step.

    Args:
        request: what was compiled.
        device: what it was compiled for.
        mesh: the sizes of its axes ``data`` and ``fsdp``.
        versions: of the compilers.
        trained: values that are trained, on all devices together.
        base: values of the model, likewise.
        flops: of a step, on one device, before XLA optimises it, every step of a scan counted.
        available: bytes of a device; none where that is not known.
        memory: none where the compiler refused, as it does on TPUs.
        needed: bytes that the compiler said it needs when it refused.
        collectives: on one device in one step.
        notes: what the figures do not cover.
    """

    request: Request
    device: str
    mesh: tuple[int, int]
    versions: dict[str, str]
    trained: int
    base: int
    flops: int
    available: float | None
    memory: Memory | None = None
    needed: float | None = None
    collectives: tuple[Collective, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> float:
        """The bytes that a device needs."""
        return self.needed or 0.0 if self.memory is None else self.memory.peak

    @property
    def fits(self) -> bool:
        """Whether a device has them."""
        return self.memory is not None and (self.available is None or self.peak <= self.available)

    @property
    def verdict(self) -> str:
        """Whether it fits, in words."""
        if self.available is None:
            return f"needs {_gib(self.peak)} of a device whose memory is not known"
        relation = "fits" if self.fits else "does not fit"
        return f"{relation}: needs {_gib(self.peak)}, has {_gib(self.available)}"


_REFUSALS = (
    r"required for HLO temporaries \(([\d.]+)(\w?)\) exceeds available HBM \(([\d.]+)(\w?)\)",
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def refused(message: str) -> tuple[float, float] | None:
    """Return the bytes needed and available of a compiler's refusal; none of another message.

    What libtpu calls temporaries there are the arguments, too.

    >>> refused("RESOURCE_EXHAUSTED: ... Used 20.00G of 15.75G hbm. Exceeded hbm capacity by")
    (21474836480.0, 16911433728.0)
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for found in filter(None, (re.search(pattern, message) for pattern in _REFUSALS)):
        needed, available = (float(found[n]) * _UNITS[found[n + 1]] for n in (1, 3))
        return needed, available
    return None


def from_json(content: Mapping[str, Any]) -> Facts:
    """Return the facts of ``to_json`` or ``dataclasses.asdict``, after a way through JSON.

    Raises:
        BenchmarkError: these are no such facts.
    """
    try:
        found = {field.name: content[field.name] for field in fields(Facts)}
        memory = found["memory"]
        return Facts(
            **found
            | {
                "request": Request(**found["request"]),
                "mesh": tuple(found["mesh"]),
                "memory": None if memory is None else Memory(**memory),
                "collectives": tuple(Collective(**one) for one in found["collectives"]),
                "notes": tuple(found["notes"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise BenchmarkError(f"these are no facts of a compilation: {error!r}") from error


def to_json(facts: Facts) -> dict[str, Any]:
    """Return every figure, its label and the verdict."""
    return {
        "label": LABEL,
        "fits": facts.fits,
        "verdict": facts.verdict,
        **asdict(facts),
    }


def render(facts: Facts) -> Group:
    """Return the tables for a console."""
    parts: list[str | Table] = [f"{title(facts)}\n{LABEL}", *_tables(facts)]
    return Group(*parts, facts.verdict, *facts.notes, versions(facts))


def title(facts: Facts) -> str:
    """Return in a line what was compiled, and for what."""
    asked, (data, fsdp) = facts.request, facts.mesh
    what = "full fine-tuning" if asked.full else f"LoRA r={asked.rank} on its seven linears"
    return (
        f"{asked.model} on {asked.target} ({facts.device}), mesh data {data} × fsdp {fsdp}: "
        f"{what}, {asked.tokens} tokens a device"
    )


def sizes(facts: Facts) -> dict[str, str]:
    """Return the figures of a device by their names."""
    memory = {} if facts.memory is None else asdict(facts.memory)
    return {name: _gib(value) for name, value in memory.items()} | {
        "FLOPs": f"{facts.flops:.3g}",
        "trained values, all devices": f"{facts.trained:,}",
        "values of the model, all devices": f"{facts.base:,}",
    }


def moved(facts: Facts) -> list[tuple[str, str, str]]:
    """Return rows for ``MOVED``: the collectives."""
    if facts.memory is None:
        return []
    return [(one.kind, str(one.count), _gib(one.bytes)) for one in facts.collectives]


def versions(facts: Facts) -> str:
    """Return the compilers' versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in facts.versions.items())


def _tables(facts: Facts) -> Iterator[Table]:
    table = Table("of a device", "", title_justify="left")
    table.columns[1].justify = "right"
    for row in sizes(facts).items():
        table.add_row(*row)
    yield table
    if found := moved(facts):
        table = Table(*MOVED)
        for row in found:
            table.add_row(*row)
        yield table


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.2f} MiB"
