"""What the machine can do at most: its matmul peak and its bandwidth, measured in the same run.

A time alone says little about how good it is. Beside the peaks each row states its share of the
limit: the time that the work needs at the measured peaks, over the time that it took.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from ..case import Needed
from ..contestants.common import torch_ready

REPEATS = 5


@dataclass(frozen=True)
class Probe:
    """What the peaks are measured with.

    Args:
        size: of a square product, large enough to reach the peak.
        words: float32 values that no cache holds.
        chained: how many follow each other in one call, so that calling it takes no time beside.
    """

    size: int = 2048
    words: int = 1 << 26
    chained: int = 1


CPU, ACCELERATOR = Probe(), Probe(8192, 1 << 28, 20)


@dataclass(frozen=True)
class Limits:
    """The machine's peaks.

    Args:
        device: what they are of.
        flops: floating-point operations a second in a square product, by the operands' dtype.
        bandwidth: bytes a second, read and written together.
        published: what the maker states, by the same names; empty where it is not in the table.
    """

    device: str
    flops: Mapping[str, float]
    bandwidth: float
    published: Mapping[str, float] = field(default_factory=dict)

    def least(self, needed: Needed) -> float:
        """Return the seconds that the work needs at these peaks; 0 where nothing is stated.

        >>> Limits("a", {"float32": 1e9}, 1e8).least(Needed(flops=10**9, bytes=10**6))
        1.0
        """
        rate = self.flops.get(needed.dtype, 0.0)
        compute = needed.flops / rate if rate else 0.0
        return max(compute, needed.bytes / self.bandwidth if self.bandwidth else 0.0)


def _gpu(
    bfloat16: float, tensorfloat32: float, float32: float, bandwidth: float
) -> dict[str, float]:
    return {
        "bfloat16": bfloat16,
        "tensorfloat32": tensorfloat32,
        "float32": float32,
        "bandwidth": bandwidth,
    }


# What makers publish of one device: dense products in FLOP/s, and bytes/s. TPUs: the pages of each
# version at cloud.google.com/tpu/docs; a device of TPU7x is one of a chip's two cores. GPUs: the
# data sheets of A100, H100, H200 and HGX B200, those with sparsity halved.
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "TPU v4": {"bfloat16": 275e12, "bandwidth": 1.2e12},
    "TPU v5 lite": {"bfloat16": 197e12, "bandwidth": 0.82e12},
    "TPU v5": {"bfloat16": 459e12, "bandwidth": 2.765e12},
    "TPU v6 lite": {"bfloat16": 918e12, "bandwidth": 1.64e12},
    "TPU7x": {"bfloat16": 1153.5e12, "bandwidth": 3.69e12},
    "NVIDIA A100-SXM4-40GB": _gpu(312e12, 156e12, 19.5e12, 1.555e12),
    "NVIDIA A100-SXM4-80GB": _gpu(312e12, 156e12, 19.5e12, 2.039e12),
    "NVIDIA A100 80GB PCIe": _gpu(312e12, 156e12, 19.5e12, 1.935e12),
    "NVIDIA H100 80GB HBM3": _gpu(989e12, 494e12, 67e12, 3.35e12),
    "NVIDIA H100 PCIe": _gpu(756e12, 378e12, 51e12, 2e12),
    "NVIDIA H200": _gpu(989e12, 494e12, 67e12, 4.8e12),
    "NVIDIA B200": _gpu(2250e12, 1125e12, 75e12, 7.7e12),
}

# How many bfloat16 products of a TPU make one of float32, by JAX's precision; 1 where not named.
_PASSES = {"high": 3, "bfloat16_3x": 3, "tensorfloat32": 3, "highest": 6, "float32": 6}


def published(kind: str, precision: str | None = None) -> Mapping[str, float]:
    """Return what the maker states of a device, for the products that JAX computes on it.

    A TPU has no unit for float32: unless told otherwise, JAX multiplies in bfloat16 there, and in
    TensorFloat-32 on GPUs.

    Args:
        kind: as JAX names the device.
        precision: ``jax_default_matmul_precision``.

    >>> published("TPU v4")["float32"] / 1e12, published("TPU v4", "highest")["float32"] / 1e12
    (275.0, 45.833333333333336)
    """
    stated = dict(PUBLISHED.get(kind, {}))
    passes = _PASSES.get(precision or "", 1)
    if kind.startswith("TPU") and stated:
        return stated | {"float32": stated["bfloat16"] / passes}
    fast = stated.pop("tensorfloat32", None)
    return stated if fast is None or passes == 6 else stated | {"float32": fast}


def measure(dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> Limits:
    """Return the peaks of JAX's first device, in the best of a few repetitions.

    With PyTorch installed the same product is timed there, too: the peak is the better of both.
    """
    device = jax.devices()[0]
    probe = CPU if device.platform == "cpu" else ACCELERATOR
    work = 2 * probe.size**3 * probe.chained
    flops = {dtype: work / min(_product_seconds(dtype, probe)) for dtype in dtypes}
    moved = jnp.ones(probe.words, jnp.float32)
    add = jax.jit(functools.partial(_chain, lambda x: x + 1, probe.chained))
    seconds = min(_seconds(lambda: jax.block_until_ready(add(moved))))
    bandwidth = 2 * 4 * probe.words * probe.chained / seconds
    stated = published(device.device_kind, jax.config.values["jax_default_matmul_precision"])
    return Limits(device.device_kind, flops, bandwidth, stated)


def _chain(step: Callable[[Any], Any], times: int, x: Any) -> Any:
    return step(x) if times == 1 else jax.lax.fori_loop(0, times, lambda _, x: step(x), x)


def _product_seconds(dtype: str, probe: Probe) -> list[float]:
    one = jnp.ones((probe.size, probe.size), dtype)

    def product(x: jax.Array) -> jax.Array:
        wide = jnp.dot(x, one, preferred_element_type=jnp.float32)
        # The next one's operand; of ones the product is its size.
        return wide if probe.chained == 1 else (wide / probe.size).astype(dtype)

    dot = jax.jit(functools.partial(_chain, product, probe.chained))
    seconds = _seconds(lambda: jax.block_until_ready(dot(one)))
    if jax.default_backend() == "cpu":
        seconds += _torch_seconds(dtype, probe)
    return seconds


def _torch_seconds(dtype: str, probe: Probe) -> list[float]:
    try:
        torch = torch_ready()
    except ImportError:
        return []
    one = torch.ones((probe.size, probe.size), dtype=getattr(torch, dtype))
    return _seconds(lambda: one @ one)


def _seconds(step: Callable[[], Any]) -> list[float]:
    step()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return found
