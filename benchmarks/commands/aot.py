"""``python -m benchmarks aot``: compile a training step for an accelerator that is not here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lora_jax.core.errors import raise_all
from lora_jax.core.io.atomic_files import write_atomic

from ..aot import facts, targets
from ..aot.compiling import compile_apart
from ..aot.facts import Request
from ..case import BenchmarkError
from ..show.tables import console


@dataclass(frozen=True)
class AotOptions(Request):
    """Compile a training step ahead of time and report memory, FLOPs and collectives.

    These are compile-time facts, not measurements: nothing runs. Exit status 1 if it does not fit.

    Args:
        target: a TPU and its grid (v5e:2x2, v6e:1x1, v5p:2x2x1, tpu7x:2x2x1), a GPU and how many
            (h100, h100x8, a100x4), or cpu:4.
        model: the decoder's sizes.
        tokens: on each device.
        length: of a sequence.
        rank: of the pairs of all seven linears.
        full: train everything instead, for comparison.
        data: copies of the weights; the rest of the devices hold one in parts. As many as hosts on
            GPUs, else one, when not given.
        optimization: how hard XLA tries. O0 compiles large models ten times as fast, with nearly
            the same memory; "default" is what a run does.
        json: also write every figure to this file.
    """

    json: Path | None = None


def main(options: AotOptions) -> int:
    """Compile, print the tables and write the JSON; 1 if the step does not fit."""
    _check(options)
    request = Request(**{name: getattr(options, name) for name in Request.__dataclass_fields__})
    with Console(stderr=True).status(f"compiling {options.model} for {options.target}"):
        found = compile_apart(request)
    console().print(facts.render(found))
    if options.json is not None:
        content = json.dumps(facts.to_json(found), indent=2) + "\n"
        write_atomic({options.json: content.encode()})
    return 0 if found.fits else 1


def _check(options: AotOptions) -> None:
    problems = []
    try:
        targets.parse(options.target).mesh(options.data)
    except BenchmarkError as error:
        problems.append(str(error))
    if options.rank < 1:
        problems.append(f"rank: got {options.rank}, wanted at least 1")
    if options.length < 2:
        problems.append(f"length: got {options.length}, wanted at least 2")
    elif options.tokens < 1 or options.tokens % options.length:
        problems.append(
            f"tokens: got {options.tokens}, wanted a multiple of the length, {options.length}"
        )
    if options.json is not None and not options.json.absolute().parent.is_dir():
        problems.append(f"json: got {options.json}, wanted a file in an existing directory")
    raise_all(BenchmarkError, "these options cannot be used", problems)
