"""Models of LoRA layers: stacked, shared, merged, trained, made from plain ones."""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lora_jax import linen, merge
from lora_jax import nnx as lora_nnx
from lora_jax.core.errors import AdapterError, ConfigError
from lora_jax.linen import LoRADense, LoRADenseGeneral
from lora_jax.nnx import BaseParam, LoRALinear, LoRALinearGeneral, LoRAParam
from parity_tests.laws.layer_subjects import loss, relative, same_bits


class Block(nn.Module):
    """Two LoRA layers and a plain one; ``plain`` gives the same model without low-rank paths."""

    plain: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        low_rank: Any = {} if self.plain else dict(r=2, lora_alpha=3, init_lora_weights=False)
        heads = partial(nn.DenseGeneral if self.plain else LoRADenseGeneral, **low_rank)
        h = jnp.tanh(heads((3, 5), name="heads")(x))
        h = nn.Dense(11, name="frozen")(heads(13, axis=(-2, -1), name="merged")(h))
        out = partial(nn.Dense if self.plain else LoRADense, **low_rank)
        return x + out(7, name="out")(jnp.tanh(h)), None


class Stack(nn.Module):
    plain: bool = False

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "lora": 0}
        layers = nn.scan(nn.remat(Block), axes, split_rngs={"params": True}, length=4)
        return layers(self.plain, name="layers")(x)[0]


def test_linen_layers_stack_under_scan_and_merge():
    model, x = Stack(), jnp.asarray(np.random.default_rng(0).normal(size=(2, 7)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    params, pairs = variables["params"], variables["lora"]
    shapes = jax.tree.map(jnp.shape, pairs["layers"]["merged"])
    assert shapes == {"lora_a": (4, 3, 5, 2), "lora_b": (4, 2, 13)}
    first = pairs["layers"]["out"]["lora_a"]
    assert not same_bits(first[0], first[1]), "each layer draws its own"
    wanted = jax.jit(Stack(plain=True).init)(jax.random.key(0), x)["params"]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), params, wanted)

    adapters = linen.adapters_of(model, variables, x)
    assert {path: (a.axes, a.scale) for path, a in adapters.items()} == {
        "layers.heads.kernel": ("sioo", 1.5),
        "layers.merged.kernel": ("siio", 1.5),
        "layers.out.kernel": ("sio", 1.5),
    }

    def step(pairs):
        y = model.apply({"params": params, "lora": pairs}, x)
        return jnp.sum(jnp.sin(y)), y

    grads, y = jax.jit(jax.grad(step, has_aux=True))(pairs)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))
    merged = {"params": merge(params, adapters)}
    assert relative(jax.jit(Stack(plain=True).apply)(merged, x), y) < 1e-5
    h, block = x, jax.jit(Block().apply)
    for n in range(4):
        h = block({k: jax.tree.map(itemgetter(n), v["layers"]) for k, v in variables.items()}, h)[0]
    assert relative(h, y) < 1e-5


def test_a_checkpoint_gets_its_adapters_by_one_apply():
    """``params`` come from a file; A and B are drawn beside them."""
    x, key = jnp.ones((2, 7), jnp.float32), jax.random.key(0)
    params = nn.Dense(5).init(jax.random.key(1), x)["params"]
    layer = LoRADense(5, r=2)
    _, drawn = layer.apply({"params": params}, x, rngs={"params": key}, mutable=["lora"])
    assert jax.tree.all(jax.tree.map(same_bits, drawn["lora"], layer.init(key, x)["lora"]))


def test_linen_adapters_that_no_layer_uses_are_named():
    x = jnp.ones((2, 7), jnp.float32)
    variables = jax.eval_shape(Block().init, jax.random.key(0), x)
    stray = {**variables["lora"], "other": variables["lora"]["out"]}
    del stray["heads"]
    with pytest.raises(AdapterError) as error:
        linen.adapters_of(Block(), {**variables, "lora": stray}, x)
    assert "heads.lora_a: the variables do not hold it" in str(error.value)
    assert "other.lora_b: no layer uses it" in str(error.value)


def test_a_model_without_adapters_is_no_silent_success():
    x = jnp.ones((2, 7), jnp.float32)
    with pytest.raises(AdapterError, match="no LoRA layer"):
        linen.adapters_of(nn.Dense(5), nn.Dense(5).init(jax.random.key(0), x), x)
    with pytest.raises(AdapterError, match="no LoRA layer"):
        lora_nnx.adapters_of(nnx.Linear(7, 5, rngs=nnx.Rngs(0)))


