"""The process that runs a test with a bug planted: a fork of one that has imported what is heavy.

Started by ``planted.Server``; it reads a bug from each line and prints its fate as another.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parity_tests.mutants.planted import FOUND, ROOT, SEED, SURVIVES, Fate, Planted

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


# Installed plugins take a second to load, and no test needs one.
_WITHOUT_PLUGINS = "PYTEST_DISABLE_PLUGIN_AUTOLOAD"

_SECONDS_APART = itertools.count(1)

# pytest's exit codes; all others are no verdict.
SAID = {0: SURVIVES, 1: FOUND}
BEFORE = 71


def serve() -> None:
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
    _draw_otherwise(int(os.environ.get(SEED, 0)))
    tests = [f"parity_tests/{test}" for test in bug.test.split()]
    seen = _Failures()
    # Servers that tidy one folder of temporary files disturb each other.
    places = ["--rootdir", str(copy), "--basetemp", str(copy / "temporary")]
    code = int(pytest.main([*OPTIONS, *places, *tests], plugins=[seen]))
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


if __name__ == "__main__":
    serve()
