"""What is measured, as data: contestants, the cases that they compete in, and what they set up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_jax.core.errors import LoraError

Arrays = Mapping[str, np.ndarray]


class BenchmarkError(LoraError):
    """A case that cannot be run, or whose contestants do not do the same work."""


class Unsupported(Exception):
    """Raised in ``setup`` by a contestant that cannot do this case's work; its text says why."""


def as_arrays(result: Any) -> Arrays:
    """Return a step's result as arrays on the host: of a number, of an array, of a mapping of them.

    >>> {name: value.shape for name, value in as_arrays({"loss": 0.5, "x": np.ones(3)}).items()}
    {'loss': (), 'x': (3,)}
    """
    named = result if isinstance(result, Mapping) else {"result": result}
    return {name: np.asarray(value, np.float64) for name, value in named.items()}


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Work:
    """What a contestant has set up.

    Args:
        step: one step of the work; it returns when the work is done, on whatever device.
        read: turns what a step returned into arrays, outside the clock.
        compile_seconds: what compiling ahead of time took; none where the first step compiles.
        flops: of a step as its own program counts them, every step of a scan counted; none where
            that is unknown.
        prepare: run before each step, outside the clock: what the step uses up or leaves behind.
        program: returns the text of the compiled program, which says what a profile's names are;
            none where it is not known.
    """

    step: Callable[[], Any]
    read: Callable[[Any], Arrays] = as_arrays
    compile_seconds: float | None = None
    flops: int | None = None
    prepare: Callable[[], Any] = _nothing
    program: Callable[[], str] | None = None


@dataclass(frozen=True)
class Contestant:
    """One implementation of a case's work.

    Args:
        name: what tables call it.
        setup: builds everything outside the timed step; imports its libraries itself.
        packages: the distributions whose versions decide its speed.
        settings: what else does, asked for after ``setup``: threads, precision, flags.
        lacks: results that it does not compute, as it is a bound and no peer.
    """

    name: str
    setup: Callable[[], Work]
    packages: tuple[str, ...] = ()
    settings: Callable[[], Mapping[str, str]] = dict
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Needed:
    """What the work costs at least, whoever does it; zeros where that is not stated.

    Args:
        flops: floating-point operations of the products that no implementation can leave out.
        bytes: what must be read and written once.
        dtype: of the products' operands, which decides the peak.
    """

    flops: int = 0
    bytes: int = 0
    dtype: str = "float32"


@dataclass(frozen=True)
class Case:
    """The same work done by several contestants; ratios are the first one's to each other's.

    Args:
        name: what ``--cases`` calls it.
        title: what is done, with its sizes and precision.
        contestants: ours first.
        tolerance: how far the results may differ, relative to the result; and the reason.
        needed: the least that the work costs.
        sizes: what varies within ``group``, such as ``{"tokens": 512}``.
        group: cases of one group differ in ``sizes`` alone; growth is fitted over them.
        checked: how many steps are compared; the results must not all be equal.
        same: the steps all return the same results, as they do not depend on each other; they
            must then not be zero.
        warm_up: untimed rounds before the timed ones.
        rounds: timed rounds, one step of each contestant in each.
        memory: measure the peak of each contestant in a process of its own.
    """

    name: str
    title: str
    contestants: tuple[Contestant, ...]
    tolerance: float
    needed: Needed = Needed()
    sizes: Mapping[str, int] = field(default_factory=dict)
    group: str = ""
    checked: int = 4
    same: bool = False
    warm_up: int = 2
    rounds: int = 20
    memory: bool = True

    @property
    def steps(self) -> int:
        """How many steps ``run`` takes, of all contestants together."""
        return len(self.contestants) * (self.checked + self.warm_up + self.rounds)
