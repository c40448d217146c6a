"""GPUs as XLA's compiler wants them described when none is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Of every GPU here: what CUDA allows a block of threads.
_COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "shared_memory_per_block": 49_152,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
}


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, in the terms of its data sheet.

    Args:
        name: as its driver states it.
        capability: CUDA's, major and minor.
        cores: streaming multiprocessors.
        units: float32 units of a core.
        shared: bytes of shared memory of a core, of which a block may ask all but one KiB.
        cache: bytes of the second level.
        clock: in GHz.
        memory: bytes that a program may use.
        bandwidth: bytes a second.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    units: int
    shared: int
    cache: int
    clock: float
    memory: int
    bandwidth: int

    def config(self) -> str:
        """Return the description in the text format of XLA's ``GpuTargetConfigProto``."""
        info = {
            **_COMMON,
            "shared_memory_per_core": self.shared,
            "shared_memory_per_block_optin": self.shared - 1024,
            "core_count": self.cores,
            "fpus_per_core": self.units,
            "memory_bandwidth": self.bandwidth,
            "l2_cache_size": self.cache,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
        }
        major, minor = self.capability
        fields = "\n".join(f"  {name}: {value}" for name, value in info.items())
        return (
            f"gpu_device_info {{\n{fields}\n"
            f"  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
            'platform_name: "CUDA"\n'
            "dnn_version_info { major: 9 minor: 10 }\n"
            "runtime_version { major: 12 minor: 8 }\n"
            f'device_description_str: "{self.name}"\n'
        )


KIB, MIB = 2**10, 2**20

# Data sheets of A100 80GB SXM, H100 SXM, H200 SXM and B200; the memory is what drivers report.
GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 * KIB, 40 * MIB, 1.41,
        85_100_068_864, 2_039_040_000_000,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 * KIB, 50 * MIB, 1.98,
        84_942_979_072, 3_352_320_000_000,
    ),
    "h200": Gpu(
        "NVIDIA H200", (9, 0), 132, 128, 228 * KIB, 50 * MIB, 1.98,
        151_397_597_184, 4_800_000_000_000,
    ),
    "b200": Gpu(
        "NVIDIA B200", (10, 0), 148, 128, 228 * KIB, 126 * MIB, 1.965,
        191_514_411_008, 7_672_320_000_000,
    ),
}  # fmt: skip
