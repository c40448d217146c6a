"""Where figures were taken: without this they mean nothing."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_FLAGS = ("XLA_FLAGS", "JAX_PLATFORMS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def elsewhere() -> float | None:
    """Return the CPU seconds that other processes have used, this machine's host included.

    Contention slows contestants unequally, and steadily: a pool of threads that spins at its
    barriers loses far more than one that sleeps. So it must be seen, not inferred from noise.
    Only Linux tells; elsewhere the answer is none.
    """
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split()[1:11])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def describe() -> dict[str, str]:
    """Return the machine, what else it is doing, and the flags that are set."""
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": str(cores()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    if hasattr(os, "getloadavg"):
        facts["load before the run"] = f"{os.getloadavg()[0]:.2f}"
    return facts | {name: os.environ[name] for name in _FLAGS if name in os.environ}


def command(name: str, options: Any) -> str:
    """Return the command line that gives these options, those with their default left out.

    Of a file only the name is told, as its folder is nobody else's.

    >>> @dataclasses.dataclass
    ... class Options:
    ...     cases: tuple[str, ...] = ("*",)
    ...     memory: bool = True
    ...     json: Path | None = None
    >>> command("run", Options(("layer*", "merge"), False, Path("/tmp/a.json")))
    "python -m benchmarks run --cases 'layer*' merge --no-memory --json a.json"
    """
    words = ["python", "-m", "benchmarks", name]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [flag, *(one.name if isinstance(one, Path) else str(one) for one in values)]
    return shlex.join(words)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor()
    return f"{name} ({platform.machine()})"
