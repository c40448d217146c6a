"""Planning and tracing, with the number of layers.

``plan`` traces the model's function from shapes and decides for every parameter; PEFT puts its
layers into a module without values. Every step plans another rank, and its result is the number
of trained values. Tracing the rewritten function is ``rewrite_trace``, here with fewer layers.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import jax

from lora_jax import plan
from lora_jax.core import paths

from ..case import Case, Contestant, Work
from ..contestants.common import jax_settings, torch_ready, torch_settings, torch_work
from . import decoder, rewrite_trace
from .decoder import Sizes

LAYERS = (2, 4, 8, 16, 30)
RANKS = (1, 2, 3, 4)


def planned(sizes: Sizes) -> Work:
    """Return the work of ``plan``, which traces a new function object at every step."""
    params, ids, turns = decoder.shapes(sizes), decoder.tokens(sizes), itertools.cycle(RANKS)

    def step() -> float:
        config = decoder.config(next(turns))
        return float(plan(decoder.decoder(sizes), params, config, ids).trainable)

    return Work(step)


def traced(sizes: Sizes) -> Work:
    """Return the work of tracing without a plan; the trained values are counted by hand."""
    params, ids, turns = decoder.shapes(sizes), decoder.tokens(sizes), itertools.cycle(RANKS)

    def step() -> float:
        jax.jit(decoder.decoder(sizes)).trace(params, ids)
        return float(next(turns) * _around(params))

    return Work(step)


def injected(sizes: Sizes) -> Work:
    """Return the work of PEFT's ``get_peft_model`` on a module without values."""
    torch = torch_ready()
    import peft

    def linears(layer: Any) -> Any:
        return torch.nn.ModuleDict(
            {
                name: torch.nn.Linear(*layer[name].shape, bias=False, device="meta")
                for name in decoder.TARGETS
            }
        )

    layers = torch.nn.ModuleList(map(linears, decoder.shapes(sizes)["layers"]))
    base, turns = torch.nn.ModuleDict({"layers": layers}), itertools.cycle(RANKS)
    ready: list[Any] = []

    def step() -> float:
        r = next(turns)
        config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(decoder.TARGETS))
        model = peft.get_peft_model(ready.pop(), config, low_cpu_mem_usage=True)
        return float(sum(p.numel() for p in model.parameters() if p.requires_grad))

    return torch_work(step, prepare=lambda: ready.append(copy.deepcopy(base)))


def _around(params: Any) -> int:
    return sum(
        sum(leaf.shape)
        for path, leaf in paths.flatten(params).items()
        if paths.leaf_name(path) in decoder.TARGETS
    )


def case(sizes: Sizes) -> Case:
    """Return the case for a decoder of these sizes."""
    return Case(
        name=f"plan_{sizes.layers}_layers",
        title=f"plan of a decoder of {sizes.layers} layers, LoRA on its seven linears",
        contestants=(
            Contestant("lora_jax", lambda: planned(sizes), ("jax",), jax_settings),
            Contestant("tracing alone", lambda: traced(sizes)),
            Contestant("PEFT", lambda: injected(sizes), ("peft", "torch"), torch_settings),
        ),
        # Counts are equal or they are not.
        tolerance=0.0,
        sizes={"layers": sizes.layers},
        group="plan",
        warm_up=len(RANKS),
        memory=False,
    )


def cases() -> tuple[Case, ...]:
    """Return both cases at every number of layers; ``rewrite_trace`` itself has the most."""
    deep = [replace(rewrite_trace.SIZES, layers=layers) for layers in LAYERS]
    tracing = [
        replace(rewrite_trace.case(sizes), name=f"trace_{sizes.layers}_layers")
        for sizes in deep
        if sizes != rewrite_trace.SIZES
    ]
    return (*map(case, deep), *tracing)
