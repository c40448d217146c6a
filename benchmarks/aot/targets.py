"""What a step can be compiled for without being there, and what that takes."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..case import BenchmarkError
from .gpus import GPUS

GIB = 2**30

# Bytes that a program may use of a chip's memory, as the compiler states them where it refuses one;
# v4, v5p and tpu7x: the published size. A device of tpu7x is one of a chip's two cores.
TPUS: Mapping[str, float] = {
    "v4": 32 * GIB,
    "v5e": 15.75 * GIB,
    "v5p": 95 * GIB,
    "v6e": 31.25 * GIB,
    "tpu7x": 96 * GIB,
}
_CORES = {"tpu7x": 2}

EXTRAS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "tpu": ("tpu-aot", ("libtpu",)),
    "cuda": ("cuda-aot", ("jax_cuda12_plugin", "jax_plugins.xla_cuda12")),
    "cpu": ("bench", ()),
}


@dataclass(frozen=True)
class Target:
    """Devices that a program is compiled for.

    Args:
        name: as the user writes it.
        platform: ``tpu``, ``cuda`` or ``cpu``.
        kind: of the chip.
        grid: chips along each axis of a TPU's torus; of others, hosts and devices of a host.
        memory: bytes of one device; none where that is not known.
    """

    name: str
    platform: str
    kind: str
    grid: tuple[int, ...]
    memory: float | None = None

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return math.prod(self.grid) * _CORES.get(self.kind, 1)

    def mesh(self, data: int | None = None) -> tuple[int, int]:
        """Return the sizes of the mesh's axes ``data`` and ``fsdp``.

        Args:
            data: how many copies of the weights there are; as many as hosts on GPUs, which are
                linked faster within one, and else one.

        Raises:
            BenchmarkError: the devices cannot be divided so.
        """
        copies = (self.grid[0] if self.platform == "cuda" else 1) if data is None else data
        if copies < 1 or self.devices % copies:
            raise BenchmarkError(
                f"data: got {copies}, wanted a divisor of the {self.devices} devices of {self.name}"
            )
        return copies, self.devices // copies


def parse(name: str) -> Target:
    """Return the target of that name.

    >>> parse("v5e:2x2").devices, parse("tpu7x:2x2x1").devices, parse("h100x16").grid
    (4, 8, (2, 8))

    Raises:
        BenchmarkError: there is none.
    """
    chip, _, rest = name.partition(":")
    dims = tuple(int(n) for n in rest.split("x")) if re.fullmatch(r"[1-9]\d*(x\d+)*", rest) else ()
    flat = chip in ("v5e", "v6e")
    if chip in TPUS and len(dims) == (2 if flat else 3) and all(dims):
        return Target(name, "tpu", chip, dims, TPUS[chip])
    if chip == "cpu" and len(dims) == 1:
        return Target(name, "cpu", chip, (1, *dims))
    if found := re.fullmatch(r"([a-z]+\d+)(?:x([1-9]\d*))?", name):
        kind, count = found[1], int(found[2] or 1)
        if kind in GPUS and (count <= 8 or count % 8 == 0):
            grid = (1, count) if count <= 8 else (count // 8, 8)
            return Target(name, "cuda", kind, grid, GPUS[kind].memory)
    raise BenchmarkError(
        f"target: got {name!r}, wanted a TPU and its grid ({', '.join(TPUS)}; v5e:2x2, v6e:1x1, "
        f"v5p:2x2x1), a GPU and how many ({', '.join(GPUS)}; h100, h100x8, h100x16), or cpu:4"
    )


def require_installed(target: Target) -> None:
    """Raise ``BenchmarkError`` with the command that installs the target's compiler."""
    extra, modules = EXTRAS[target.platform]
    missing = [name for name in modules if not _installed(name)]
    if missing:
        raise BenchmarkError(
            f"{target.name}: {', '.join(missing)} is not installed, which compiles for it without "
            f'the hardware: pip install "lora_jax[{extra}]"'
        )


def environment(target: Target, optimization: str) -> dict[str, str]:
    """Return the variables of a process that compiles for the target and has no such device."""
    level = "UNKNOWN" if optimization == "default" else optimization
    variables = {"JAX_PLATFORMS": "cpu", "JAX_OPTIMIZATION_LEVEL": level}
    if target.platform == "tpu":
        # No questions to the metadata server of a machine in a cloud; several such processes.
        variables |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    if target.platform == "cuda":
        # Autotuning runs kernels.
        variables["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
    if target.platform == "cpu":
        variables["JAX_NUM_CPU_DEVICES"] = str(target.devices)
    return variables


def devices(target: Target) -> list[Any]:
    """Return the target's devices, for compiling alone; in a process with its ``environment``."""
    import jax
    from jax.experimental import topologies

    if target.platform == "cpu":
        return jax.devices("cpu")[: target.devices]
    if target.platform == "cuda":
        grid = "x".join(map(str, (1, *target.grid)))
        found = topologies.get_topology_desc(
            target.kind, "cuda", target_config=GPUS[target.kind].config(), topology=grid
        )
        return list(found.devices)
    x, y = target.grid[:2]
    # A host has up to four chips.
    options: dict[str, Any] = {"chips_per_host_bounds": (min(x, 2), min(y, 2), 1)}
    if target.kind == "v4":
        options["chip_config_name"] = "megacore"
    return list(topologies.get_topology_desc(target.name, "tpu", **options).devices)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
