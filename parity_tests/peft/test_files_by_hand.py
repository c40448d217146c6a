"""Adapter files by hand: saved, read, compared and combined, from arrays of a few numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoraConfig, load_pretrained, open_adapter, plan, save_pretrained
from lora_jax.cli.combine import CombineOptions, combine_files
from lora_jax.cli.diff import DiffOptions, diff_files
from lora_jax.core.errors import AdapterError
from lora_jax.peft.names.naming import Fused, stacked


def dense(params, x):
    return x @ params["w"]


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


def test_rows_of_different_tokens_are_not_compared(tmp_path):
    params = {"emb": {"embedding": jnp.eye(5, 2)}}

    def fn(params, ids):
        return params["emb"]["embedding"][ids]

    for name, tokens in (("one", [1, 3]), ("two", [1, 4]), ("three", [1, 3])):
        config = LoraConfig(target_modules=[], trainable_token_indices={"emb": tokens})
        found = plan(fn, params, config, jnp.arange(3))
        save_pretrained(tmp_path / name, found, found.init(jax.random.key(0)))

    def said(other):
        text = diff_files(DiffOptions(tmp_path / "one", tmp_path / other))
        return " ".join(next(line for line in text.splitlines() if "rows trained" in line).split())

    assert said("two") == "emb rows trained, [1, 3] and [1, 4]"
    assert said("three") == "emb rows trained, equal"


def test_adapters_that_differ_in_their_scale_alone_differ(tmp_path):
    for name, alpha in (("one", 2), ("two", 6)):
        config = LoraConfig(r=1, lora_alpha=alpha, target_modules=["w"], init_lora_weights=False)
        found = plan(dense, {"w": jnp.eye(2)}, config, jnp.ones((1, 2)))
        save_pretrained(tmp_path / name, found, found.init(jax.random.key(0)))
    text = diff_files(DiffOptions(tmp_path / "one", tmp_path / "two"))
    assert "lora_alpha: 2 and 6" in text
    assert text.splitlines()[-1].split()[-1] == "2"  # |6 - 2| / 2


def test_a_magnitude_that_the_configuration_does_not_know_is_refused(tmp_path):
    params = {"w": jnp.eye(2)}
    config = LoraConfig(r=1, target_modules=["w"], use_dora=True)
    found = plan(dense, params, config, jnp.ones((1, 2)))
    save_pretrained(tmp_path, found, found.init(jax.random.key(0)))
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(AdapterError, match="magnitude_vector: unexpected, as use_dora is false"):
        open_adapter(tmp_path)


def test_adapters_of_different_invocations_are_not_combined(tmp_path):
    for name, tokens in (("one", [1]), ("two", [2]), ("three", [1])):
        config = LoraConfig(r=1, target_modules=["w"], alora_invocation_tokens=tokens)
        found = plan(dense, {"w": jnp.eye(2)}, config, jnp.ones((1, 2)))
        save_pretrained(tmp_path / name, found, found.init(jax.random.key(0)))
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    with pytest.raises(AdapterError, match="different parts of a text"):
        combine_files(CombineOptions(tmp_path / "out", (one, two)))
    combine_files(CombineOptions(tmp_path / "out", (one, three)))


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
