"""Single values by hand, each from arrays of a few numbers.

No test here is a case of a table, of which the default run takes a part by its position: each
runs always, whatever is added elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import (
    Adapter,
    LoraConfig,
    load_pretrained,
    lora,
    merge,
    open_adapter,
    plan,
    save_pretrained,
)
from lora_jax.errors import AdapterError
from lora_jax.initializers import draw
from lora_jax.inits.activations import eva
from lora_jax.naming import Fused, stacked

W = np.array([[3.0, 0.0], [4.0, 1.0]])
A, B = np.array([[1.0], [2.0]]), np.array([[2.0, -1.0]])


def pair(a=A, b=B, scale=0.5, **fields):
    return Adapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scale, **fields)


def whole(x, dtype="float32"):
    return jnp.asarray(x, dtype)


def dense(params, x):
    return x @ params["w"]


# What is merged


def test_dora_is_merged_with_its_gain():
    # W + s·A·B = [[4, -0.5], [6, 0]], whose columns have the norms √52 and 0.5
    moved = W + 0.5 * A @ B
    magnitude = np.array([1.0, 4.0])
    adapters = {"w": pair(magnitude=whole(magnitude))}
    wanted = moved * magnitude / np.array([math.sqrt(52), 0.5])
    merged = merge({"w": whole(W)}, adapters)
    np.testing.assert_allclose(merged["w"], wanted, rtol=1e-6)
    got = lora(dense)({"w": whole(W)}, adapters, jnp.eye(2))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


# Products that share x·A


def test_products_of_one_input_keep_their_own_a_where_they_share():
    rng = np.random.default_rng(0)
    names = ("q", "k", "v")
    params = {name: whole(rng.normal(size=(4, 4))) for name in names}
    adapters = {
        name: pair(rng.normal(size=(4, 2)), rng.normal(size=(2, 4)), scale)
        for name, scale in zip(names, (0.5, 1.0, 2.0), strict=True)
    }
    x = whole(rng.normal(size=(3, 4)))

    def fn(params, x):
        return [x @ params[name] for name in names]

    for name, got in zip(names, lora(fn)(params, adapters, x), strict=True):
        one = adapters[name]
        change = one.scale * np.float64(one.a) @ np.float64(one.b)
        wanted = np.float64(x) @ (np.float64(params[name]) + change)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=name)


# What trains and how it starts


def test_lora_only_trains_the_biases_of_adapted_modules_alone():
    params = {name: {"kernel": jnp.eye(2), "bias": jnp.ones(2)} for name in ("up", "head")}

    def fn(params, x):
        for name in ("up", "head"):
            x = x @ params[name]["kernel"] + params[name]["bias"]
        return x

    for bias, wanted in (
        ("none", set()),
        ("lora_only", {"up.bias"}),
        ("all", {"up.bias", "head.bias"}),
    ):
        config = LoraConfig(r=1, target_modules=["up"], bias=bias)
        assert set(plan(fn, params, config, jnp.ones((1, 2))).full) == wanted, bias


def test_a_weight_counts_once_however_many_of_its_ranges_are_adapted():
    params = {"w": jnp.ones((2, 6)), "b": jnp.ones(6)}
    config = LoraConfig(r=1, target_modules=["w"], output_slices={"w": ((0, 2), (3, 5))})
    found = plan(lambda p, x: x @ p["w"] + p["b"], params, config, jnp.ones((1, 2)))
    # each range: A (2, 1) and B (1, 2)
    assert (found.base, found.trainable) == (12 + 6, 2 * (2 + 2))


def test_gaussian_has_a_deviation_of_one_over_r():
    for r in (4, 8):
        a, b = draw(jax.random.key(0), "gaussian", (500, 3), "io", r=r)
        assert abs(float(a.std()) * r - 1) < 0.05 and not b.any()


def test_a_whitened_direction_is_over_the_root_of_its_singular_value():
    # X less its mean has the singular values 16 and 1, along the axes
    x = np.array([[1.0, 0.5], [-1.0, 0.5], [1.0, -0.5], [-1.0, -0.5]]) * [8, 1] + [2.0, -3.0]
    gram, total, count = whole(x.T @ x), whole(x.sum(axis=0)), jnp.asarray(4.0)
    for whiten, wanted in ((False, [1, 1]), (True, [1 / 4, 1])):
        a, b = eva(gram, total, count, 2, 3, whiten=whiten)
        np.testing.assert_allclose(np.abs(a), np.diag(wanted), atol=1e-5)
        assert not b.any()


# Files and names


def test_no_adapter_of_another_scale_is_saved(tmp_path):
    params = {"w": jnp.eye(2)}
    found = plan(dense, params, LoraConfig(r=2, target_modules=["w"]), jnp.ones((1, 2)))
    adapters = found.init(jax.random.key(0))
    assert adapters["w"].scale == 4.0
    for scale in (4.01, 3.99, 4.2, -4.0):
        with pytest.raises(AdapterError, match="w: got scale"):
            save_pretrained(tmp_path, found, {"w": replace(adapters["w"], scale=scale)})
    save_pretrained(tmp_path, found, {"w": replace(adapters["w"], scale=4.0 * (1 + 1e-7))})


def test_a_table_of_numbered_layers_is_that_of_stacked_ones():
    numbered = {
        "h_{layer}.attn.q": "h.{layer}.q",
        "layers.{layer}.{p:up|down}": "m.{layer}.mlp.{p}",
        "h_{layer}.attn.{p:k|v}": Fused("h.{layer}.kv"),
        "head": "lm_head",
    }
    assert stacked(numbered) == {
        "h.attn.q": "h.{}.q",
        "layers.{p:up|down}": "m.{}.mlp.{p}",
        "h.attn.{p:k|v}": Fused("h.{}.kv"),
        "head": "lm_head",
    }


def test_no_value_that_is_not_finite_is_loaded(tmp_path):
    params = {"w": jnp.eye(2)}
    found = plan(dense, params, LoraConfig(r=1, target_modules=["w"]), jnp.ones((1, 2)))
    adapters = found.init(jax.random.key(0))
    for value in (math.nan, math.inf):
        directory = tmp_path / str(value)
        save_pretrained(directory, found, adapters)
        path = directory / "adapter_model.safetensors"
        content, old = path.read_bytes(), np.float32(adapters["w"].a[1, 0]).tobytes()
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, np.float32(value).tobytes()))
        with pytest.raises(AdapterError, match="NaN or infinite"):
            load_pretrained(directory, found)
        with pytest.raises(AdapterError, match="NaN or infinite"):
            open_adapter(directory)
