"""The laws of the rewriter, each on every kind of use. See docs/architecture.md."""

from __future__ import annotations

import contextlib
import math

import jax
import pytest

from lora_jax import lora, merge
from lora_jax.core.adapter import pick
from parity_tests.laws import (
    laws,
    subjects,
    subjects_complex,
    subjects_derivatives,
    subjects_products,
    subjects_structure,
)
from parity_tests.laws.laws import ALL as LAWS
from parity_tests.laws.laws import computed, loss, random_adapters, weight_sizes

SUBJECTS = [
    *subjects.ALL,
    *subjects_products.ALL,
    *subjects_structure.ALL,
    *subjects_complex.ALL,
    *subjects_derivatives.ALL,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_law(law, subject):
    # What these two look at is the optimised program.
    optimised = law in (laws.identity, laws.frugality)
    with contextlib.nullcontext() if optimised else laws.quick_compilation():
        law(subject)


def test_frugality_sees_a_merged_weight():
    subject = next(s for s in subjects.ALL if s.name == "dense")
    adapters, fn, params, (x,) = random_adapters(subject)

    def merged_step(adapters, params, x):
        return loss(lambda a: fn(merge(params, a), x), adapters)

    sizes = weight_sizes(params, adapters)
    assert computed(sizes, jax.grad(merged_step), adapters, params, x)


def test_remat_keeps_the_authors_policy():
    subject = next(s for s in subjects.ALL if s.name == "remat")
    adapters, fn, params, (x,) = random_adapters(subject)
    jaxpr = jax.make_jaxpr(lora(fn))(params, adapters, x)
    policies = [eqn.params["policy"] for eqn in jaxpr.eqns if "policy" in eqn.params]
    assert policies == [jax.checkpoint_policies.dots_saveable]


PLAIN = [s for s in subjects.ALL if s.sites == len(s.axes) == 1 and "scan" not in s.name]


@pytest.mark.parametrize(
    "subject", [s for s in PLAIN if not (s.half or s.dense_gradient or s.name == "remat")], ids=str
)
def test_the_step_costs_the_base_and_the_low_rank_products(subject):
    """Three products each with A and B: forward, input gradient, their own gradients."""
    adapters, fn, params, (x,) = random_adapters(subject)

    def cost(step, *args):
        return jax.jit(jax.grad(step)).lower(*args).cost_analysis()["flops"]

    base = cost(lambda x, p: loss(lambda x: fn(p, x), x), x, params)
    step = cost(lambda a, p: loss(lambda a: lora(fn)(p, *a), a), (adapters, x), params)
    fan_in, fan_out = (math.prod(pick(subject.shapes["w"], subject.axes["w"], c)) for c in "io")
    rows = x.size // fan_in
    low_rank = 6 * rows * subject.r * (fan_in + fan_out)
    assert 0.9 * low_rank < step - base < low_rank + 2 * rows * (fan_in + fan_out + subject.r)
