"""Numbers that multiply a weight, and complex weights: no part of ``s·A·B`` is cast away."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax import Adapter, LoraConfig, lora, merge, plan
from lora_jax.core.errors import AdapterError, PlanError
from parity_tests.laws import laws, subjects_complex
from parity_tests.laws.laws import relative

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(3, 8)), jnp.float32)
PAIR = Adapter(
    jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32),
    jnp.asarray(RNG.normal(size=(2, 6)), jnp.float32),
    0.5,
)


def test_merging_holds_for_every_complex_use():
    with laws.quick_compilation():
        for subject in subjects_complex.ALL:
            laws.merging(subject)


# What a function does to a weight of which A and B must see only what is linear.
CASTS = {
    "to bfloat16": (lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), 1.0),
    "to float16": (lambda w: w.astype(jnp.float16).astype(jnp.float32), 1.0),
    "reduced precision": (lambda w: lax.reduce_precision(w, 8, 2), 1.0),
    "a barrier": (lambda w: lax.optimization_barrier(w), 1.0),
    "a number": (lambda w: w * 1.003, 1.003),
    "a divisor": (lambda w: w / 1.003, 1 / 1.003),
    "a negative number in bfloat16": (
        lambda w: (-(w.astype(jnp.bfloat16) * jnp.bfloat16(0.5))).astype(jnp.float32),
        -0.5,
    ),
}


def test_what_rounds_the_weight_does_not_round_its_change():
    def change(cast, pair):
        fn = lambda p, x: x @ cast(p["w"])  # noqa: E731
        return lora(fn)({"w": W}, {"w": pair}, X) - lora(fn)({"w": W}, {"w": NONE}, X)

    for name, (cast, factor) in CASTS.items():
        wanted = factor * (X @ (PAIR.scale * PAIR.a @ PAIR.b))
        assert relative(change(cast, PAIR), wanted) < 2e-6, name
    # Adapters narrower than the number they are multiplied with round the product, not the number.
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PAIR)
    for number in (1.003, 0.999):
        exact = half.b.astype(jnp.float32) * np.float32(number)
        wanted = X @ (
            half.a.astype(jnp.float32)
            @ (PAIR.scale * exact.astype(jnp.bfloat16).astype(jnp.float32))
        )
        assert relative(change(lambda w, n=number: w * n, half), wanted) < 2e-6, number


NONE = Adapter(jnp.zeros((8, 2)), jnp.zeros((2, 6)), 0.5)


def test_a_cast_to_real_takes_the_real_part_of_the_change():
    def fn(p, x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
            return x @ lax.convert_element_type(
                (1 + 2j) * (lax.complex(p["w"], 0 * W) * (3 - 1j)), jnp.float32
            )

    got = lora(fn)({"w": W}, {"w": PAIR}, X)
    assert relative(got, X @ (5 * merge({"w": W}, {"w": PAIR})["w"])) < 1e-5


def test_a_real_change_has_no_imaginary_part():
    params = {"w": lax.complex(W, 2 * W)}
    config = LoraConfig(r=2, target_modules=["w"])
    with pytest.raises(PlanError, match="w"):
        plan(lambda p, x: x @ p["w"].imag, params, config, X)
    both = lambda p, x: x @ p["w"].real + 1e3 * x @ p["w"].imag  # noqa: E731
    wanted = both(merge(params, {"w": PAIR}), X)
    assert relative(lora(both)(params, {"w": PAIR}, X), wanted) < 1e-6


def test_a_complex_change_of_a_real_weight_is_refused():
    pair = jax.tree.map(lambda leaf: leaf.astype(jnp.complex64), PAIR)
    for use in (lora(lambda p, x: x @ p["w"]), lambda p, a, x: merge(p, a)):
        with pytest.raises(AdapterError, match="w: got complex64 values, wanted real ones"):
            use({"w": W}, {"w": pair}, X)
    complex_w = {"w": lax.complex(W, W)}
    fn = lambda p, x: x.astype(jnp.complex64) @ p["w"]  # noqa: E731
    turned = Adapter(1j * pair.a, pair.b, 0.5)
    wanted = fn(merge(complex_w, {"w": turned}), X)
    got = lora(fn)(complex_w, {"w": turned}, X)
    assert float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)) < 1e-6
