"""Lookups: the forms in which authors take rows of an embedding, and what lies beyond its end."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax import LoraConfig, lora, merge, plan
from lora_jax.core.errors import PlanError
from parity_tests.laws import laws

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


# Functions of a table, ids and one id: what DoRA's gain, rows and the usual pair all go through.
OF_ONE = {
    "a row": lambda w, ids, i: jnp.tanh(w[i]),
    "a row of one": lambda w, ids, i: jnp.tanh(lax.dynamic_slice_in_dim(w, i, 1)),
    "a row, tied": lambda w, ids, i: jnp.tanh(w[i]) @ w.T,
    "a column": lambda w, ids, i: jnp.tanh(w[:, i]),
    "a row in the loop": lambda w, ids, i: lax.scan(lambda h, i: (h + w[i], w[i]), w[i], ids),
    "a row in a branch": lambda w, ids, i: lax.cond(i > 2, lambda: w[i], lambda: 2 * w[i + 1]),
    "padding": lambda w, ids, i: jnp.where((ids == 3)[:, None], 0.0, w[ids]),
    "padding by a product": lambda w, ids, i: w[ids] * jnp.float32(ids != 3)[:, None],
    "a padded row": lambda w, ids, i: jnp.where(i == 0, 0.0, w[i]),
}


@pytest.mark.parametrize("added", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_rows_that_the_data_chooses_one_by_one(added):
    config = LoraConfig(r=2, target_modules=["w"], **added)
    ids, one, params = jnp.array([1, 3, 5]), jnp.array(4), {"w": W}
    for name, form in OF_ONE.items():
        fn = lambda p, ids, one, form=form: form(p["w"], ids, one)  # noqa: E731
        found = plan(fn, params, config, ids, one)
        assert "gather" in found.adapted[0].primitives, name
        adapters = drawn(found)
        got, wanted = with_gradients(fn, params, adapters, ids, one)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5, err_msg=name)


def with_gradients(fn, params, adapters, *args):
    """Return outputs and gradients of the adapted function, and of the merged weights."""

    def of(call):
        def loss(adapters):
            outs = call(adapters)
            return sum(jnp.sum(jnp.sin(out)) for out in jax.tree.leaves(outs)), outs

        return jax.grad(loss, has_aux=True)(adapters)

    with laws.quick_compilation():
        return jax.jit(
            lambda adapters: (
                of(lambda a: lora(fn)(params, a, *args)),
                of(lambda a: fn(merge(params, a), *args)),
            )
        )(adapters)


def test_a_layer_of_a_stack_of_vectors_is_no_lookup():
    """A counter of layers is not the data: a norm's scale is no embedding."""
    forms = {
        "a number": lambda w, x: x * w[3],
        "a counter": lambda w, x: lax.fori_loop(0, 4, lambda n, x: x * w[n], x),
        "a scan": lambda w, x: lax.scan(lambda x, n: (x * w[n], None), x, jnp.arange(4))[0],
    }
    for form in forms.values():
        with pytest.raises(PlanError, match="w: mul"):
            plan(
                lambda p, x, form=form: form(p["w"], x),
                {"w": W},
                LoraConfig(r=2, target_modules=["w"]),
                X,
            )


def test_a_bias_and_a_single_element_are_refused():
    for form, options, why in [
        (lambda w, i: w[i], {"lora_bias": True}, "lora_bias has no rule for rows"),
        (lambda w, i: w[i, i], {}, "rows are looked up in a way that has no rule"),
    ]:
        with pytest.raises(PlanError, match=why):
            plan(
                lambda p, i, form=form: form(p["w"], i),
                {"w": W},
                LoraConfig(r=2, target_modules=["w"], **options),
                jnp.array(2),
            )
