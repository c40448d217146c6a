"""Devices that have memory and published peaks of their own, without one."""

from __future__ import annotations

import dataclasses
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks.aot import targets
from benchmarks.case import Case, Contestant, Unsupported, Work
from benchmarks.commands import run as run_command
from benchmarks.contestants import common
from benchmarks.measure import limits, memory
from benchmarks.measure.harness import Result, Timing


@dataclasses.dataclass
class FakeDevice:
    peak: int | None
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"

    def memory_stats(self):
        return None if self.peak is None else {"peak_bytes_in_use": self.peak, "bytes_in_use": 1}


def fake_torch(*peaks):
    cuda = types.SimpleNamespace(
        is_available=lambda: bool(peaks),
        device_count=lambda: len(peaks),
        max_memory_allocated=lambda n: peaks[n],
        synchronize=lambda: None,
    )
    return types.SimpleNamespace(cuda=cuda, set_num_threads=lambda n: None)


@pytest.mark.parametrize(
    ("jax_peaks", "torch_peaks", "peak"),
    [
        ([None], (), None),
        ([7, 9], (), 9),
        ([0], (5, 8), 8),
        ([3], (), 3),
        ([9], (0,), 9),
        ([0], (), None),
    ],
)
def test_the_peak_of_a_device_is_that_of_who_used_it(jax_peaks, torch_peaks, peak, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: list(map(FakeDevice, jax_peaks)))
    monkeypatch.setitem(sys.modules, "torch", fake_torch(*torch_peaks))
    case = Case("c", "", (Contestant("a", lambda: Work(lambda: 1.0)),), 0.0)
    if memory.resident() is None:
        pytest.skip("this system does not tell")
    assert memory.observe(case, "a").device == peak


def test_the_memory_of_others_is_not_asked_of_a_device_that_serves_one(monkeypatch):
    case = Case("c", "", (Contestant("a", lambda: Work(lambda: 1.0)),), 0.0)
    result = Result("c", "", 0.0, 0.0, 1, (Timing("a", {}, {}, 0.0),), None)
    asked = []
    measured = memory.Peak(1, 2, 3, 4)
    monkeypatch.setattr(memory, "measure", lambda *name: asked.append(name) or measured)
    monkeypatch.setattr(memory, "resident_peak", lambda: 1)
    found = run_command._with_memory(case, result, lambda *_: None)
    assert found.timings[0].peak_bytes == 4 and len(asked) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert run_command._with_memory(case, result, lambda *_: None) is result and len(asked) == 1


@pytest.mark.parametrize(
    ("backend", "cuda", "device"),
    [("cpu", (), "cpu"), ("cpu", (1,), "cpu"), ("gpu", (1,), "cuda"), ("gpu", (), None)]
    + [("tpu", (), None), ("tpu", (1,), None)],
)
def test_torch_runs_where_jax_does_or_not_at_all(backend, cuda, device, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    torch, waits = fake_torch(*cuda), []
    torch.cuda.synchronize = lambda: waits.append(1)
    devices, torch.set_num_threads = [], lambda threads: None
    torch.set_default_device = devices.append
    monkeypatch.setitem(sys.modules, "torch", torch)
    if device is None:
        with pytest.raises(Unsupported, match=f"no {backend} here"):
            common.torch_work(lambda: 1.0)
        return
    assert common.torch_device() == device
    assert common.torch_work(lambda: 1.0).step() == 1.0
    assert len(waits) == (device == "cuda") and set(devices) == {device} - {"cpu"}


def test_published_peaks_are_of_the_products_that_jax_computes():
    for kind in limits.PUBLISHED:
        plain, exact = limits.published(kind), limits.published(kind, "highest")
        assert exact["float32"] < plain["float32"] <= plain["bfloat16"] == exact["bfloat16"]
        assert plain.keys() == exact.keys() - {"tensorfloat32"}
    assert limits.published("TPU v4", "high")["float32"] == 275e12 / 3
    assert limits.published("NVIDIA H100 80GB HBM3", "float32")["float32"] == 67e12
    assert limits.published("cpu") == {}


@pytest.mark.parametrize("target", ["v4", "v5e", "v5p", "v6e", "tpu7x", *targets.GPUS])
def test_every_target_has_published_peaks(target):
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    names = kinds | {"tpu7x": "TPU7x"} | {key: gpu.name for key, gpu in targets.GPUS.items()}
    assert limits.published(names[target])["bandwidth"] > 1e11


@pytest.mark.parametrize("chained", [1, 3])
def test_peaks_are_those_of_the_products_that_were_computed(chained, monkeypatch):
    monkeypatch.setattr(limits, "CPU", limits.Probe(8, 64, chained))
    monkeypatch.setattr(limits, "ACCELERATOR", limits.Probe(8, 64, chained))
    kind = "NVIDIA H100 80GB HBM3"
    # PyTorch's product is timed beside on the CPU alone.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [FakeDevice(0)])

    def timed(step):
        # A chain of products of ones stays one; the last is the size, and adding counts the steps.
        found = np.asarray(step(), np.float32)
        assert np.isfinite(found).all() and found.max() <= 8
        return [2.0]

    monkeypatch.setattr(limits, "_seconds", timed)
    found = limits.measure()
    assert found.device == kind and found.published["float32"] == 494e12
    assert found.flops == {dtype: 8**3 * chained for dtype in ("float32", "bfloat16")}
    assert found.bandwidth == 4 * 64 * chained
