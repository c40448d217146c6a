"""Reports made of numbers alone: cases, contestants, groups, noise, skipped and failed ones."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from benchmarks.case import Needed
from benchmarks.measure.harness import Result, Timing
from benchmarks.measure.limits import Limits
from benchmarks.show.report import Report, to_json

ROUNDS = 20
UNKNOWN = Needed()
PEAKS = Limits("cpu", {"float32": 1.1e11, "bfloat16": 2.6e11}, 1.4e10)
THREADS = {"threads": "2", "matmul precision": "default"}

# How long each one takes, as a multiple of ours.
CONTESTANTS = {
    "lora_jax": 1.0,
    "PEFT eager": 1.32,
    "PEFT compiled": 1.21,
    "qwix": 1.005,
    "flax.nnx.LoRA": 0.93,
    "keras": 1.9,
}
PACKAGES = {"PEFT eager": "torch", "PEFT compiled": "torch"}

LAYERS = [
    (f"layer_{tokens}", f"layer forward + backward, {tokens} × 576 × 1536, r = 16", tokens)
    for tokens in (1, 8, 64, 512, 4096)
]
ADAPTERS = [
    (f"adapters_{count}", f"{count} adapters trained at once, 512 → 1536 → 512", count)
    for count in (1, 2, 4, 8)
]
OTHERS = [
    ("decoder_step", "SmolLM2-shaped step, r = 16 on all linears, 4 × 128 tokens, bf16 base"),
    ("merge", "merge 30 layers"),
]
HOSTILE = "<b>bold</b> & [red]text[/red] | `x`"


def report(seed: int = 0, *, slower: float = 1.0, jitter: float = 0.02) -> Report:
    """Return eleven cases with a result and one that failed; ours times ``slower``."""
    rng = np.random.default_rng(seed)

    def result(case, title, seconds, needed=UNKNOWN, **more):
        names = {
            name: factor for name, factor in CONTESTANTS.items() if name not in more["skipped"]
        }
        timings = tuple(
            _timing(rng, name, seconds * factor * (slower if name == "lora_jax" else 1), jitter)
            for name, factor in names.items()
        )
        return Result(case, title, 1e-5, 3.1e-7, 4, timings, 0.02, needed, **more)

    results = [
        result(
            name,
            title,
            3e-4 + 6e-5 * tokens**0.98,
            Needed(6 * tokens * 576 * 1536, 4 * (576 * 1536 + tokens * 2112)),
            sizes={"tokens": tokens},
            group="layer",
            skipped={},
        )
        for name, title, tokens in LAYERS
    ]
    results += [
        result(
            name,
            title,
            4e-3 * count**0.9,
            Needed(10**8 * count, 4 * 10**6 * count),
            sizes={"adapters": count},
            group="adapters",
            skipped={"keras": HOSTILE, "qwix": "it trains one adapter at a time"},
        )
        for name, title, count in ADAPTERS
    ]
    big = Needed(2 * 10**11, 6 * 10**8, "bfloat16")
    results.append(result(*OTHERS[0], 2.4, big, skipped={"keras": "keras is not installed"}))
    results.append(result(*OTHERS[1], 0.04, skipped={}))
    noisy = results[-1]
    loud = _timing(rng, "PEFT eager", 0.05, 0.4)
    results[-1] = dataclasses.replace(
        noisy, timings=tuple(loud if t.contestant == "PEFT eager" else t for t in noisy.timings)
    )
    environment = {
        "date": "2030-01-02 03:04 UTC",
        "processor": "A made-up processor",
        "cores": "2",
        "command": "python -m benchmarks run --json a.json",
    }
    failed = {"load": "load: not timed, the contestants do not do the same work: <i>why</i>"}
    return Report(environment, tuple(results), PEAKS, failed)


def written(folder: Path) -> Path:
    """Write a.json, b.json, which differs by noise alone, and slow.json; return the folder."""
    made = {"a": report(), "b": report(1), "slow": report(2, slower=1.2)}
    for name, one in made.items():
        (folder / f"{name}.json").write_bytes(to_json(one))
    return folder


def _timing(rng, name: str, seconds: float, jitter: float) -> Timing:
    series = tuple(seconds * math.exp(jitter * one) for one in rng.normal(size=ROUNDS))
    package = PACKAGES.get(name, "jax")
    compiling = None if package == "torch" else 0.4
    return Timing(
        name,
        {package: "1.2.3"},
        THREADS,
        0.5,
        compiling,
        seconds * (1 if compiling else 40),
        series,
        int(1e9 * seconds) if compiling else None,
        int((300 + 4 * seconds) * 2**20),
        200 * 2**20,
    )
