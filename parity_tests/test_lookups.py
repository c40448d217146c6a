"""Lookups: the forms in which authors take rows of an embedding, and what lies beyond its end."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax import LoraConfig, lora, merge, plan
from lora_jax.errors import PlanError
from parity_tests import laws

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(9, 6)), jnp.float32)
STACK = jnp.asarray(RNG.normal(size=(4, 6, 5)), jnp.float32)
IDS = jnp.array([[1, 8, 0], [5, 5, 2]])
X = jnp.asarray(RNG.normal(size=(3, 6)), jnp.float32)

# Functions of a matrix, or of a stack of them, and the letters that planning reads off each.
FORMS = {
    "equinox": (lambda w: jax.vmap(eqx.nn.Embedding(weight=w))(IDS[0]), W, "io"),
    "equinox twice": (lambda w: jax.vmap(jax.vmap(eqx.nn.Embedding(weight=w)))(IDS), W, "io"),
    "mapped": (lambda w: jax.vmap(lambda i: w[i])(IDS[0]), W, "io"),
    "mapped to another axis": (lambda w: jax.vmap(lambda i: w[i], out_axes=1)(IDS[0]), W, "io"),
    "columns": (lambda w: jax.vmap(lambda i: w[:, i])(IDS[0] % 6), W, "oi"),
    "ranges": (lambda w: jax.vmap(lambda i: lax.dynamic_slice_in_dim(w, i, 3))(IDS[0]), W, "io"),
    "ranges of columns": (
        lambda w: jax.vmap(lambda i: lax.dynamic_slice_in_dim(w, i, 2, 1))(IDS[0]),
        W,
        "oi",
    ),
    "beyond the end, moved inside": (lambda w: jax.vmap(lambda i: w[i])(IDS[0] * 3), W, "io"),
    "beyond the end, a number": (
        lambda w: w.at[IDS * 3].get(mode="fill", fill_value=7.0),
        W,
        "io",
    ),
    "experts, two for each": (
        lambda w: jnp.einsum("bd,bkdf->bkf", X[:2], w[IDS % 4]),
        STACK,
        "sio",
    ),
    "experts, summed": (lambda w: jnp.einsum("bkd,bkdf->bf", X[IDS % 3], w[IDS % 4]), STACK, "sio"),
    "experts, one at a time": (
        lambda w: jax.vmap(lambda i, x: x @ w[i])(IDS[0] % 4, X),
        STACK,
        "sio",
    ),
    "experts, two neighbours": (
        lambda w: jax.vmap(lambda i, x: x @ lax.dynamic_slice_in_dim(w, i, 2))(IDS[0] % 4, X),
        STACK,
        "sio",
    ),
    "experts of a layer": (
        lambda w: jax.vmap(lambda i, x: x @ w.reshape(2, 2, 6, 5)[1, i])(IDS[0] % 2, X),
        STACK,
        "sio",
    ),
}


def drawn(found):
    return jax.tree.map(
        lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape), leaf.dtype), found.abstract()
    )


def both(fn, params, adapters):
    """Return what the adapted function gives, and the function of the merged weights."""
    with laws.quick_compilation():
        return jax.jit(lambda p, a: (lora(fn)(p, a), fn(merge(p, a))))(params, adapters)


def test_every_form_of_a_lookup_is_that_of_the_merged_weight():
    for name, (form, w, axes) in FORMS.items():
        params, fn = {"w": w}, lambda p, form=form: form(p["w"])
        found = plan(fn, params, LoraConfig(r=2, target_modules=["w"]))
        assert found.adapted[0].axes == axes, name
        got, wanted = both(fn, params, drawn(found))
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5, err_msg=name)


def test_what_is_no_lookup_of_whole_rows_is_refused():
    forms = {
        "elements": lambda w: jax.vmap(lambda i: w[i, i])(IDS[0] % 6),
        "parts of rows": lambda w: jax.vmap(lambda i: lax.dynamic_slice(w, (i, i), (1, 2)))(IDS[0]),
        "rows of each of a stack": lambda w: jax.vmap(lambda m, i: m[i])(w, IDS[0, :2]),
    }
    for name, form in forms.items():
        params = {"w": W if name != "rows of each of a stack" else STACK[:2]}
        with pytest.raises(PlanError, match="w: gather.* whole rows .*test_lookups.py"):
            plan(lambda p, form=form: form(p["w"]), params, LoraConfig(r=2, target_modules=["w"]))


def test_dora_does_not_scale_what_stands_for_an_index_beyond_the_end():
    def filled(value):
        return lambda p: p["w"].at[IDS * 3].get(mode="fill", fill_value=value)

    config = LoraConfig(r=2, target_modules=["w"], use_dora=True)
    with pytest.raises(PlanError, match="beyond the end"):
        plan(filled(7.0), {"w": W}, config)
    for value in (0.0, jnp.nan):
        fn = filled(value)
        got, wanted = both(fn, {"w": W}, drawn(plan(fn, {"w": W}, config)))
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
