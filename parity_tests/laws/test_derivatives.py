"""Authors' derivatives see adapters as they see trained weights, and are asked for nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoraConfig, lora, merge, plan
from lora_jax.core.errors import PlanError
from parity_tests.laws import laws, subjects, subjects_derivatives

QUICK = ("vjp_of_a_table", "vjp_of_the_moved", "jvp_of_the_moved", "vjp_filtered")


def test_gradients_are_the_authors():
    found = {subject.name: subject for subject in subjects_derivatives.ALL}
    with laws.quick_compilation():
        for name in QUICK:
            laws.gradient(found[name])


def test_an_inputs_gradient_is_that_of_the_merged_weights():
    """The adapters act where they are not what is differentiated, too."""
    known = {s.name: s for s in [*subjects.ALL, *subjects_derivatives.ALL]}
    for name in ("custom_vjp", "custom_jvp", "vjp_of_a_table", "vjp_filtered"):
        adapters, fn, params, (x,) = laws.random_adapters(known[name])
        wanted = jax.grad(lambda x: laws.loss(fn, merge(params, adapters), x))(x)  # noqa: B023
        for wrap in (lambda f: f, jax.jit):
            got = wrap(jax.grad(lambda x: laws.loss(lora(fn), params, adapters, x)))(x)  # noqa: B023
            assert laws.relative(got, wanted) < 1e-5, name


def test_a_weight_that_is_not_differentiated_is_not_asked_for():
    @jax.custom_vjp
    def fn(w, x):
        return x @ w

    def forward(w, x):
        assert x.perturbed and not w.perturbed
        return fn(w.value, x.value), w.value

    fn.defvjp(forward, lambda w, ct: (None, ct @ w.T), symbolic_zeros=True)
    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    use = lambda p, x: fn(p["w"], x)  # noqa: E731
    adapters = plan(use, params, LoraConfig(r=2, target_modules=["w"]), x).init(jax.random.key(0))
    got = jax.grad(lambda x: lora(use)(params, adapters, x).sum())(x)
    np.testing.assert_allclose(got, 3 * x, rtol=1e-6)


def test_a_derivative_that_closes_over_a_weight_is_refused():
    """JAX itself would leave out what is closed over: the gradient would be a part of itself."""

    def fn(p, x):
        @jax.custom_jvp
        def inner(x):
            return x @ p["w"]

        inner.defjvp(lambda primals, tangents: (inner(*primals), 2.0 * tangents[0] @ p["w"]))
        return inner(x)

    params, x = {"w": jnp.ones((3, 3))}, jnp.ones((2, 3))
    with pytest.raises(PlanError, match=r"w: custom_jvp_call.*no argument.*test_derivatives.py"):
        plan(fn, params, LoraConfig(r=2, target_modules=["w"]), x)
