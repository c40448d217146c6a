"""Layers beside Linear in PEFT's format: the rewriter against PEFT's Embedding and Conv1d to 3d."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from torch import nn

from lora_jax import (
    Adapter,
    LoraConfig,
    load_config,
    load_pretrained,
    lora,
    merge,
    plan,
    save_pretrained,
)
from lora_jax.core.errors import AdapterError
from lora_jax.parity.suite.torch_models import copied, trainable
from lora_jax.peft.tensors import encode
from lora_jax.torch.from_torch import from_torch
from parity_tests.laws.laws import relative
from parity_tests.parity.oracle import UNIT_ROUNDOFF, assert_within_rule

V, D, OUT = 41, 30, 7
RNG = np.random.default_rng(2)


@dataclass(frozen=True)
class Layers:
    """A small PyTorch model, all of whose weights are adapted."""

    modules: Mapping[str, Callable[[], nn.Module]]
    x: np.ndarray

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict((name, make()) for name, make in self.modules.items()))

    @property
    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(self.x)

    @property
    def config(self) -> LoraConfig:
        return LoraConfig(r=3, lora_alpha=4, target_modules=[n for n in self.modules if n != "act"])


def convolutions(conv: Any, *size: int) -> Layers:
    """Two convolutions; neither window nor image is alike in two directions."""
    window, few = tuple(range(3, 3 + len(size))), (2,) * len(size)
    return Layers(
        dict(
            first=lambda: conv(4, 6, window, stride=few, padding=1),
            act=nn.Tanh,
            second=lambda: conv(6, OUT, few, bias=False),
        ),
        RNG.normal(size=(2, 4, *size)).astype(np.float32),
    )


LAYERS = {
    "embedding": Layers(
        dict(table=lambda: nn.Embedding(V, D), act=nn.Tanh, head=lambda: nn.Linear(D, OUT)),
        RNG.integers(0, V, (5, 11)),
    ),
    "conv1d": convolutions(nn.Conv1d, 11),
    "conv2d": convolutions(nn.Conv2d, 9, 12),
    "conv3d": convolutions(nn.Conv3d, 7, 9, 8),
}


@dataclass(frozen=True)
class Given:
    """The model in both frameworks, with an adapter whose B is away from zero."""

    layers: Layers
    module: nn.Module
    fn: Callable[..., Any]
    params: Any
    plan: Any
    adapters: Any


@pytest.fixture(params=LAYERS)
def name(request) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def given(request, name) -> Given:
    layers = LAYERS[name]
    module = layers.make()
    fn, params = from_torch(module)
    config = replace(layers.config, use_dora=request.param)
    found = plan(fn, params, config, layers.x)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, jnp.float32), found.abstract()
    )
    if config.use_dora:  # near the norms, as in training
        fresh = found.init(jax.random.key(0))
        adapters = {
            path: replace(adapter, magnitude=fresh[path].magnitude * (1 + adapter.magnitude / 4))
            for path, adapter in adapters.items()
        }
    return Given(layers, module, fn, params, found, adapters)


def check(got: Mapping[str, Any], theirs: Mapping[str, Any], truth: Mapping[str, Any]) -> None:
    assert got.keys() == theirs.keys() == truth.keys()
    for name, value in got.items():
        values = (np.asarray(value), theirs[name], truth[name].astype(np.float64))
        assert_within_rule(*values, 16.0, UNIT_ROUNDOFF["float32"], name)


def test_peft_loads_our_file_and_learns_alike(given, tmp_path):
    saved = save_pretrained(tmp_path / "adapter", given.plan, given.adapters)
    theirs = peft.PeftModel.from_pretrained(given.module, saved, is_trainable=True)

    def run(model: nn.Module) -> dict[str, np.ndarray]:
        x = given.layers.tensor
        logits = model(x.to(next(model.parameters()).dtype) if x.is_floating_point() else x)
        torch.sin(logits).sum().backward()
        return copied({"logits": logits} | {k: p.grad for k, p in trainable(model).items()})

    def loss(adapters):
        logits = lora(given.fn)(given.params, adapters, given.layers.x)
        return jnp.sum(jnp.sin(logits)), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(given.adapters)
    ours = {"logits": logits} | encode(given.plan, gradients)
    base = given.fn(given.params, given.layers.x)
    assert relative(logits, base) > 1e-2, "vacuous: the delta is too small"
    check(ours, run(theirs), run(copy.deepcopy(theirs).double()))


def test_our_merged_weights_are_pefts(given, tmp_path):
    saved = save_pretrained(tmp_path / "adapter", given.plan, given.adapters)
    theirs = peft.PeftModel.from_pretrained(given.module, saved)
    exact = copy.deepcopy(theirs).double().merge_and_unload()
    single = theirs.merge_and_unload()
    check(
        merge(given.params, given.adapters),
        *(copied(dict(model.named_parameters())) for model in (single, exact)),
    )


def test_the_file_loads_again_bit_for_bit(given, tmp_path):
    saved = save_pretrained(tmp_path / "adapter", given.plan, given.adapters)
    again = load_pretrained(saved, given.plan)
    jax.tree.map(np.testing.assert_array_equal, again, given.adapters)


def test_fresh_embeddings_are_pefts():
    layers = LAYERS["embedding"]
    fn, params = from_torch(layers.make())
    table = plan(fn, params, layers.config, layers.x).init(jax.random.key(0))["table.weight"]
    assert isinstance(table, Adapter) and table.axes == "io"
    assert not np.any(table.a) and abs(float(table.b.std()) - 1) < 0.25


def convolve(params: Any, x: Any, groups: int = 1) -> Any:
    """A convolution in Flax's layout, which is not PyTorch's."""
    return jax.lax.conv_general_dilated(
        x,
        params["conv"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_a_kernel_in_flax_layout_is_written_in_pytorchs(tmp_path):
    rng = np.random.default_rng(3)
    params = {"conv": {"kernel": jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)}}
    config = LoraConfig(r=2, target_modules=["conv"])
    found = plan(convolve, params, config, jnp.ones((1, 6, 7, 4)))
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), found.abstract()
    )
    saved = save_pretrained(tmp_path / "adapter", found, adapters)
    module = nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 5, (2, 3), bias=False)))
    with torch.no_grad():
        module.conv.weight.copy_(
            torch.from_numpy(np.array(params["conv"]["kernel"].transpose(3, 2, 0, 1)))
        )
    theirs = peft.PeftModel.from_pretrained(module, saved).merge_and_unload().conv.weight
    ours = merge(params, adapters)["conv"]["kernel"].transpose(3, 2, 0, 1)
    assert relative(ours, theirs.detach().numpy()) <= 1e-6
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(saved, found), adapters)


def test_a_grouped_convolution_is_refused(tmp_path):
    params = {"conv": {"kernel": jnp.ones((2, 3, 2, 6))}}

    def fn(params, x):
        return convolve(params, x, groups=2)

    found = plan(fn, params, LoraConfig(r=2, target_modules=["conv"]), jnp.ones((1, 6, 7, 4)))
    with pytest.raises(AdapterError, match=r"conv.kernel: a grouped convolution"):
        save_pretrained(tmp_path / "adapter", found, found.init(jax.random.key(0)))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("rslora", [False, True])
def test_ranges_of_a_fused_kernel_serve_in_peft(tmp_path, rslora):
    """PEFT knows no ranges: it gets one pair of the whole kernel, zero beside them."""
    module = nn.Sequential(OrderedDict(qkv=nn.Linear(6, 9), out=nn.Linear(9, 4)))
    fn, params = from_torch(module)
    x = RNG.normal(size=(5, 6)).astype(np.float32)
    config = LoraConfig(
        r=2,
        use_rslora=rslora,
        target_modules=["qkv", "out"],
        output_slices={"qkv": [(0, 3), (6, 9)]},
        alpha_pattern={"out": 3},
    )
    found = plan(fn, params, config, x)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape), jnp.float32), found.abstract()
    )
    saved = save_pretrained(tmp_path / "adapter", found, adapters)
    theirs = peft.PeftModel.from_pretrained(module, saved)
    ours = lora(fn)(params, adapters, x)
    assert relative(ours, fn(params, x)) > 1e-2, "vacuous"
    assert relative(ours, theirs(torch.from_numpy(x)).detach().numpy()) <= 1e-6
    again = load_pretrained(saved, plan(fn, params, load_config(saved), x))
    assert again["qkv.weight"].b.shape == (4, 9)
    assert relative(lora(fn)(params, again, x), ours) <= 1e-6


def test_adapters_of_another_scale_rank_or_kind_are_refused(tmp_path):
    layers = LAYERS["embedding"]
    fn, params = from_torch(layers.make())
    found = plan(fn, params, layers.config, layers.x)
    wider = plan(fn, params, LoraConfig(r=5, target_modules=["table", "head"]), layers.x)
    with pytest.raises(AdapterError) as error:
        save_pretrained(tmp_path / "adapter", found, wider.init(jax.random.key(0)))
    said = str(error.value)
    assert (
        "head.weight: got {'a': (30, 5), 'b': (5, 7)}, wanted {'a': (30, 3), 'b': (3, 7)}" in said
    )
    assert "table.weight: got scale 1.6, the configuration's is 1.33333" in said
    assert not (tmp_path / "adapter").exists()
