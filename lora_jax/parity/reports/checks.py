"""A check of the suite, and how it is run: verdicts, time, and what went wrong."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..verdicts import TensorVerdict, Vacuous, Verdict, worst

LEVELS = {
    0: "exact mode",
    1: "layers: y, dx, dA, dB",
    2: "rewritten models: every gradient",
    3: "one optimiser step: parameters and moments",
    4: "N steps: the trajectory and its noise band",
    5: "merging, by dtype",
    6: "adapter files",
}


@dataclass(frozen=True)
class Check:
    """One comparison of the suite, repeatable with any seed.

    Args:
        name: ``subject/kind``, such as ``"LoRADense/reference fp32"``.
        level: a key of ``LEVELS``.
        run: from a seed to a verdict for every tensor.
        needs: packages without which it is skipped, and said to be.
        slow: whether it takes more than a few seconds, so that the mutation gate leaves it out.
    """

    name: str
    level: int
    run: Callable[[int], Iterable[TensorVerdict]]
    needs: tuple[str, ...] = ()
    slow: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class CheckResult:
    """What one run of a check said.

    Args:
        name: the check's.
        level: the check's.
        tensors: the verdicts; none where it was skipped or failed.
        seconds: how long it took.
        skipped: why it did not run; empty where it did.
        error: what it raised instead of a verdict; empty where it raised nothing.
    """

    name: str
    level: int
    tensors: tuple[TensorVerdict, ...] = ()
    seconds: float = 0.0
    skipped: str = ""
    error: str = ""

    @property
    def verdict(self) -> Verdict | None:
        """The worst of its verdicts; ``MISMATCH`` for an error, None where it was skipped."""
        if self.skipped:
            return None
        return Verdict.MISMATCH if self.error else worst(self.tensors)


def run_check(check: Check, seed: int = 0) -> CheckResult:
    """Run one check; whatever it raises becomes a result.

    >>> from lora_jax.parity.verdicts import TensorVerdict
    >>> one = Check("demo", 0, lambda seed: [TensorVerdict("y", Verdict.EXACT)])
    >>> run_check(one).verdict.value
    'EXACT'
    """
    missing = [name for name in check.needs if importlib.util.find_spec(name) is None]
    if missing:
        said = f"needs {', '.join(missing)}: pip install {' '.join(missing)}"
        return CheckResult(check.name, check.level, skipped=said)
    begin = time.perf_counter()
    try:
        tensors, error = tuple(check.run(seed)), ""
    except Vacuous as raised:
        tensors, error = (TensorVerdict(check.name, Verdict.VACUOUS, why=str(raised)),), ""
    except Exception as raised:  # a broken implementation raises whatever it likes
        tensors, error = (), f"{type(raised).__name__}: {raised}"
    seconds = time.perf_counter() - begin
    return CheckResult(check.name, check.level, tensors, seconds, error=error)


def run_checks(checks: Iterable[Check], seed: int = 0) -> Iterator[CheckResult]:
    """Run checks one after the other, giving each result as it comes."""
    for check in checks:
        yield run_check(check, seed)
