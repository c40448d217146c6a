"""Commands in children of their own: how long they take, how much memory, and who they are.

A runner imports the package once and forks for each command, so that a case costs no new start,
and reads the peak of its own memory at the end, which a grandchild of pytest could not tell.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MIB = 1 << 20

# What lets root read and write whatever the modes say: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH.
_OVERRIDING = 1 << 1 | 1 << 2
_VERSION = 0x20080522  # of the structure that Linux keeps them in


@dataclass(frozen=True)
class Measured:
    """What a command did.

    Args:
        code: its exit status.
        seconds: how long it took.
        peak: bytes of memory at most, those of the imported package included.
        out: standard output.
        err: standard error.
    """

    code: int
    seconds: float
    peak: int
    out: str
    err: str


def run(
    commands: Mapping[str, Sequence[str]],
    directory: Path,
    *,
    bound: bool = False,
    limit: float = 60.0,
) -> dict[str, Measured]:
    """Run commands of ``lora-jax``, one after the other, each in a process of its own.

    Args:
        commands: their arguments by a name.
        directory: where they run.
        bound: whether modes bind them, which mean nothing to root.
        limit: seconds that each may take; then it is killed, with the code -9.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "LORA_JAX_OFFLINE": "1",
        "LORA_JAX_CACHE": str(directory / "cache"),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    given = {
        "commands": {name: list(argv) for name, argv in commands.items()},
        "bound": bound and os.geteuid() == 0,
        "limit": limit,
    }
    with tempfile.TemporaryFile() as said:
        said.write(json.dumps(given).encode("utf-8", "surrogatepass"))
        said.seek(0)
        done = subprocess.run(
            [sys.executable, "-m", "parity_tests.cli.measured"],
            stdin=said,
            capture_output=True,
            env=environment,
            cwd=directory,
        )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return {name: Measured(**one) for name, one in json.loads(done.stdout).items()}


@contextmanager
def frugal(what: object, seconds: float = 10.0, memory: int = 1 << 30) -> Iterator[None]:
    """Hold what is done to so many seconds and so much more memory, in this process.

    Args:
        what: it is, for the message.
        seconds: on the clock, waiting included.
        memory: bytes beside what the process has before.
    """
    # The kernel's mark of the peak starts anew.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    began, before = time.monotonic(), _peak()
    yield
    took, more = time.monotonic() - began, _peak() - before
    assert took < seconds, f"{what}: {took:.1f} s"
    assert more < memory, f"{what}: {more:,} bytes"


def _peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _heed_modes() -> None:
    """Give up what root has over others, and stay its user: Python may be in root's own folder."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:
        sets[0] &= ~_OVERRIDING
        sets[1] &= ~_OVERRIDING
        if libc.capset(header, sets) == 0:
            return
    raise OSError(ctypes.get_errno(), "the rights of root cannot be given up")


def _child(argv: list[str], files: list[int], bound: bool) -> None:
    from lora_jax.cli.main import main

    out, err, report = files
    os.dup2(out, 1)
    os.dup2(err, 2)
    if bound:
        _heed_modes()
    began = time.monotonic()
    code = main(argv)
    sys.stdout.flush()
    fields = {"code": code, "seconds": time.monotonic() - began, "peak": _peak()}
    os.write(report, json.dumps(fields).encode())


def _measured(argv: list[str], bound: bool, limit: float) -> dict[str, object]:
    streams = [tempfile.TemporaryFile() for _ in range(3)]
    began = time.monotonic()
    if not (child := os.fork()):
        try:
            _child(argv, [one.fileno() for one in streams], bound)
        except BaseException as error:
            os.write(2, f"Traceback: {error!r}".encode())
        finally:
            os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() - began > limit:
            os.kill(child, 9)
        time.sleep(0.005)
    contents = []
    for stream in streams:
        stream.seek(0)
        contents.append(stream.read())
    out, err, report = contents
    seconds = time.monotonic() - began
    fields = json.loads(report or json.dumps({"code": -9, "seconds": seconds, "peak": 0}))
    return fields | {"out": out.decode(errors="replace"), "err": err.decode(errors="replace")}


def _runner() -> None:
    given = json.loads(sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
    import lora_jax.cli.main

    assert lora_jax.cli.main
    results = {
        name: _measured(argv, given["bound"], given["limit"])
        for name, argv in given["commands"].items()
    }
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    _runner()
