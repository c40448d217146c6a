"""``python -m benchmarks.aot.compiling REQUEST``: one compilation, in a process made for it.

The environment decides what JAX and the compilers see, so it must be set before either is loaded.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..measure import apart
from . import collectives, facts, targets
from .facts import Facts, Memory, Request


def compile_apart(request: Request) -> Facts:
    """Return the facts of a step, compiled in a process of its own.

    Raises:
        BenchmarkError: the target's compiler is missing, or the process failed; its last lines are
            in the message.
    """
    target = targets.parse(request.target)
    targets.require_installed(target)
    target.mesh(request.data)
    variables = targets.environment(target, request.optimization)
    about = f"{request.target}: the process that compiles"
    found = apart.run(__name__, json.dumps(asdict(request)), about=about, environment=variables)
    return facts.from_json(found)


def compile_here(request: Request) -> Facts:
    """Return the facts of a step; in a process with the target's environment."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from lora_jax.rewrite.frugality import count

    from .step import DATA, FSDP

    target = targets.parse(request.target)
    devices, axes = targets.devices(target), target.mesh(request.data)
    mesh = Mesh(np.array(devices).reshape(axes), (DATA, FSDP))
    ready, alone = (_step(request, target, on) for on in (mesh, None))
    notes = set[str]()
    flops = count(alone.fn, *alone.arguments, notes=notes) // target.devices
    known = Facts(
        request,
        devices[0].device_kind,
        axes,
        _versions(),
        ready.trained,
        ready.base,
        flops,
        target.memory,
        notes=tuple(sorted(notes)),
    )
    lowered = jax.jit(ready.fn, donate_argnums=(0, 1)).lower(*ready.arguments)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = facts.refused(str(error))
        if found is None:
            raise
        return replace(known, needed=found[0], available=found[1])
    moved, unread = collectives.collectives(program.as_text() or "")
    return replace(
        known,
        memory=_memory(program.memory_analysis(), states_peak=target.platform != "cpu"),
        collectives=tuple(moved),
        notes=(*known.notes, *unread),
    )


def _step(request: Request, target: targets.Target, mesh: Any) -> Any:
    from . import model, step

    return step.build(
        model.MODELS[request.model],
        rank=request.rank,
        rows=target.devices * request.tokens // request.length,
        length=request.length,
        full=request.full,
        mesh=mesh,
    )


def _memory(stats: Any, *, states_peak: bool) -> Memory:
    """Return the bytes that the compiler states; the CPU's states no peak of what loops hold."""
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    aliased, temporaries = stats.alias_size_in_bytes, stats.temp_size_in_bytes
    held = arguments + outputs - aliased + temporaries
    peak = stats.peak_memory_in_bytes if states_peak else held
    return Memory(arguments, outputs, aliased, temporaries, peak)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Print the facts as JSON."""
    print(json.dumps(asdict(compile_here(Request(**json.loads(sys.argv[1]))))))


if __name__ == "__main__":
    main()
