"""Initialisations of stacked layers and split heads, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from lora_jax import LoraConfig, initialise, lora, merge, plan, relative_to
from lora_jax.adapters.inits import activations
from lora_jax.core.errors import AdapterError, ConfigError
from lora_jax.core.initializers import init_problems
from parity_tests.laws.init_subjects import KEY, inputs, ours
from parity_tests.parity.oracle import rel_l2

UNIT = 2.0**-24


def stacked_fn(params, x):
    """Layers stacked for a scan, then heads: ``sio`` and ``ioo``."""
    x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])
    return jnp.einsum("nd,dhk->nhk", x, params["heads"])


def stacked():
    rng = np.random.default_rng(5)
    params = {
        "layers": jnp.asarray(rng.normal(size=(3, 8, 8)) / 2, jnp.float32),
        "heads": jnp.asarray(rng.normal(size=(8, 2, 5)) / 2, jnp.float32),
    }
    return params, [(jnp.asarray(x),) for x in inputs()]


@pytest.mark.parametrize("init", ["olora", "pissa", "pissa_niter_4", "corda", "lora_ga"])
def test_stacked_layers_and_heads_keep_their_outputs(init):
    params, batches = stacked()
    config = LoraConfig(r=3, init_lora_weights=init, target_modules=["layers", "heads"])
    found = plan(stacked_fn, params, config, *batches[0])

    def of(params, x):
        out = stacked_fn(params, x)
        return (out**2).mean() if init == "lora_ga" else out

    base, adapters = initialise(found, params, KEY, fn=of, batches=batches)
    assert {x.axes for x in found.adapted} == {"sio", "ioo"}
    wanted = np.float64(stacked_fn(params, *batches[0]))
    got = np.asarray(lora(stacked_fn)(base, adapters, *batches[0]))
    assert rel_l2(got, wanted) < 100 * UNIT
    again = merge(base, adapters)
    for path, leaf in params.items():
        assert not np.array_equal(base[path], leaf)
        np.testing.assert_allclose(again[path], leaf, atol=2e-6)


def test_moments_of_stacked_layers_are_those_of_each_layers_inputs():
    params, batches = stacked()
    config = LoraConfig(r=3, init_lora_weights="eva", target_modules=["layers", "heads"])
    found = plan(stacked_fn, params, config, *batches[0])
    for remat in (False, True):
        of = jax.checkpoint(stacked_fn) if remat else stacked_fn
        seen = activations.moments(of, params, found.adapted, batches)
        x = np.concatenate([np.float64(x) for (x,) in batches])
        for k in range(3):
            np.testing.assert_allclose(seen["layers"].gram[k], x.T @ x, rtol=2e-5, atol=1e-4)
            np.testing.assert_allclose(seen["layers"].total[k], x.sum(0), rtol=2e-5, atol=1e-4)
            assert seen["layers"].count[k] == len(x) == 80
            x = np.tanh(x @ np.float64(params["layers"][k]))
        np.testing.assert_allclose(seen["heads"].gram[0], x.T @ x, rtol=2e-5, atol=1e-4)


def lookup(params, ids):
    return params["embed.weight"][ids] @ params["up.weight"]


def convolved(params, x):
    x = jax.lax.conv_general_dilated(x, params["conv.weight"], (1,), "SAME")
    return x.swapaxes(1, 2) @ params["up.weight"].T


READING = ("olora", "pissa", "pissa_niter_4", "mica", "eva", "corda", "lora_ga", "loftq")


@pytest.mark.parametrize("init", READING)
def test_weights_that_are_no_matrix_of_a_product_are_refused_by_the_plan(init):
    config = LoraConfig(r=2, init_lora_weights=init, target_modules=["embed", "conv", "up"])
    params = {"conv.weight": jnp.ones((5, 4, 3)), "up.weight": jnp.ones((6, 5))}
    config = replace(config, target_modules=["conv", "up"])
    with pytest.raises(ConfigError, match=f"conv.weight: '{init}' wants .* convolution"):
        plan(convolved, params, config, jnp.ones((2, 4, 7)))
    params = {"embed.weight": jnp.ones((9, 4)), "up.weight": jnp.ones((4, 4))}
    config = replace(config, target_modules=["embed", "up"])
    if init == "mica":  # PEFT has it for embeddings
        assert len(plan(lookup, params, config, jnp.zeros(2, int)).adapted) == 2
        return
    with pytest.raises(ConfigError, match=f"embed.weight: '{init}' wants .* looked up"):
        plan(lookup, params, config, jnp.zeros(2, int))


def test_mica_of_an_embedding_is_pefts():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Embedding(9, 5))
    params = {"0.weight": jnp.asarray(module[0].weight.detach().numpy().copy())}
    fields = dict(r=2, target_modules=["0"], init_lora_weights="mica")
    found = plan(lambda p, ids: p["0.weight"][ids], params, LoraConfig(**fields), jnp.zeros(2, int))
    base, adapters = initialise(found, params, KEY)
    layer = peft.get_peft_model(module, peft.LoraConfig(**fields)).base_model.model[0]
    b = layer.lora_embedding_B["default"].detach().numpy()
    mine = np.asarray(adapters["0.weight"].b).T
    np.testing.assert_allclose(mine @ mine.T, b @ b.T, atol=1e-6)
    assert b.any() and not adapters["0.weight"].a.any()
    assert not layer.lora_embedding_A["default"].any() and base["0.weight"] is params["0.weight"]


def test_what_cannot_be_made_is_refused_with_every_reason():
    params = {"embed.weight": jnp.ones((9, 4)), "up.weight": jnp.ones((4, 4))}
    config = LoraConfig(r=5, init_lora_weights="lora_ga", target_modules=["up"])
    found = plan(lookup, params, config, jnp.zeros(2, int))
    with pytest.raises(ConfigError, match="(?s)fn: got None.*batches.*no such.*'up'.*up.*r=5"):
        initialise(found, params, KEY, whiten=True, direction="up")
    with pytest.raises(ConfigError, match=r"lora_jax\.initialise"):
        found.init(KEY)
    assert found.abstract()["up.weight"].a.shape == (4, 5)
    with pytest.raises(ConfigError, match="pissa_niter_N"):
        plan(lookup, params, replace(config, init_lora_weights="pissa_niter_x"), jnp.zeros(2, int))
    for init, options, message in (
        ("loftq", dict(bits=2, iterations=0), "(?s)bits: got 2, wanted one of 4, 8.*iterations"),
        ("pissa", dict(mask=lambda ids: ids), "mask: 'pissa' has no such option, but none"),
    ):
        found = plan(
            lookup, params, replace(config, r=2, init_lora_weights=init), jnp.zeros(2, int)
        )
        with pytest.raises(ConfigError, match=message):
            initialise(found, params, KEY, **options)
    small = replace(config, r=2, init_lora_weights="eva")
    found = plan(lookup, params, small, jnp.zeros(2, int))
    with pytest.raises(ConfigError, match="got none"):
        initialise(found, params, KEY, fn=lookup, batches=[])
    with pytest.raises(ConfigError, match="up.weight: no input reaches"):
        initialise(
            found,
            params,
            KEY,
            fn=lambda params, ids: jax.lax.stop_gradient(lookup(params, ids)),
            batches=[(jnp.zeros(2, int),)],
        )


def test_a_layer_of_its_own_has_no_weight_to_read():
    assert "wanted one of True" in init_problems("pissa", 2)[0]
    assert not init_problems("pissa", 2, drawn=False)
    assert "'pissa_niter_N'" in init_problems("pisa", 2, drawn=False)[0]


def test_relative_to_refuses_other_adapters():
    found, _, _, adapters = ours(dict(init_lora_weights="pissa"))
    with pytest.raises(AdapterError, match="(?s)down.weight.*not in both"):
        relative_to(found, adapters, {"up.weight": adapters["up.weight"]})
    wider = replace(adapters["up.weight"], scale=9.0)
    with pytest.raises(AdapterError, match="up.weight: got"):
        relative_to(found, adapters, adapters | {"up.weight": wider})


def test_a_drawn_initialisation_needs_no_more_than_before():
    found, params, base, adapters = ours(dict(init_lora_weights=True))
    assert base is params
    drawn = found.init(KEY)
    assert jax.tree.all(jax.tree.map(lambda p, q: bool((p == q).all()), drawn, adapters))
