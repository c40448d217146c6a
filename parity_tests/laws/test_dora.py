"""DoRA under the rewriter: the laws on every use of a weight, and what has no rule for it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax import Adapter, LoraConfig, lora, merge, plan
from lora_jax.core import delta
from lora_jax.core.errors import PlanError
from parity_tests.laws import (
    laws,
    subjects,
    subjects_complex,
    subjects_products,
    subjects_structure,
)
from parity_tests.laws.laws import planned, relative
from parity_tests.tiers import cases

# Authors' derivatives and groups of rows have no rule for DoRA; a join along an in axis would
# need a norm for each part of the sum.
REFUSED = {
    "custom_vjp": "author's derivative",
    "custom_jvp": "author's derivative",
    "ragged_dot": "groups of rows",
    "ragged_dot_back": "groups of rows",
    "joined_in": "joined along an axis that is summed over",
    "complex_made": "something is added to it",
    "complex_of_two": "something is added to it",
    "sum_of_two": "something is added to it",
    "sum_of_slices": "something is added to it",
    "experts_by_choices": "only a part of axis 0 is summed over",
}
EVERY = [*subjects.ALL, *subjects_products.ALL, *subjects_structure.ALL, *subjects_complex.ALL]
WITHOUT = [s for s in EVERY if s.materialized or "output_slices" in s.options]
SUBJECTS = [
    dataclasses.replace(subject, options={**subject.options, "use_dora": True})
    for subject in EVERY
    if subject not in WITHOUT
]


# One of each rule; the others are slow.
QUICK = (
    "torch_layout",
    "heads_in_swapped",
    "experts_weight_first",
    "tied",
    "scan_of_transposed",
    "conv_2d_strided",
    "conv_input_gradient",
    "embedding_tied_to_the_head",
    "embedding_windows",
    "joined_out",
    "split",
    "stop_gradient",
    "repeated",
    "complex_conjugate",
    "complex_layers",
)


@pytest.mark.parametrize("law", [laws.merging, laws.gradient], ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    "subject", cases([s for s in SUBJECTS if s.name not in REFUSED], quick=QUICK)
)
def test_law(law, subject):
    with laws.quick_compilation():
        law(subject)


@pytest.mark.parametrize("name", REFUSED)
def test_a_use_without_a_rule_for_dora_is_refused_by_the_plan(name):
    subject = next(s for s in SUBJECTS if s.name == name)
    with pytest.raises(PlanError, match=rf"{REFUSED[name]}.* \(.*subjects.*:\d+"):
        planned(subject)
    planned(next(s for s in EVERY if s.name == name))  # without DoRA there is one


@pytest.mark.parametrize("name", cases(REFUSED, quick=("ragged_dot", "custom_vjp")))
def test_what_has_no_rule_for_dora_may_be_formed(name):
    subject = next(s for s in SUBJECTS if s.name == name)
    options = {**subject.options, "on_unsupported": "materialize"}
    formed = dataclasses.replace(subject, options=options, materialized=True)
    found, *_ = planned(formed)
    assert all(REFUSED[name] in leaf.materialized for leaf in found.adapted if leaf.materialized)
    with laws.quick_compilation():
        laws.merging(formed)


def looked_up_both_ways(params, ids):
    return params["w"][ids].sum() + params["w"][:, ids].sum()


def kernel_used_both_ways(params, x):
    def apply(x, kernel):
        options = dict(feature_group_count=2, dimension_numbers=("NCW", kernel, "NCW"))
        return lax.conv_general_dilated(x, params["w"], (1,), "SAME", **options)

    return jnp.sum(jnp.sin(apply(x, "OIW"))) + jnp.sum(
        jnp.sin(apply(jnp.tile(x, (1, 3, 1)), "IOW"))
    )


TWO_WAYS = {
    "looked_up": (looked_up_both_ways, (5, 7), jnp.array([1, 2]), True, "gather of shape"),
    "grouped": (kernel_used_both_ways, (6, 2, 3), jnp.ones((1, 4, 9)), False, "other way round"),
}


@pytest.mark.parametrize("case", TWO_WAYS)
def test_the_second_of_two_ways_round_is_refused_by_the_plan(case):
    fn, shape, x, dora, match = TWO_WAYS[case]
    params = {"w": jnp.asarray(RNG.normal(size=shape), jnp.float32)}
    config = LoraConfig(r=2, target_modules=["w"], use_dora=dora)
    with pytest.raises(PlanError, match=rf"w: .*({match}).*test_dora.py"):
        plan(fn, params, config, x)
    found = plan(fn, params, dataclasses.replace(config, on_unsupported="materialize"), x)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape), leaf.dtype), found.abstract()
    )
    wanted = fn(merge(params, adapters), x)
    assert relative(lora(fn)(params, adapters, x), wanted) < 1e-5


def fn(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"up": (30, 41), "down": (41, 7)}.items()
}
X = jnp.asarray(RNG.normal(size=(8, 30)), jnp.float32)
CONFIG = LoraConfig(r=3, target_modules=["up", "down"], use_dora=True)


def test_fresh_adapters_change_nothing_and_start_at_the_norms():
    found = plan(fn, PARAMS, CONFIG, X)
    fresh = found.init(jax.random.key(0))
    np.testing.assert_allclose(
        fresh["up"].magnitude, np.linalg.norm(PARAMS["up"], axis=0), rtol=1e-6
    )
    assert relative(lora(fn)(PARAMS, fresh, X), fn(PARAMS, X)) <= 1e-6
    assert "DoRA" in str(found)
    assert found.trainable == sum(leaf.size for leaf in jax.tree.leaves(fresh))


@pytest.mark.parametrize("weight_first", [False, True])
def test_dropout_takes_inputs_from_what_dora_adds_and_none_from_the_base(weight_first):
    rng = np.random.default_rng(5)
    w, a, b, m, x = (rng.normal(size=s) for s in ((6, 4), (6, 2), (2, 4), (4,), (9, 6)))
    rate, scale = 0.25, 1.5
    with jax.enable_x64(True):

        def one(params, x):
            return (params["w"].T @ x.T).T if weight_first else x @ params["w"]

        adapter = Adapter(*map(jnp.asarray, (a, b)), scale, dropout=rate, magnitude=jnp.asarray(m))
        options = dict(dropout_key=jax.random.key(0))
        got = lora(one)({"w": jnp.asarray(w)}, {"w": adapter}, jnp.asarray(x), **options)
        # What is kept shows in a plain pair: with W = 0 and A and B the identity.
        eye = Adapter(jnp.eye(6), jnp.eye(6), 1 - rate, dropout=rate)
        kept = lora(one)({"w": jnp.zeros((6, 6))}, {"w": eye}, jnp.ones((9, 6)), **options)
    dropped = x * np.asarray(kept) / (1 - rate)
    assert 0 < np.mean(np.asarray(kept)) < 1
    gain = m / np.linalg.norm(w + scale * a @ b, axis=0)
    wanted = x @ w + (gain - 1) * (dropped @ w) + gain * scale * (dropped @ a @ b)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_no_sum_of_the_weights_size_is_formed():
    """Beside the squares of W, which are summed where they are formed."""
    adapters = plan(fn, PARAMS, CONFIG, X).init(jax.random.key(0))

    def step(adapters, params, x):
        return jax.grad(lambda a: laws.loss(lora(fn), params, a, x))(adapters)

    sizes = laws.weight_sizes(PARAMS, adapters)
    added = laws.computed(sizes, step, adapters, PARAMS, X)
    assert all("multiply" in line or "fusion" in line for line in added), added
    merged = jax.grad(lambda a: laws.loss(fn, merge(PARAMS, a), X))
    assert len(laws.computed(sizes, merged, adapters)) > len(added)


def test_the_norm_gets_no_gradient_and_bf16_rounds_once():
    w = jnp.asarray(RNG.normal(size=(64, 16)), jnp.bfloat16)
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.normal(size=s) / 8, jnp.float32) for s in ((64, 2), (2, 16)))
    adapter = Adapter(a, b, 2.0, magnitude=jnp.full(16, 3.0))
    whole = np.asarray(w, np.float64) + 2 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    wanted = 3 * whole / np.linalg.norm(whole, axis=0)
    got = delta.merged(w, adapter)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=2**-8)
    slope = jax.grad(lambda m: jnp.sum(delta.gain(w, dataclasses.replace(adapter, b=b * m))))(1.0)
    assert float(slope) == 0.0


def test_a_column_of_zeros_gives_the_bases_output_and_finite_gradients():
    """PEFT divides 0 by 0 there; real checkpoints have such columns."""
    uses = {
        "io": ((5, 4), lambda p, x: x @ p["w"]),
        "oi": ((4, 5), lambda p, x: x @ p["w"].T),
        "sio": ((2, 5, 4), lambda p, x: jax.vmap(jnp.matmul)(jnp.stack([x, -x]), p["w"])),
    }
    for axes, (shape, use) in uses.items():
        out = [slice(None)] * len(shape)
        out[axes.index("o")] = 1
        w = jnp.asarray(RNG.normal(size=shape), jnp.float32).at[tuple(out)].set(0)
        params, x = {"w": w}, jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32)
        config = LoraConfig(r=2, target_modules=["w"], use_dora=True)
        start = plan(use, params, config, x).init(jax.random.key(0))
        assert relative(lora(use)(params, start, x), use(params, x)) < 1e-6, axes
        assert relative(merge(params, start)["w"], w) < 1e-6, axes
        trained = jax.tree.map(
            lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape), leaf.dtype), start
        )
        for adapters in (start, trained):
            got = lora(use)(params, adapters, x)
            assert relative(got, use(merge(params, adapters), x)) < 1e-5, axes
            grads = jax.grad(lambda a: jnp.sum(jnp.sin(lora(use)(params, a, x))))(adapters)  # noqa: B023
            assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads)), axes
        # Away from the start the column has a direction, and DoRA's formula holds for it.
        a, b = (np.asarray(leaf, np.float64) for leaf in (trained["w"].a, trained["w"].b))
        change = trained["w"].scale * a @ b  # (*stacked, in, out)
        whole = np.asarray(w.T if axes == "oi" else w, np.float64) + change
        wanted = np.asarray(trained["w"].magnitude)[..., None, :] * whole
        wanted /= np.linalg.norm(whole, axis=-2, keepdims=True)
        merged = np.asarray(merge(params, trained)["w"])
        assert relative(merged.T if axes == "oi" else merged, wanted) < 1e-5, axes
