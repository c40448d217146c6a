"""Packing: the tokens alone give what the padded batch gives, and moving back undoes moving."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lora_jax.models import BertModel, from_pretrained
from lora_jax.models.packing import NOWHERE, packing, token_places
from parity_tests.models.test_bert import inputs, relative, save_tiny

MASKS = arrays.arrays(
    np.int32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.integers(0, 1)
)


@given(MASKS)
def test_every_token_has_one_place_and_few_shapes_occur(mask):
    places = token_places(mask)
    real = places[places != NOWHERE]
    whole = np.where(mask.any(axis=1, keepdims=True), mask, 1)
    np.testing.assert_array_equal(real, np.flatnonzero(whole))
    quarter = -(-mask.size // 4)
    assert places.size in {mask.size, quarter, 2 * quarter, 3 * quarter}
    assert places.size - real.size < quarter


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_packing_and_spreading_are_each_others_transpose(tokens):
    _, mask, _ = inputs(5, tokens)
    layout, rng = packing(mask.shape, token_places(mask)), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*mask.shape, 3)), jnp.float32)
    rows = jnp.asarray(rng.normal(size=(layout.places.size, 3)), jnp.float32)
    packed, pull = jax.vjp(layout.pack, x)
    np.testing.assert_array_equal(pull(rows)[0], layout.spread(rows))
    spread, pull = jax.vjp(layout.spread, rows)
    np.testing.assert_array_equal(pull(x)[0], packed)
    np.testing.assert_array_equal(layout.pack(layout.spread(packed)), packed)
    np.testing.assert_array_equal(packed[np.asarray(layout.places) == NOWHERE], 0)
    padding = np.where(mask.any(axis=1, keepdims=True), 1 - mask, 0).astype(bool)
    np.testing.assert_array_equal(np.asarray(spread)[padding], 0)
    np.testing.assert_allclose(jnp.vdot(packed, rows), jnp.vdot(x, spread), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("labels", [None, 3])
def test_a_packed_bert_is_the_padded_one(labels, tmp_path):
    kind = transformers.BertForSequenceClassification if labels else transformers.BertModel
    save_tiny(tmp_path, kind, **({"num_labels": labels} if labels else {}))
    bert, params = from_pretrained(tmp_path, labels)
    ids, _, types = inputs(5, 9)
    mask = (np.arange(9) < np.array([3, 4, 2, 0, 9])[:, None]).astype(np.int32)
    places = token_places(mask)
    assert 0 < np.sum(places == NOWHERE) and places.size < mask.size

    @jax.jit
    def outputs(params, places):
        outs = bert.apply({"params": params}, ids, mask, types, places)
        # A row without tokens counts as full, padding of the others is not computed.
        shown = np.where(mask.any(axis=1, keepdims=True), mask, 1)[..., None]
        return (outs[0] * shown, outs[1]) if isinstance(bert, BertModel) else (outs,)

    def loss(params, places):
        return sum(jnp.sum(jnp.sin(3 * out)) for out in outputs(params, places))

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        for got, wanted in zip(outputs(params, places), outputs(params, None), strict=True):
            assert got.dtype == np.float64
            assert relative(got, wanted) <= 1e-13
        got, wanted = (jax.jit(jax.grad(loss))(params, p) for p in (places, None))
        assert (
            relative(
                *(np.concatenate([np.ravel(v) for v in jax.tree.leaves(t)]) for t in (got, wanted))
            )
            <= 1e-12
        )
