"""Embeddings in PEFT's format: the rewriter's lookups against PEFT's own Embedding layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from lora_jax import Adapter, LoraConfig, load_pretrained, lora, plan, save_pretrained
from lora_jax.errors import AdapterError
from parity_tests.oracle import UNIT_ROUNDOFF, assert_within_rule

V, D, OUT = 41, 30, 7
IDS = np.random.default_rng(2).integers(0, V, (5, 11), np.int32)
CONFIG = LoraConfig(r=3, lora_alpha=4, target_modules=["table", "head"])


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(V, D)
        self.head = torch.nn.Linear(D, OUT)

    def forward(self, ids):
        return self.head(torch.tanh(self.table(ids)))


def fn(params, ids):
    hidden = jnp.tanh(jnp.take(params["table.weight"], ids, axis=0))
    return hidden @ params["head.weight"].T + params["head.bias"]


@pytest.fixture
def both():
    torch.manual_seed(0)
    model = Model()
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in model.named_parameters()}
    found = plan(fn, params, CONFIG, IDS)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, jnp.float32), found.abstract()
    )
    return model, params, found, adapters


def test_pefts_embedding_loads_our_file_and_learns_alike(both, tmp_path):
    model, params, found, adapters = both
    directory = save_pretrained(tmp_path / "adapter", found, adapters)
    theirs = peft.PeftModel.from_pretrained(model, directory, is_trainable=True)
    runs = {}
    for name, module in {"float": theirs, "double": theirs}.items():
        module = module.double() if name == "double" else module
        module.zero_grad()
        logits = module(torch.from_numpy(IDS).long())
        torch.sin(logits).sum().backward()
        gradients = {
            key.replace("base_model.model.", "").replace(".default", ""): p.grad.numpy().copy()
            for key, p in module.named_parameters()
            if p.requires_grad
        }
        runs[name] = {"logits": logits.detach().numpy()} | gradients

    def loss(adapters):
        logits = lora(fn)(params, adapters, IDS)
        return jnp.sum(jnp.sin(logits)), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters)
    ours = {
        "logits": logits,
        "table.lora_embedding_A": gradients["table.weight"].a.T,
        "table.lora_embedding_B": gradients["table.weight"].b.T,
        "head.lora_A.weight": gradients["head.weight"].a.T,
        "head.lora_B.weight": gradients["head.weight"].b.T,
    }
    assert ours.keys() == runs["float"].keys()
    for name, value in ours.items():
        truth = runs["double"][name].astype(np.float64)
        unit = UNIT_ROUNDOFF["float32"]
        assert_within_rule(np.asarray(value), runs["float"][name], truth, 16.0, unit, name)


def test_the_file_loads_again_bit_for_bit(both, tmp_path):
    _, _, found, adapters = both
    again = load_pretrained(save_pretrained(tmp_path / "adapter", found, adapters), found)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_fresh_embeddings_are_pefts(both):
    _, _, found, _ = both
    table = found.init(jax.random.key(0))["table.weight"]
    assert isinstance(table, Adapter) and table.axes == "io"
    assert not np.any(table.a) and abs(float(table.b.std()) - 1) < 0.25


def test_what_pefts_format_has_no_place_for_is_refused(tmp_path):
    params, x = {"qkv": jnp.ones((6, 9)), "conv": jnp.ones((3, 9, 4))}, jnp.ones((2, 5, 6))

    def model(params, x):
        spec = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(
            x @ params["qkv"], params["conv"], (1,), "SAME", dimension_numbers=spec
        )

    config = LoraConfig(r=2, target_modules=["qkv", "conv"], output_slices={"qkv": [(0, 3)]})
    found = plan(model, params, config, x)
    with pytest.raises(AdapterError) as error:
        save_pretrained(tmp_path / "adapter", found, found.init(jax.random.key(0)))
    assert "qkv[0:3]: a range" in str(error.value) and "conv: a convolution" in str(error.value)
    assert not (tmp_path / "adapter").exists()
