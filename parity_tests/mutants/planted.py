"""Bugs planted in the source text, one at a time, and the default tests that must find each.

The parity checks have a gate of their own (``lora_jax.parity.mutants.gate``); this one is about the
project's tests. Each bug is one line that a user would feel. Its test runs in a process of its own
on a copy of the project with that line changed. As every process would otherwise import JAX,
PyTorch and PEFT for seconds, one server imports them and forks; the project itself is imported
after the fork. ``python -m parity_tests.mutants.planted NAME …`` runs some by hand, and
``--clean 200`` the tests alone, so many times, each round with another seed: nothing may fail.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The variable by which a server knows its seed.
SEED = "PLANTED_SEED"


@dataclass(frozen=True)
class Planted:
    """A bug.

    Args:
        name: in a few words, what goes wrong.
        area: of the product.
        file: below ``lora_jax``; empty for the code as it is.
        old: what stands there, once.
        new: what stands there instead.
        test: of the default run, which must fail: ``test_x.py::test_y``.
    """

    name: str
    area: str
    file: str
    old: str
    new: str
    test: str

    def __str__(self) -> str:
        return self.name

    @property
    def problem(self) -> str:
        """Why it cannot be planted in the source as it is; empty where it can."""
        if not self.file:
            return ""
        count = (ROOT / "lora_jax" / self.file).read_text("utf-8").count(self.old)
        if self.old == self.new:
            return "changes nothing"
        return "" if count == 1 else f"{self.file} holds {self.old!r} {count} times"


def rows(area: str, *given: tuple[str, str, str, str, str]) -> tuple[Planted, ...]:
    """Return the bugs of one area, each ``(name, file, old, new, test)``."""
    return tuple(Planted(name, area, *rest) for name, *rest in given)


FOUND, SURVIVES = "found", "survives"


@dataclass(frozen=True)
class Fate:
    """What became of a bug: ``found``, ``survives`` or what kept the test from telling."""

    name: str
    said: str
    seconds: float
    output: str = ""

    @property
    def found(self) -> bool:
        """Whether a test failed."""
        return self.said == FOUND


class Server:
    """A process that has imported what takes seconds, and forks for every bug.

    Args:
        seed: decides the order of sets there, as ``PYTHONHASHSEED`` does, and moves what
            ``numpy.random.default_rng`` draws; None for any order and the tests' own draws.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def __enter__(self) -> Server:
        self._cache = tempfile.TemporaryDirectory()
        self._said = tempfile.TemporaryFile("w+")
        own = {} if self.seed is None else dict.fromkeys((SEED, "PYTHONHASHSEED"), str(self.seed))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "parity_tests.mutants.planted_server"],
            cwd=ROOT,
            env=_environment(self._cache.name) | own,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )
        return self

    def __exit__(self, *_: object) -> None:
        # Without further lines it ends.
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._said.close()
        self._cache.cleanup()

    def plant(self, bugs: Iterable[Planted]) -> list[Fate]:
        """Run the test of every bug with the bug planted, one after the other."""
        return list(map(self.fate, bugs))

    def fate(self, bug: Planted) -> Fate:
        """Run the test of a bug with the bug planted."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(asdict(bug)), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            self._said.seek(0)
            raise RuntimeError(f"the server of planted bugs failed:\n{self._said.read()}")
        return Fate(**json.loads(line))


Tell = Callable[[Fate], None]


def plant(
    bugs: Sequence[Planted], processes: int = 1, tell: Tell = lambda fate: None
) -> list[Fate]:
    """Run the test of every bug with the bug planted, in so many servers at once."""
    # Each takes the next one that is left, so that they end together.
    left, fates = deque(enumerate(bugs)), {}

    def serve(_: int) -> None:
        with Server() as server:
            while True:
                try:
                    n, bug = left.popleft()
                except IndexError:
                    return
                fates[n] = server.fate(bug)
                tell(fates[n])

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(serve, range(processes)))
    return [fates[n] for n in range(len(bugs))]


def _environment(directory: str) -> dict[str, str]:
    """Return the variables of the server: the project at hand, and one compilation cache."""
    cached = {
        "JAX_COMPILATION_CACHE_DIR": directory,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    # An outer pytest-xdist would make the inner pytest a worker of it.
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return cached | own | {"PYTHONPATH": str(ROOT)}


def distinct(bugs: Iterable[Planted]) -> list[Planted]:
    """Return the code as it is once for each of their tests: none of them may fail."""
    tests = dict.fromkeys(test for bug in bugs for test in bug.test.split())
    return [Planted(test, "the code as it is", "", "", "", test) for test in tests]


def clean(
    bugs: Sequence[Planted], runs: int, processes: int = 1, tell: Tell = lambda fate: None
) -> list[Fate]:
    """Run the tests on the code as it is so many times, with another seed in each round.

    Returns:
        What the test said in each run, its name and the seed: ``found`` is a false alarm.
    """
    own = distinct(bugs)
    rounds = [own[: runs - start] for start in range(0, runs, len(own))]

    def serve(seed: int) -> list[Fate]:
        with Server(seed) as server:
            fates = []
            for bug in rounds[seed]:
                fates.append(replace(server.fate(bug), name=f"{bug.name}, seed {seed}"))
                tell(fates[-1])
            return fates

    with ThreadPoolExecutor(processes) as pool:
        return [fate for several in pool.map(serve, range(len(rounds))) for fate in several]


def main(argv: Sequence[str]) -> int:
    """Run the bugs of the table whose names hold one of the words."""
    from parity_tests.mutants.planted_table import PLANTED

    parser = argparse.ArgumentParser("python -m parity_tests.mutants.planted", description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of names; without any, all bugs")
    parser.add_argument("--processes", type=int, default=1, help="how many run at once")
    parser.add_argument(
        "--clean", type=int, metavar="RUNS", help="run their tests without a bug, so many times"
    )
    given = parser.parse_args(argv)
    words = given.words
    chosen = [bug for bug in PLANTED if not words or any(word in str(bug) for word in words)]

    def tell(fate: Fate) -> None:
        print(f"{fate.name}: {fate.said} ({fate.seconds} s)", flush=True)

    if given.clean:
        fates = clean(chosen, given.clean, given.processes, tell)
        bad = [fate for fate in fates if fate.said != SURVIVES]
        alarms = sum(fate.found for fate in bad)
        print(f"{len(fates)} clean runs: {alarms} false alarms, {len(bad) - alarms} no verdict")
    else:
        fates = plant(chosen, given.processes, tell)
        bad = [fate for fate in fates if not fate.found]
        print(f"{len(fates)} bugs: {len(fates) - len(bad)} found")
    for fate in bad:
        print(f"\n{fate.name}\n{fate.output}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
