"""The peak memory of one contestant: ``python -m benchmarks.measure.memory``, its own process.

In a process shared with others a peak is anybody's. Linux keeps the peak of the resident memory
for each process; devices that have memory of their own tell theirs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ..case import BenchmarkError, Case
from . import apart

# Enough for everything to be allocated, and the first step's compiler to be gone.
STEPS = 3


@dataclass(frozen=True)
class Peak:
    """Bytes of one process.

    Args:
        base: resident after the libraries were imported, before anything was set up.
        compiled: the peak until the first step had ended, in which compilers work.
        peak: the peak over the later steps, where the system can start counting anew; else
            the peak of all.
        device: the peak on the accelerator; none where there is none that tells.
    """

    base: int
    compiled: int
    peak: int
    device: int | None = None


def measure(case: Case, contestant: str) -> Peak:
    """Return the peak of a contestant, run in a process of its own.

    Raises:
        BenchmarkError: the process failed; its last lines are in the message.
    """
    about = f"{case.name}: memory of {contestant}: the process"
    return Peak(**apart.run("benchmarks.measure.memory", case.name, contestant, about=about))


def resident_peak() -> int | None:
    """Return the most bytes that were resident in this process; none where nobody tells."""
    return _status("VmHWM")


def resident() -> int | None:
    """Return the bytes resident in this process; none where nobody tells."""
    return _status("VmRSS")


def _status(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None


def _forget_the_peak() -> None:
    """Start counting the peak anew, where the kernel lets a process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def exclusive() -> bool:
    """Tell whether the device serves one process at a time, so that no other can be measured."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.default_backend() == "tpu"


def _device_peak() -> int | None:
    """Return the most bytes on any one device, of JAX or of PyTorch, whichever held more.

    The one that does not do the work may still have loaded, and holds little or nothing.
    """
    found = []
    if (jax := sys.modules.get("jax")) is not None:
        stats = (device.memory_stats() or {} for device in jax.local_devices())
        found += [int(one["peak_bytes_in_use"]) for one in stats if "peak_bytes_in_use" in one]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found += [int(torch.cuda.max_memory_allocated(n)) for n in range(torch.cuda.device_count())]
    return max(found, default=0) or None


def observe(case: Case, contestant: str) -> Peak:
    """Return the peak of a contestant in this process, which should do nothing else.

    Raises:
        BenchmarkError: there is no such contestant, or the system does not tell.
    """
    chosen = [one for one in case.contestants if one.name == contestant]
    base = resident()
    if not chosen or base is None:
        why = "the system does not tell" if chosen else f"no contestant {contestant!r}"
        raise BenchmarkError(f"{case.name}: memory cannot be measured: {why}")
    work = chosen[0].setup()
    work.prepare()
    work.step()
    compiled = resident_peak() or 0
    _forget_the_peak()
    for _ in range(STEPS):
        work.prepare()
        work.step()
    return Peak(base, compiled, resident_peak() or 0, _device_peak())


def main() -> None:
    """Print the peak of the contestant that the arguments name, as JSON."""
    from ..cases import CASES

    name, contestant = sys.argv[1:]
    print(json.dumps(asdict(observe(CASES[name], contestant))))


if __name__ == "__main__":
    main()
