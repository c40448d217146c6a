"""Levels 0 and 1 of the suite, the slopes in bfloat16, and the truth that they are held to."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lora_jax.parity import Verdict
from lora_jax.parity.reports.checks import Check, run_check
from lora_jax.parity.suite import CHECKS, lowering
from lora_jax.parity.suite.cases import SHAPES, random_case
from lora_jax.parity.suite.jax_layers import JAX_SIDES
from lora_jax.parity.suite.kinds import KINDS, random_draw
from lora_jax.parity.suite.torch_layers import TORCH_SIDES
from parity_tests.parity import oracle
from parity_tests.parity.oracle import UNIT_ROUNDOFF, Vacuous
from parity_tests.tiers import cases

# The rewriter's kinds with one pair of dtypes each, and the twins of linear layers, are enough
# for the default suite.
QUICK = (
    "LoRADense/peft float32 rslora",
    "LoRALinear/reference float32",
    "rewriter/peft float32",
    "Embedding/peft float32",
    "Conv2d/peft float32",
    "Conv2d dilated/formula float32",
    "experts/formula float32",
    "DoRA Linear/peft float32",
    "DoRA Linear, reference/reference float32",
    "DoRA Conv2d/peft float32",
    "rewriter/peft dropout",
    "train.cross_entropy/torch cross entropy",
    "optax/torch cross entropy, smoothed",
)
LEVEL_1 = [check for check in CHECKS if check.level == 1]
EXACT = [check for check in CHECKS if check.level == 0]

# A seed has nothing to shrink.
SEEDS = settings(
    max_examples=4, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)


@pytest.mark.parametrize("check", cases(LEVEL_1, quick=QUICK))
@SEEDS
@given(seed=st.integers(0, 2**32 - 1))
def test_level_1_holds_the_rule(check: Check, seed: int):
    result = run_check(check, seed)
    assert result.verdict is not None and result.verdict.ok, said(result)


@pytest.mark.parametrize(
    "check",
    cases(EXACT, slow=[c.name for c in EXACT if "float32, float32" in c.name or "LoRAL" in c.name]),
)
def test_level_0_is_bitwise(check: Check):
    result = run_check(check)
    assert {one.verdict for one in result.tensors} == {Verdict.EXACT}, said(result)
    assert len(result.tensors) >= 3


def said(result) -> str:
    return "\n".join([result.error, *map(str, result.tensors)])


SIDES = JAX_SIDES | TORCH_SIDES


@pytest.mark.parametrize("name", cases(SIDES, slow=("LoRALinear", "reference")))
def test_bf16_has_no_common_factor(name):
    """A scale that is rounded to bfloat16 shows as a slope of 2e-3 in everything it touches."""
    slopes = {"healthy": [], "rounded": []}
    for seed in range(8):
        # Without the base, whose rounding and whose share would hide it.
        case = random_case((64, 45, 6, 53), seed)
        case = dataclasses.replace(case, w=np.zeros_like(case.w), bias=np.zeros_like(case.bias))
        case = rounded_to_bf16(case)
        oracle.refuse_vacuous(case)
        scale = float(np.float32(case.scale).astype(ml_dtypes.bfloat16))
        found = {
            "healthy": SIDES[name](case, 16, base="bfloat16", low_rank="bfloat16"),
            "rounded": oracle.truth(dataclasses.replace(case, scale=scale)),
        }
        truth = oracle.truth(case)
        for kind, tensors in found.items():
            slopes[kind].append([oracle.slope(tensors[name], truth[name]) for name in truth])
    # One low-rank product has few independent roundings, so a single slope is noisy.
    healthy, rounded = (np.abs(np.mean(slopes[kind], axis=0)) for kind in ("healthy", "rounded"))
    assert (healthy < 4e-4).all() and (rounded > 1.8e-3).all(), (healthy, rounded)


# The oracle and the rule are code too.


def test_the_oracle_is_the_derivative_of_its_forward():
    case = random_case((5, 7, 3, 11), seed=0)
    case = dataclasses.replace(case, m=np.linspace(0.5, 2.0, 11).astype(np.float32))
    # ‖V‖ is a constant for the gradient, so it is frozen at the point of derivation.
    for kind in (case, dataclasses.replace(case, m=None)):
        gain = oracle.gain(kind)
        for field, name in {"x": "dx", "a": "dA", "b": "dB"}.items():
            step = 1e-6 * np.random.default_rng(1).standard_normal(getattr(case, field).shape)
            values: Any = [
                np.vdot(case.g, oracle.evaluate(dataclasses.replace(kind, **{field: v}), gain)["y"])
                for v in (getattr(case, field) + step, getattr(case, field) - step)
            ]
            slope = np.vdot(oracle.truth(kind)[name], step)
            assert (values[0] - values[1]) / 2 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d dilated"])
def test_the_lowered_convolution_is_its_definition(name):
    """Each output is a sum over the window, written as loops; dx is its adjoint."""
    drawn = random_draw(KINDS[name], seed=0)
    (case,), kind = drawn.lowered.cases, drawn.kind
    truth, x = lowering.truth(drawn.lowered), drawn.x.astype(np.float64)
    stride, padding, dilation = (
        kind.options.get(n, (d,) * (x.ndim - 2))
        for n, d in {"stride": 1, "padding": 0, "dilation": 1}.items()
    )
    weight = drawn.weight.astype(np.float64)
    delta = (case.scale * case.a.astype(np.float64) @ case.b.astype(np.float64)).T
    whole = weight + delta.reshape(weight.shape)
    y = np.zeros(drawn.cotangent.shape)
    for n, o, *at in np.ndindex(*y.shape):
        spans = at, stride, padding, dilation
        for c, *k in np.ndindex(*weight.shape[1:]):
            place = [i * s - p + d * j for i, s, p, d, j in zip(*spans, k, strict=True)]
            if all(0 <= one < size for one, size in zip(place, x.shape[2:], strict=True)):
                y[(n, o, *at)] += x[(n, c, *place)] * whole[(o, c, *k)]
    np.testing.assert_allclose(drawn.rows(y) + case.bias, truth["y"], rtol=1e-12, atol=1e-12)
    # y is linear in x: ⟨g, y(x) − y(0)⟩ = ⟨dx, x⟩.
    linear = np.vdot(case.g, truth["y"] - case.bias)
    assert np.vdot(truth["dx"], x) == pytest.approx(linear, rel=1e-12)


@pytest.mark.parametrize("tensor", ["y", "dx", "dA", "dB"])
def test_the_rule_sees_a_scale_wrong_by_1e_5(tensor):
    case = random_case(SHAPES[1], seed=0)
    truth, cond = oracle.truth(case)[tensor], oracle.cond(case)[tensor]
    wrong = oracle.truth(dataclasses.replace(case, scale=case.scale * (1 + 1e-5)))[tensor]
    unit = UNIT_ROUNDOFF["float32"]
    oracle.assert_within_rule(truth.astype("f4"), truth.astype("f4"), truth, cond, unit)
    with pytest.raises(AssertionError, match="jax is further from the truth than rounding"):
        oracle.assert_within_rule(wrong.astype("f4"), truth.astype("f4"), truth, cond, unit)
    with pytest.raises(AssertionError, match="both are further from the truth than 4 u·cond"):
        oracle.assert_within_rule(wrong.astype("f4"), wrong.astype("f4"), truth, cond, unit)


def test_vacuous_comparisons_are_refused():
    case = random_case(SHAPES[1], seed=0)
    oracle.refuse_vacuous(case)
    vacuous = {
        "zero": dataclasses.replace(case, b=np.zeros_like(case.b)),
        "of y": dataclasses.replace(case, b=case.b * 1e-4),
        "bfloat16 holds": dataclasses.replace(case, scale=2.0),
        "not all different": random_case((5, 7, 3, 7), seed=0),
    }
    for reason, kind in vacuous.items():
        with pytest.raises(Vacuous, match=reason):
            oracle.refuse_vacuous(kind)
    truth = oracle.truth(case)["y"]
    for wrong in (np.zeros_like(truth), truth * np.nan, truth.astype(np.float32)):
        with pytest.raises(Vacuous):
            oracle.assert_within_rule(truth, truth, wrong, 1.0, 1.0)
    with pytest.raises(AssertionError, match="shapes"):
        oracle.assert_within_rule(truth[:1], truth, truth, 1.0, 1.0)
    with pytest.raises(AssertionError, match="jax is further"):
        oracle.assert_within_rule(truth * np.nan, truth, truth, 1.0, 1.0)


def rounded_to_bf16(case):
    arrays = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    return dataclasses.replace(
        case,
        **{
            name: value.astype(ml_dtypes.bfloat16).astype(np.float32)
            for name, value in arrays.items()
            if isinstance(value, np.ndarray)
        },
    )
