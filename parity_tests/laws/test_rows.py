"""Trained rows under the rewriter: the laws on every use of a matrix, and what is refused."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import lora, merge
from lora_jax.core import paths, token_rows
from parity_tests.laws import laws, subjects, subjects_products, subjects_structure
from parity_tests.laws.laws import relative
from parity_tests.tiers import cases


def indices_of(size):
    """Return rows out of order, in the middle of large weights, where slices of them are."""
    return (13, 0, 8) if size > 13 else (4, 0, 2)


# Each rule once, the rows on either side; the others are slow.
QUICK = (
    "torch_layout_o",
    "weight_first_i",
    "custom_vjp_o",
    "embedding_columns_i",
    "embedding_tied_to_the_head_i",
    "half_precision_i",
    "joined_out_i",
)

EVERY = [*subjects.ALL, *subjects_products.ALL, *subjects_structure.ALL]
# The rows of an embedding on either side, of the others on one side each, in turn.
SUBJECTS = {
    f"{subject.name}_{letter}": (subject, letter)
    for n, subject in enumerate(EVERY)
    for letter in "io"
    if not subject.materialized
    and not subject.options
    and all(
        sorted(axes) == ["i", "o"] and name in subject.shapes for name, axes in subject.axes.items()
    )
    and (
        "embedding" in subject.name
        or n % 2 == "io".index(letter)
        or f"{subject.name}_{letter}" in QUICK
    )
}


def drawn(case, dtype=np.float32, fresh=False):
    """Return rows of every target, away from the weight's own unless fresh, and the function."""
    subject, letter = case
    fn, params, args = subject.build(dtype)
    rng, adapters = np.random.default_rng(1), {}
    for name, axes in subject.axes.items():
        axis = axes.index(letter)
        indices = indices_of(params[name].shape[axis])
        one = token_rows.start(params[name], indices, params[name].dtype, axes, axis)
        if not fresh:
            values = jnp.asarray(rng.normal(size=one.values.shape), one.values.dtype)
            one = dataclasses.replace(one, values=values)
        adapters[name] = one
    return adapters, fn, params, args


def identity(case):
    adapters, fn, params, args = drawn(case, fresh=True)
    with jax.disable_jit():
        base, adapted = fn(params, *args), lora(fn)(params, adapters, *args)
    for one, two in zip(jax.tree.leaves(base), jax.tree.leaves(adapted), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    got = jax.jit(lora(fn))(params, adapters, *args)
    assert relative(got, jax.jit(fn)(params, *args)) <= 1e-6


def merging(case):
    with laws.wide(case[0]) as dtype:
        adapters, fn, params, args = drawn(case, dtype)
        merged = merge(params, adapters)
        for name, one in adapters.items():
            new, old = (np.moveaxis(np.asarray(p[name]), one.axis, 0) for p in (merged, params))
            np.testing.assert_array_equal(new[list(one.indices)], one.values)
            others = [n for n in range(len(new)) if n not in one.indices]
            np.testing.assert_array_equal(new[others], old[others])
        got, wanted = laws.jit(lora(fn))(params, adapters, *args), laws.jit(fn)(merged, *args)
        assert relative(wanted, laws.jit(fn)(params, *args)) > 1e-2, "vacuous"
        assert relative(got, wanted) <= laws.BOUNDS[case[0].precision][0]


def gradient(case):
    """It is that of the merged weight, in these rows."""
    with laws.wide(case[0]) as dtype:
        adapters, fn, params, args = drawn(case, dtype)
        got = jax.jit(jax.grad(lambda a: laws.loss(lora(fn), params, a, *args)))(adapters)
        merged = merge(params, adapters)
        targets = {name: merged[name] for name in adapters}
        whole = jax.jit(
            jax.grad(lambda leaves: laws.loss(fn, paths.replace(merged, leaves), *args))
        )(targets)
        for name, one in adapters.items():
            wanted = token_rows.of(whole[name], one.indices, one.axis)
            assert relative(got[name].values, wanted) <= laws.BOUNDS[case[0].precision][1]


def frugal(case):
    """No copy of the weight and no gradient of its size, beyond what the base computes."""
    adapters, fn, params, args = drawn(case)

    def step(adapters, params, *args):
        return jax.grad(lambda a: laws.loss(lora(fn), params, a, *args))(adapters)

    def base(params, *args):
        smooth = [n for n, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return jax.grad(lambda *args: laws.loss(fn, params, *args), smooth)(*args)

    sizes = [params[name].shape for name in adapters]
    added = Counter(laws.computed(sizes, step, adapters, params, *args))
    added -= Counter(laws.computed(sizes, base, params, *args))
    assert bool(added) == case[0].dense_gradient, added


def purity(case):
    """Nothing that was given changes, and op by op the values are those of the compiled call."""
    with laws.wide(case[0]) as dtype:
        adapters, fn, params, args = drawn(case, dtype)
        before = jax.tree.map(np.array, (params, adapters))
        plain = lora(fn)(params, adapters, *args)
        merge(params, adapters)
        jax.tree.map(np.testing.assert_array_equal, (params, adapters), before)
        compiled = jax.jit(lora(fn))(params, adapters, *args)
        assert relative(compiled, plain) <= laws.BOUNDS[case[0].precision][0]


def transforms(case):
    with laws.wide(case[0]) as dtype:
        adapters, fn, params, args = drawn(case, dtype)

        def over(adapters):
            return lora(fn)(params, adapters, *args)

        plain, (bound, _) = jax.jit(over)(adapters), laws.BOUNDS[case[0].precision]
        assert relative(jax.jit(jax.checkpoint(over))(adapters), plain) <= bound
        if case[0].vmaps:
            two = jax.tree.map(lambda x: np.stack([-x, x]), adapters)
            many = jax.jit(jax.vmap(over))(two)
            assert relative(jax.tree.map(lambda leaf: leaf[1], many), plain) <= bound


LAWS = [identity, merging, gradient, frugal, purity, transforms]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", cases(SUBJECTS, quick=QUICK))
def test_law(law, name):
    with laws.quick_compilation():
        law(SUBJECTS[name])
