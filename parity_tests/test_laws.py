"""The laws of the rewriter, each on every kind of use. See docs/architecture.md."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoraConfig, lora, lowrank, merge, paths, plan
from lora_jax.adapter import pick
from lora_jax.rewrite.frugality import compiled, sizes_of, weight_sized
from parity_tests import subjects, subjects_products, subjects_structure
from parity_tests.subjects import Subject


def planned(subject: Subject, dtype=np.float32):
    params, x = subject.draw(dtype)
    config = LoraConfig(
        r=subject.r, lora_alpha=4, target_modules=list(subject.axes), **subject.options
    )
    return plan(subject.fn, params, config, x), params, x


def random_adapters(subject: Subject, dtype=np.float32):
    """A and B both away from zero, so that a wrong path cannot hide."""
    found, params, x = planned(subject, dtype)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, dtype), found.abstract()
    )
    return adapters, params, x


def relative(got, wanted) -> float:
    got, wanted = (
        np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(t)])
        for t in (got, wanted)
    )
    assert np.linalg.norm(wanted) > 0, "vacuous: the wanted value is zero"
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def loss(fn, *args):
    return sum(jnp.sum(jnp.sin(out)) for out in jax.tree.leaves(fn(*args)))


def identity(subject: Subject) -> None:
    found, params, x = planned(subject)
    adapters = found.init(jax.random.key(0))
    with jax.disable_jit():
        base, adapted = subject.fn(params, x), lora(subject.fn)(params, adapters, x)
    for one, two in zip(jax.tree.leaves(base), jax.tree.leaves(adapted), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    assert (
        relative(jax.jit(lora(subject.fn))(params, adapters, x), jax.jit(subject.fn)(params, x))
        <= 1e-6
    )


def merging(subject: Subject) -> None:
    with jax.enable_x64(True):
        adapters, params, x = random_adapters(subject, np.float64)
        fn = jax.jit(subject.fn)
        got, wanted = jax.jit(lora(subject.fn))(params, adapters, x), fn(merge(params, adapters), x)
        assert relative(wanted, fn(params, x)) > 1e-2, "vacuous: the delta is too small"
        assert relative(got, wanted) <= (2e-2 if subject.half else 1e-13)


def gradient(subject: Subject) -> None:
    with jax.enable_x64(True):
        adapters, params, x = random_adapters(subject, np.float64)
        got = jax.jit(jax.grad(partial(loss, lambda a: lora(subject.fn)(params, a, x))))(adapters)
        merged = merge(params, adapters)
        whole = jax.jit(jax.grad(partial(loss, lambda p: subject.fn(p, x))))(merged)
        for path, adapter in adapters.items():
            weight = params[paths.parameter_of(path)]
            _, pull = jax.vjp(partial(lowrank.merged, weight), adapter)
            (wanted,) = pull(whole[paths.parameter_of(path)])
            bound = 4e-2 if subject.half else 1e-12
            assert relative(got[path].a, wanted.a) <= bound
            assert relative(got[path].b, wanted.b) <= bound


def frugality(subject: Subject) -> None:
    """The step computes nothing weight-sized beyond what the base's input gradient does."""
    adapters, params, x = random_adapters(subject)
    step = jax.grad(lambda a, p, x: loss(lambda a: lora(subject.fn)(p, a, x), a))
    base = jax.grad(lambda x, p: loss(lambda x: subject.fn(p, x), x))
    added = Counter(of_a_weights_size(step, subject, adapters, params, x))
    added -= Counter(of_a_weights_size(base, subject, x, params))
    assert bool(added) == (subject.dense_gradient or subject.materialized), added


def purity(subject: Subject) -> None:
    adapters, params, x = random_adapters(subject)
    before = jax.tree.map(np.array, params)
    lora(subject.fn)(params, adapters, x)
    merge(params, adapters)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def transforms(subject: Subject) -> None:
    with jax.enable_x64(True):
        adapters, params, x = random_adapters(subject, np.float64)
        plain = lora(subject.fn)(params, adapters, x)
        bound = 2e-2 if subject.half else 1e-13
        assert relative(jax.jit(lora(subject.fn))(params, adapters, x), plain) <= bound
        assert relative(jax.checkpoint(lora(subject.fn))(params, adapters, x), plain) <= bound
        two = jax.tree.map(lambda leaf: jnp.stack([leaf, -2 * leaf]), adapters)
        over_adapters = jax.vmap(lora(subject.fn), in_axes=(None, 0, None))
        if not subject.vmaps:
            with pytest.raises(NotImplementedError):  # JAX's own: the base has none either
                over_adapters(params, two, x)
            return
        many = over_adapters(params, two, x)
        assert relative(jax.tree.map(lambda leaf: leaf[0], many), plain) <= bound


def planning(subject: Subject) -> None:
    found, _, _ = planned(subject)
    assert {leaf.path: leaf.axes for leaf in found.adapted} == dict(subject.axes)
    assert {leaf.sites for leaf in found.adapted} == {subject.sites}
    assert {leaf.dense_gradient for leaf in found.adapted} == {subject.dense_gradient}
    assert {bool(leaf.materialized) for leaf in found.adapted} == {subject.materialized}


SUBJECTS = [*subjects.ALL, *subjects_products.ALL, *subjects_structure.ALL]

LAWS = [identity, merging, gradient, frugality, purity, transforms, planning]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_law(law, subject):
    law(subject)


def of_a_weights_size(step, subject: Subject, *args) -> list[str]:
    """Return every compiled instruction that computes something of a frozen weight's sizes."""
    sizes = [s for path, axes in subject.axes.items() for s in sizes_of(subject.shapes[path], axes)]
    return weight_sized(compiled(step, *args), sizes)


def test_frugality_sees_a_merged_weight():
    subject = next(s for s in subjects.ALL if s.name == "dense")
    adapters, params, x = random_adapters(subject)

    def merged_step(adapters, params, x):
        return loss(lambda a: subject.fn(merge(params, a), x), adapters)

    assert of_a_weights_size(jax.grad(merged_step), subject, adapters, params, x)


def test_remat_keeps_the_authors_policy():
    subject = next(s for s in subjects.ALL if s.name == "remat")
    adapters, params, x = random_adapters(subject)
    jaxpr = jax.make_jaxpr(lora(subject.fn))(params, adapters, x)
    policies = [eqn.params["policy"] for eqn in jaxpr.eqns if "policy" in eqn.params]
    assert policies == [jax.checkpoint_policies.dots_saveable]


PLAIN = [s for s in subjects.ALL if s.sites == len(s.axes) == 1 and "scan" not in s.name]


@pytest.mark.parametrize(
    "subject", [s for s in PLAIN if not (s.half or s.dense_gradient or s.name == "remat")], ids=str
)
def test_the_step_costs_the_base_and_the_low_rank_products(subject):
    """Three products each with A and B: forward, input gradient, their own gradients."""
    adapters, params, x = random_adapters(subject)

    def cost(step, *args):
        return jax.jit(jax.grad(step)).lower(*args).cost_analysis()["flops"]

    base = cost(lambda x, p: loss(lambda x: subject.fn(p, x), x), x, params)
    step = cost(lambda a, p: loss(lambda a: lora(subject.fn)(p, *a), a), (adapters, x), params)
    fan_in, fan_out = (math.prod(pick(subject.shapes["w"], subject.axes["w"], c)) for c in "io")
    rows = x.size // fan_in
    low_rank = 6 * rows * subject.r * (fan_in + fan_out)
    assert 0.9 * low_rank < step - base < low_rank + 2 * rows * (fan_in + fan_out + subject.r)
