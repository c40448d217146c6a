"""The mutation gate: bugs planted in the live code, and the checks that must find each.

``gate`` plants them one by one; it fails if one survives or a clean run alarms. It needs PyTorch
and PEFT. ``python -m parity_tests.mutants`` runs it and writes ``docs/kill-matrix.md``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax

from ..reports.checks import LEVELS, Check, run_check


@dataclass(frozen=True)
class Mutant:
    """A bug.

    Args:
        name: in a few words.
        what: what it does, in one line.
        plant: makes the context in which the live code has it.
        equivalent: why it cannot be seen, for one that changes nothing; empty otherwise.
    """

    name: str
    what: str
    plant: Callable[[], AbstractContextManager[Any]]
    equivalent: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Kill:
    """What became of a mutant.

    Args:
        mutant: which one.
        check: the name of the first check that found it; empty where none did.
        level: of that check, -1 where none did.
        why: what the check said.
        common: whether each common test found it, by the test's name.
    """

    mutant: Mutant
    check: str = ""
    level: int = -1
    why: str = ""
    common: Mapping[str, bool] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it was found, or rightly was not."""
        return bool(self.check) != bool(self.mutant.equivalent)


@dataclass(frozen=True)
class KillMatrix:
    """What the gate found.

    Args:
        kills: one for each mutant.
        alarms: what the checks said of the code as it is; empty where all is well.
    """

    kills: tuple[Kill, ...]
    alarms: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every mutant that is not equivalent was found, and nothing else."""
        return bool(self.kills) and not self.alarms and all(kill.ok for kill in self.kills)

    @property
    def surviving(self) -> tuple[str, ...]:
        """The names of the mutants that should have been found and were not."""
        return tuple(k.mutant.name for k in self.kills if not k.check and not k.mutant.equivalent)

    @property
    def caught(self) -> dict[str, int]:
        """How many of the mutants that are not equivalent each common test found, and ours."""
        said = by_judge(self).values()
        names = [name for name in dict.fromkeys(n for row in said for n in row) if name != SUITE]
        return {name: sum(row.get(name, False) for row in said) for name in (*names, SUITE)}


SUITE = "this suite"


def by_judge(matrix: KillMatrix) -> dict[str, dict[str, bool]]:
    """Return whether each test found each mutant that is not equivalent, as reports have it.

    >>> from contextlib import nullcontext
    >>> kill = Kill(Mutant("halved", "s/2", nullcontext), "y", common={"loss curve": False})
    >>> by_judge(KillMatrix((kill,)))
    {'halved': {'loss curve': False, 'this suite': True}}
    """
    return {
        kill.mutant.name: {**kill.common, SUITE: bool(kill.check)}
        for kill in matrix.kills
        if not kill.mutant.equivalent
    }


Common = Callable[[], Mapping[str, bool]]


def gate(
    mutants: Sequence[Mutant],
    checks: Sequence[Check],
    *,
    common: Common | None = None,
    seed: int = 0,
    say: Callable[[str], object] = lambda line: None,
) -> KillMatrix:
    """Plant every mutant in turn and run the checks until one finds it.

    A check finds a mutant by a verdict that is not ok or by an error.

    Args:
        mutants: the bugs.
        checks: in the order in which they run; the cheap ones first.
        common: what common tests say of the live code, true where they find a bug.
        seed: of every check.
        say: is told each mutant's fate as it comes.

    >>> from contextlib import nullcontext
    >>> from lora_jax.parity.verdicts import TensorVerdict, Verdict
    >>> fine = Check("demo", 0, lambda seed: [TensorVerdict("y", Verdict.EXACT)])
    >>> matrix = gate([Mutant("none", "does nothing", nullcontext)], [fine])
    >>> matrix.ok, matrix.surviving
    (False, ('none',))
    """
    reset()
    alarms = tuple(
        f"{check}: {said}" for check in checks if (said := alarm(check, seed)) is not None
    )
    if common is not None:
        alarms += tuple(f"{name}, a common test" for name, found in common().items() if found)
    kills = []
    for mutant in mutants:
        kills.append(kill := fate(mutant, checks, common, seed))
        say(f"{mutant}: {kill.check or 'survives'}")
    reset()
    return KillMatrix(tuple(kills), alarms)


def fate(
    mutant: Mutant, checks: Iterable[Check], common: Common | None = None, seed: int = 0
) -> Kill:
    """Plant one mutant, and return what finds it."""
    reset()
    try:
        with mutant.plant():
            seen = dict(common()) if common is not None else {}
            for check in checks:
                if (said := alarm(check, seed)) is not None:
                    return Kill(mutant, check.name, check.level, said, seen)
            return Kill(mutant, common=seen)
    finally:
        reset()


def alarm(check: Check, seed: int) -> str | None:
    """Return what a check says against the live code; None where it finds nothing."""
    result = run_check(check, seed)
    if result.skipped:
        raise ImportError(f"the gate cannot do without {check}, which {result.skipped}")
    if result.error:
        return result.error.splitlines()[0]
    bad = [f"{one.name}: {one.verdict}" for one in result.tensors if not one.verdict.ok]
    if not result.tensors:
        return "no verdict at all"
    return f"{bad[0]} and {len(bad) - 1} more" if len(bad) > 1 else bad[0] if bad else None


def reset() -> None:
    """Forget everything that was compiled or traced, which a mutant may have gone into."""
    from ...rewrite import replay
    from ..suite import jax_layers
    from . import checks as extra

    replay.shared.cache_clear()
    jax_layers.reset()
    extra.reset()
    jax.clear_caches()


@contextmanager
def compiled_once() -> Iterator[None]:
    """Keep what XLA made of each program for the programs that are the same: no mutant is in it.

    JAX finds it by the whole program, so that a mutant which changes it is compiled anew.
    """
    from jax.experimental.compilation_cache import compilation_cache

    with tempfile.TemporaryDirectory() as directory:
        wanted = {
            "jax_compilation_cache_dir": directory,
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        before = {name: getattr(jax.config, name) for name in wanted}
        try:
            for name, value in wanted.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def clean_runs(checks: Sequence[Check], seeds: Iterable[int]) -> tuple[int, list[str]]:
    """Return how many runs of these checks there were, and every alarm among them."""
    found, count = [], 0
    for seed in seeds:
        for check in checks:
            count += 1
            if (said := alarm(check, seed)) is not None:
                found.append(f"{check}, seed {seed}: {said}")
    return count, found


def to_markdown(matrix: KillMatrix, note: str = "") -> str:
    """Return the page with the kill matrix, and what common tests catch beside it."""
    real = [kill for kill in matrix.kills if not kill.mutant.equivalent]
    caught = matrix.caught
    tests = list(caught)[:-1]
    levels = sorted({kill.level for kill in real if kill.check})
    lines = [
        "# What the proofs can see",
        "",
        f"{len(matrix.kills)} bugs were planted in the live code, one at a time. "
        f"The suite finds {caught['this suite']} of the {len(real)} that change anything. "
        "Each stops at the first check that finds it. The other columns are common tests of the "
        "same code, on one small model; it has no dropout, DoRA, experts or files, so that they "
        "cannot see bugs there.",
        "",
        *([note, ""] if note else []),
        "| test | found |",
        "|---|---|",
        *(f"| {name} | {count} of {len(real)} |" for name, count in caught.items()),
        "",
        "| level | found there |",
        "|---|---|",
    ]
    for level in levels:
        here = sum(kill.level == level for kill in real)
        lines.append(f"| {level}: {LEVELS[level]} | {here} |")
    lines += [
        "",
        f"| bug | what it does | found by | {' | '.join(tests)} |",
        "|---|---|---|" + "---|" * len(tests),
    ]
    for kill in matrix.kills:
        by = kill.check or (f"equivalent: {kill.mutant.equivalent}" if kill.ok else "**survives**")
        marks = (("yes" if kill.common[name] else "–") if kill.common else "" for name in tests)
        lines.append(f"| {kill.mutant.name} | {kill.mutant.what} | {by} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def gate_checks() -> tuple[Check, ...]:
    """Return the checks of the gate, cheap ones first."""
    from ..suite import layers
    from . import checks as extra

    wanted = ("LoRADense/reference exact float32, float32",)
    return (*(one for one in layers.CHECKS if one.name in wanted), *extra.CHECKS)
