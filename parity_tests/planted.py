"""Bugs planted in the source text, one at a time, and the default tests that must find each.

The parity checks have a gate of their own (``lora_jax.parity.mutants``); this one is about the
project's tests. Each bug is one line that a user would feel. Its test runs in a process of its own
on a copy of the project with that line changed. As every process would otherwise import JAX,
PyTorch and PEFT for seconds, one server imports them and forks; the project itself is imported
after the fork. ``python -m parity_tests.planted NAME …`` runs some by hand, and ``--clean 200`` the
tests alone, so many times, each round with another seed: nothing may fail.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COPIED = ("lora_jax", "lora_torch_ref", "benchmarks", "parity_tests", "docs", "examples")
# Without the import hook that checks types, which takes seconds: values must tell.
OPTIONS = (
    "-o",
    "addopts=",
    "-q",
    "-x",
    "-m",
    "not slow",
    "--no-header",
    "-p",
    "no:cacheprovider",
)
# The server has imported modules before pytest could rewrite their assertions.
OPTIONS += ("-W", "ignore::pytest.PytestAssertRewriteWarning")
SECONDS = 300

# How much of pytest's output is kept, in characters.
TOLD = 3000

# What takes seconds to import and is not the project's.
HEAVY = (
    "jax",
    "jax.numpy",
    "flax.linen",
    "flax.nnx",
    "optax",
    "safetensors.numpy",
    "torch",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "peft",
    "tokenizers",
    "tyro",
    "rich.console",
    "matplotlib.pyplot",
    "hypothesis",
    "beartype",
    "jaxtyping",
    "pytest",
)


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
        return self.said == "found"


# Installed plugins take a second to load, and no test needs one.
_WITHOUT_PLUGINS = "PYTEST_DISABLE_PLUGIN_AUTOLOAD"

# The variable by which a server knows its seed.
_SEED = "PLANTED_SEED"

_SECONDS_APART = itertools.count(1)

# pytest's exit codes; all others are no verdict.
SAID = {0: "survives", 1: "found"}
BEFORE = 71


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
        own = {} if self.seed is None else dict.fromkeys((_SEED, "PYTHONHASHSEED"), str(self.seed))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "parity_tests.planted", "--serve"],
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
        return [self._fate(bug) for bug in bugs]

    def _fate(self, bug: Planted) -> Fate:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(asdict(bug)), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            self._said.seek(0)
            raise RuntimeError(f"the server of planted bugs failed:\n{self._said.read()}")
        return Fate(**json.loads(line))


def plant(bugs: Sequence[Planted], processes: int = 1) -> list[Fate]:
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
                fates[n] = server.plant([bug])[0]

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


def _serve() -> None:
    """Fork for every bug, a line of JSON, and print its fate as one."""
    _import_all()
    with _copy() as copy:
        for line in sys.stdin:
            print(json.dumps(asdict(_fate(Planted(**json.loads(line)), copy))), flush=True)


def _import_all() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in HEAVY:
            # Without one of them its tests only take longer.
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    # What is collected in a child is its own alone; pytest collects several times at its end.
    gc.freeze()


@contextlib.contextmanager
def _copy() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory).resolve()
        for name in COPIED:
            if (ROOT / name).is_dir():
                # With the times of the files, by which compiled ones stay valid.
                shutil.copytree(ROOT / name, copy / name)
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy2(path, copy / path.name)
        yield copy


def _fate(bug: Planted, copy: Path) -> Fate:
    began = time.perf_counter()
    source, log = ROOT / "lora_jax" / bug.file, copy / "log"
    if bug.problem:
        return Fate(bug.name, f"cannot be planted: {bug.problem}", 0.0)
    changed = copy / "lora_jax" / bug.file
    if bug.file:
        changed.write_text(source.read_text("utf-8").replace(bug.old, bug.new), "utf-8")
        # Python knows a compiled file by the second of its source's time and its size.
        time_of = source.stat().st_mtime + next(_SECONDS_APART)
        os.utime(changed, times=(time_of, time_of))
    try:
        code = _forked(bug, copy, log)
    finally:
        if bug.file:
            shutil.copy2(source, changed)
    said = SAID.get(code, f"no verdict: pytest ended with {code}")
    seconds = round(time.perf_counter() - began, 1)
    return Fate(bug.name, said, seconds, log.read_text("utf-8", "replace")[-TOLD:])


def _forked(bug: Planted, copy: Path, log: Path) -> int:
    """Run the bug's test in a child; return pytest's exit code, -1 for one that does not end."""
    child = os.fork()
    if not child:
        code = 70
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            code = _run(bug, copy)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1


def _run(bug: Planted, copy: Path) -> int:
    import pytest

    for name in [n for n in sys.modules if n.partition(".")[0] in COPIED]:
        del sys.modules[name]
    os.chdir(copy)
    sys.path[:] = [str(copy), *(one for one in sys.path if one not in ("", str(ROOT)))]
    os.environ["PYTHONPATH"] = str(copy)
    importlib.invalidate_caches()
    os.environ[_WITHOUT_PLUGINS] = "1"
    _draw_otherwise(int(os.environ.get(_SEED, 0)))
    tests = [f"parity_tests/{test}" for test in bug.test.split()]
    seen = _Failures()
    code = int(pytest.main([*OPTIONS, "--rootdir", str(copy), *tests], plugins=[seen]))
    # What fails before a test runs, as an import does, is no verdict.
    return BEFORE if code == 1 and not seen.count else code


def _draw_otherwise(seed: int) -> None:
    """Have ``default_rng`` draw other numbers; with the seed 0, those that a test has always."""
    import numpy as np

    drawn = np.random.default_rng
    if seed:
        np.random.default_rng = lambda own=None: drawn(own if own is None else (seed, own))


class _Failures:
    """Counts the tests that fail, fixtures included."""

    count = 0

    def pytest_configure(self) -> None:
        # The children of a test load what they need.
        del os.environ[_WITHOUT_PLUGINS]

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.count += report.failed


def distinct(bugs: Iterable[Planted]) -> list[Planted]:
    """Return the code as it is once for each of their tests: none of them may fail."""
    tests = dict.fromkeys(test for bug in bugs for test in bug.test.split())
    return [Planted(test, "the code as it is", "", "", "", test) for test in tests]


def clean(bugs: Sequence[Planted], runs: int, processes: int = 1) -> list[tuple[int, Fate]]:
    """Run the tests on the code as it is so many times, with another seed in each round.

    Returns:
        The seed of every run and what the test said: ``found`` is a false alarm.
    """
    own = distinct(bugs)
    rounds = [own[: runs - start] for start in range(0, runs, len(own))]

    def serve(seed: int) -> list[tuple[int, Fate]]:
        with Server(seed) as server:
            return [(seed, fate) for fate in server.plant(rounds[seed])]

    with ThreadPoolExecutor(processes) as pool:
        return [run for several in pool.map(serve, range(len(rounds))) for run in several]


def main(argv: Sequence[str]) -> int:
    """Serve, or run the bugs of the table whose names hold one of the words."""
    if argv and argv[0] == "--serve":
        _serve()
        return 0
    from parity_tests.planted_table import PLANTED

    parser = argparse.ArgumentParser("python -m parity_tests.planted", description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of names; without any, all bugs")
    parser.add_argument("--processes", type=int, default=1, help="how many run at once")
    parser.add_argument(
        "--clean", type=int, metavar="RUNS", help="run their tests without a bug, so many times"
    )
    given = parser.parse_args(argv)
    words = given.words
    chosen = [bug for bug in PLANTED if not words or any(word in str(bug) for word in words)]
    if given.clean:
        seen = clean(chosen, given.clean, given.processes)
        bad = [fate for _, fate in seen if fate.said != "survives"]
        for seed, fate in seen:
            print(f"{fate.name}, seed {seed}: {fate.said} ({fate.seconds} s)")
        alarms = sum(fate.found for fate in bad)
        print(f"{len(seen)} clean runs: {alarms} false alarms, {len(bad) - alarms} no verdict")
    else:
        fates = plant(chosen, given.processes)
        bad = [fate for fate in fates if not fate.found]
        for fate in fates:
            print(f"{fate.name}: {fate.said} ({fate.seconds} s)")
        print(f"{len(fates)} bugs: {len(fates) - len(bad)} found")
    for fate in bad:
        print(f"\n{fate.name}\n{fate.output}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