class Model(nnx.Module):
    """Layers in a list, one of them used twice; ``plain`` gives it without low-rank paths."""

    def __init__(self, rngs, plain=False):
        low_rank: Any = {} if plain else dict(r=2, lora_alpha=3, init_lora_weights=False)
        linear = partial(nnx.Linear if plain else LoRALinear, **low_rank, rngs=rngs)
        heads = partial(nnx.LinearGeneral if plain else LoRALinearGeneral, **low_rank, rngs=rngs)
        self.square = linear(7, 7)
        self.layers = nnx.List([heads(7, (3, 5)), heads((3, 5), 7, axis=(-2, -1)), self.square])
        self.out = nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x):
        for layer in [*self.layers, self.square]:
            x = jnp.tanh(layer(x))
        return self.out(x)


def test_nnx_models_draw_load_and_merge_like_the_plain_one():
    model, plain = Model(nnx.Rngs(0)), Model(nnx.Rngs(0), plain=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7)), jnp.float32)
    params = nnx.state(model, BaseParam)
    assert jax.tree.structure(params) == jax.tree.structure(nnx.state(plain, nnx.Param))
    assert jax.tree.all(jax.tree.map(same_bits, params, nnx.state(plain, nnx.Param)))
    drawn = [np.asarray(a.a).ravel()[:5].tolist() for a in lora_nnx.adapters_of(model).values()]
    assert len({tuple(values) for values in drawn}) == 3, "each layer draws its own"
    adapters = lora_nnx.adapters_of(model)
    assert {path: a.axes for path, a in adapters.items()} == {
        "layers.0.kernel": "ioo",
        "layers.1.kernel": "iio",
        "layers.2.kernel": "io",
    }
    nnx.update(plain, merge(params, adapters))
    assert relative(plain(x), model(x)) < 1e-5


def test_nnx_layers_stack_under_vmap_and_scan():
    @nnx.vmap
    def make(rngs):
        return LoRALinear(7, 7, r=2, lora_alpha=3, init_lora_weights=False, rngs=rngs)

    stack = make(nnx.Rngs(0).split(4))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7)), jnp.float32)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return jnp.tanh(layer(x))

    params, adapters = nnx.state(stack, BaseParam), lora_nnx.adapters_of(stack)
    assert adapters["kernel"].axes == "sio" and adapters["kernel"].scale == 1.5
    assert not same_bits(stack.lora_a[...][0], stack.lora_a[...][1]), "each layer draws its own"
    merged, h = merge(params, adapters), x
    for n in range(4):
        h = jnp.tanh(h @ merged["kernel"][...][n] + merged["bias"][...][n])
    assert relative(run(stack, x), h) < 1e-5


def test_an_optimizer_moves_nothing_but_the_adapters():
    model, x = Model(nnx.Rngs(0)), jnp.ones((2, 7), jnp.float32)
    before = nnx.to_pure_dict(nnx.state(model))
    # Weight decay would move a frozen weight even without a gradient.
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=LoRAParam)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: loss(model, x), argnums=nnx.DiffState(0, LoRAParam))(model)
        optimizer.update(model, grads)
        return grads

    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        grads = step(model, optimizer, x)
    moved = {path for path, same in leaves_that(same_bits, before, model).items() if not same}
    names = [("layers", n) for n in range(3)]
    wanted = {(*name, leaf) for name in names for leaf in ("lora_a", "lora_b")}
    assert moved == wanted == {path for path, _ in nnx.to_flat_state(grads)}


def leaves_that(predicate, before, model):
    now = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(model)))
    then = nnx.traversals.flatten_mapping(before)
    assert now.keys() == then.keys()
    return {path: predicate(now[path], then[path]) for path in now}


def test_from_linear_shares_the_variables():
    x, rngs = jnp.ones((2, 3, 5), jnp.float32), nnx.Rngs(0)
    half = partial(dict, dtype=jnp.bfloat16, rngs=rngs)
    linear = nnx.Linear(5, 7, **half())
    general = nnx.LinearGeneral((3, 5), 7, axis=(-2, -1), **half(use_bias=False))
    for base, cls in ((linear, LoRALinear), (general, LoRALinearGeneral)):
        layer, other = (cls.from_linear(base, r=2, lora_alpha=3, rngs=rngs) for _ in range(2))
        assert layer.kernel is base.kernel and layer.bias is base.bias
        assert layer.dtype == jnp.bfloat16 and layer.adapter.scale == 1.5
        assert same_bits(layer(x), base(x))
        assert not same_bits(layer.lora_a[...], other.lora_a[...]), "each draws its own"
        assert nnx.split(layer, LoRAParam, nnx.Param)
    with pytest.raises(AdapterError, match="got a LinearGeneral, wanted an nnx.Linear"):
        LoRALinear.from_linear(general, rngs=rngs)
    with pytest.raises(AdapterError, match="got a LoRALinear, wanted an nnx.Linear"):
        LoRALinear.from_linear(LoRALinear(5, 7, rngs=rngs), rngs=rngs)
    with pytest.raises(ConfigError, match="r: got 0"):
        LoRALinear.from_linear(linear, r=0, rngs=rngs)
