"""Levels 0 and 1 of every kind of layer beside the linear one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from ..reports.checks import Check
from ..verdicts import UNIT_ROUNDOFF, TensorVerdict, Vacuous, judge
from . import lowering
from .kinds import KINDS, Drawn, exact_draw, random_draw
from .lowering import Lowered

DTYPES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
NEEDS = {"peft": ("torch", "peft", "transformers"), "reference": ("torch",), "formula": ("torch",)}


def close(name: str, seed: int) -> Iterator[TensorVerdict]:
    """Hold float32 to the rule."""
    drawn = random_draw(KINDS[name], seed)
    lowering.refuse_vacuous(drawn.lowered)
    yield from _judged(drawn, "float32", "float32", exact=False)


def exact(name: str, base: str, low_rank: str, seed: int) -> Iterator[TensorVerdict]:
    """Compare bit for bit, on integers."""
    drawn = exact_draw(replace(KINDS[name], rank=4), seed)
    lowering.refuse_vacuous(drawn.lowered, exact_scale=True)
    refuse_inexact(drawn.lowered)
    yield from _judged(drawn, base, low_rank, exact=True)


def refuse_inexact(lowered: Lowered) -> None:
    """Raise ``Vacuous`` where a result has more digits than bfloat16, so that order may count."""
    for name, value in lowering.truth(lowered).items():
        narrow = value.astype(np.float32)
        if (narrow != value).any() or (narrow.view(np.uint32) & 0xFFFF).any():
            raise Vacuous(f"{name} is not exact in bfloat16")


def _judged(drawn: Drawn, base: str, low_rank: str, *, exact: bool) -> Iterator[TensorVerdict]:
    # Here, so that the table of checks imports without PyTorch.
    from . import jax_kinds, torch_kinds

    truth, cond = lowering.truth(drawn.lowered), lowering.cond(drawn.lowered)
    got, reference = (side.run(drawn, base, low_rank) for side in (jax_kinds, torch_kinds))
    if got.keys() != reference.keys():
        raise AssertionError(f"jax has {sorted(got)}, torch {sorted(reference)}")
    unit = UNIT_ROUNDOFF[base]
    for name in got:
        yield judge(
            name,
            got[name],
            reference[name],
            truth[name],
            unit_roundoff=unit,
            cond=cond[name],
            exact=exact,
        )


def _checks() -> Iterator[Check]:
    for name, kind in KINDS.items():
        needs = NEEDS[kind.torch]
        if not kind.dora:  # a norm is not exact
            for base, low_rank in DTYPES:
                run = partial(exact, name, base, low_rank)
                yield Check(f"{name}/{kind.torch} exact {base}, {low_rank}", 0, run, needs)
        yield Check(f"{name}/{kind.torch} float32", 1, partial(close, name), needs)


CHECKS = tuple(_checks())
