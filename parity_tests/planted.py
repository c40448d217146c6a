"""Bugs planted in the source text, one at a time, and the default tests that must find each.

The parity checks have a gate of their own (``lora_jax.parity.mutants``); this one is about the
project's tests. Each bug is one line that a user would feel. Its test runs in a process of its own
on a copy of the project with that line changed. As every process would otherwise import JAX,
PyTorch and PEFT for seconds, one server imports them and forks; the project itself is imported
after the fork. ``python -m parity_tests.planted NAME …`` runs some by hand.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
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
    "-n",
    "0",
    "-m",
    "not slow",
    "--no-header",
    "-p",
    "no:cacheprovider",
)
# The server has imported pytest's plugins before pytest could rewrite their assertions.
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


# pytest's exit codes; all others are no verdict.
SAID = {0: "survives", 1: "found"}
BEFORE = 71


def plant(bugs: Sequence[Planted]) -> list[Fate]:
    """Run the test of every bug with the bug planted, one after the other."""
    given = json.dumps([asdict(bug) for bug in bugs])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "bugs.json"
        path.write_text(given)
        command = [sys.executable, "-m", "parity_tests.planted", "--serve", str(path)]
        told = subprocess.run(
            command, cwd=ROOT, env=_environment(directory), text=True, capture_output=True
        )
    if told.returncode:
        raise RuntimeError(f"the server of planted bugs failed:\n{told.stderr}")
    return [Fate(**json.loads(line)) for line in told.stdout.splitlines()]


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


def _serve(bugs: Iterable[Planted]) -> None:
    """Fork for every bug, and print its fate as a line of JSON."""
    _import_all()
    with _copy() as copy:
        for bug in bugs:
            print(json.dumps(asdict(_fate(bug, copy))), flush=True)


def _import_all() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in HEAVY:
            # Without one of them its tests only take longer.
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


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

    sys.dont_write_bytecode = True
    for name in [n for n in sys.modules if n.partition(".")[0] in COPIED]:
        del sys.modules[name]
    os.chdir(copy)
    sys.path[:] = [str(copy), *(one for one in sys.path if one not in ("", str(ROOT)))]
    os.environ["PYTHONPATH"] = str(copy)
    importlib.invalidate_caches()
    tests = [f"parity_tests/{test}" for test in bug.test.split()]
    seen = _Failures()
    code = int(pytest.main([*OPTIONS, "--rootdir", str(copy), *tests], plugins=[seen]))
    # What fails before a test runs, as an import does, is no verdict.
    return BEFORE if code == 1 and not seen.count else code


class _Failures:
    """Counts the tests that fail, fixtures included."""

    count = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.count += report.failed


def main(argv: Sequence[str]) -> int:
    """Serve a file of bugs, or run those of the table whose names hold one of the words."""
    if argv and argv[0] == "--serve":
        _serve(Planted(**one) for one in json.loads(Path(argv[1]).read_text()))
        return 0
    from parity_tests.planted_table import PLANTED

    chosen = [bug for bug in PLANTED if not argv or any(word in str(bug) for word in argv)]
    fates = plant(chosen)
    for fate in fates:
        print(f"{fate.name}: {fate.said} ({fate.seconds} s)")
        if not fate.found:
            print(fate.output)
    return int(not all(fate.found for fate in fates))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
