"""A scale that is an array does what the number does, and nothing trains it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import Adapter, lora, merge, rescale
from lora_jax.core import delta
from lora_jax.core.adapter import count
from parity_tests.laws import subjects
from parity_tests.laws.laws import loss, random_adapters, relative

NAMED = {subject.name: subject for subject in subjects.ALL}
FOLLOWED = ["dense", "unit_axes", "tied", "jitted", "scan_remat", "scan_in_scan"]
FOLLOWED += ["custom_vjp", "custom_jvp", "inner_grad", "vmapped_weight"]


@pytest.mark.parametrize("name", FOLLOWED)
def test_an_array_scale_equals_the_number_and_gets_no_gradient(name):
    subject = NAMED[name]
    with jax.enable_x64(True):
        adapters, _, params, (x,) = random_adapters(subject, np.float64)
        arrays = {path: jnp.asarray(one.scale) for path, one in adapters.items()}
        by_array = rescale(adapters, arrays)
        assert len(jax.tree.leaves(by_array)) == 3 * len(adapters)
        assert count(by_array) == count(adapters)
        step = jax.jit(jax.value_and_grad(lambda a: loss(partial(lora(subject.fn), params), a, x)))
        (value, wanted), (got_value, got) = step(adapters), step(by_array)
        assert relative(got_value, value) <= 1e-14
        for path in adapters:
            assert relative(got[path].a, wanted[path].a) <= 1e-13
            assert relative(got[path].b, wanted[path].b) <= 1e-13
            assert got[path].scale == 0.0
        tripled = rescale(adapters, {path: 3 * scale for path, scale in arrays.items()})
        assert relative(step(tripled)[0], value) > 1e-4, "vacuous: the scale is not used"


def test_an_array_scale_stays_a_leaf_whatever_jax_puts_there():
    one = {"w": Adapter(jnp.ones((3, 2)), jnp.ones((2, 4)), jnp.ones(()))}
    for value in (0, 1.5, None, object()):
        put = jax.tree.map(lambda _, value=value: value, one)
        is_leaf = lambda leaf: leaf is None  # noqa: E731
        assert jax.tree.leaves(put, is_leaf=is_leaf) == [value] * 3
        again = jax.tree.map(lambda _: 0, put, is_leaf=is_leaf)
        assert jax.tree.structure(again) == jax.tree.structure(one)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
    axes = jax.tree.map(lambda _: 0, one)
    assert jax.vmap(delta.delta, in_axes=(axes["w"],))(two["w"]).shape == (2, 3, 4)
    np.testing.assert_array_equal(merge({"w": jnp.zeros((3, 4))}, one)["w"], np.full((3, 4), 2.0))
