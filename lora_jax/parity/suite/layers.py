"""Levels 0 and 1: every LoRA layer against every PyTorch layer, y, dx, dA and dB."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..reports.checks import Check
from ..verdicts import UNIT_ROUNDOFF, TensorVerdict, judge
from . import lora_oracle
from .cases import ALPHA, SHAPES, exact_case, random_case
from .jax_layers import JAX_SIDES

THEIRS = ("reference", "peft")
DTYPES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))


def exact(ours: str, theirs: str, base: str, low_rank: str, seed: int) -> Iterator[TensorVerdict]:
    """Compare bit for bit, on integers."""
    # Here, so that the table of checks imports without PyTorch.
    from .torch_layers import TORCH_SIDES

    case = exact_case(seed)
    lora_oracle.refuse_vacuous(case, exact_scale=True)
    truth = lora_oracle.truth(case)
    options = dict(base=base, low_rank=low_rank)
    got, reference = JAX_SIDES[ours](case, 2, **options), TORCH_SIDES[theirs](case, 2, **options)
    for name, value in truth.items():
        unit = UNIT_ROUNDOFF[base]
        yield judge(name, got[name], reference[name], value, unit_roundoff=unit, exact=True)


def close(ours: str, theirs: str, seed: int, *, rslora: bool = False) -> Iterator[TensorVerdict]:
    """Hold float32 to the rule, for each shape."""
    from .torch_layers import TORCH_SIDES

    for shape in SHAPES:
        case = random_case(shape, seed, rslora=rslora)
        lora_oracle.refuse_vacuous(case)
        truth, cond = lora_oracle.truth(case), lora_oracle.cond(case)
        got = JAX_SIDES[ours](case, ALPHA, rslora=rslora)
        reference = TORCH_SIDES[theirs](case, ALPHA, rslora=rslora)
        for name, value in truth.items():
            yield judge(
                f"{name} {'×'.join(map(str, shape))}",
                got[name],
                reference[name],
                value,
                unit_roundoff=UNIT_ROUNDOFF["float32"],
                cond=cond[name],
            )


def _checks() -> Iterator[Check]:
    for theirs in THEIRS:
        needs = ("torch", "peft") if theirs == "peft" else ("torch",)
        for ours in JAX_SIDES:
            pair = f"{ours}/{theirs}"
            for base, low_rank in DTYPES:
                run = partial(exact, ours, theirs, base, low_rank)
                yield Check(f"{pair} exact {base}, {low_rank}", 0, run, needs)
            yield Check(f"{pair} float32", 1, partial(close, ours, theirs), needs)
            rslora = partial(close, ours, theirs, rslora=True)
            yield Check(f"{pair} float32 rslora", 1, rslora, needs)


CHECKS = tuple(_checks())
