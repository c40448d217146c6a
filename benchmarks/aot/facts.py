"""What compiling a step ahead of time tells; none of it was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.console import Group
from rich.table import Table

from .collectives import Collective

LABEL = "compile-time facts, not measurements: nothing ran"
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
    model: str
    tokens: int
    length: int
    rank: int
    full: bool
    data: int | None
    optimization: str


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


def from_json(fields: dict) -> Facts:
    """Return the facts of ``dataclasses.asdict``, after a way through JSON."""
    memory = fields["memory"]
    return Facts(
        **fields
        | {
            "request": Request(**fields["request"]),
            "mesh": tuple(fields["mesh"]),
            "memory": None if memory is None else Memory(**memory),
            "collectives": tuple(Collective(**one) for one in fields["collectives"]),
            "notes": tuple(fields["notes"]),
        }
    )


def to_json(facts: Facts) -> dict:
    """Return every figure, its label and the verdict."""
    return {
        "label": LABEL,
        "fits": facts.fits,
        "verdict": facts.verdict,
        **asdict(facts),
    }


def render(facts: Facts) -> Group:
    """Return the tables for a console."""
    asked, (data, fsdp) = facts.request, facts.mesh
    what = "full fine-tuning" if asked.full else f"LoRA r={asked.rank} on its seven linears"
    head = (
        f"{asked.model} on {asked.target} ({facts.device}), mesh data {data} × fsdp {fsdp}: "
        f"{what}, {asked.tokens} tokens a device\n{LABEL}"
    )
    parts: list[str | Table] = [head, *_tables(facts), facts.verdict, *facts.notes]
    parts.append(", ".join(f"{name} {version}" for name, version in facts.versions.items()))
    return Group(*parts)


def _tables(facts: Facts) -> Iterator[Table]:
    sizes = Table("of a device", "", title_justify="left")
    sizes.columns[1].justify = "right"
    rows = {} if facts.memory is None else asdict(facts.memory)
    for name, value in rows.items():
        sizes.add_row(name, _gib(value))
    sizes.add_row("FLOPs", f"{facts.flops:.3g}")
    sizes.add_row("trained values, all devices", f"{facts.trained:,}")
    sizes.add_row("values of the model, all devices", f"{facts.base:,}")
    yield sizes
    if facts.memory is not None:
        moved = Table("collective", "runs in a step", "bytes on a device")
        for one in facts.collectives:
            moved.add_row(one.kind, str(one.count), _gib(one.bytes))
        if facts.collectives:
            yield moved


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.2f} MiB"
