"""``wrap`` of both Flax front ends: training, state, sharing, and what goes in and out."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lora_jax import LoraConfig, linen, lora, merge, plan
from lora_jax import nnx as lora_nnx
from lora_jax.core import paths
from lora_jax.core.errors import AdapterError, LoraError
from lora_jax.nnx import LoRAModel, LoRAParam
from lora_jax.peft import load_pretrained, save_pretrained
from parity_tests.laws.laws import relative

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
WRT = nnx.DiffState(0, LoRAParam)


class Model(nnx.Module):
    """``mix`` is one module under two names; the call counts, drops and keeps statistics."""

    def __init__(self, rngs):
        self.up = nnx.Linear(6, 5, rngs=rngs)
        self.mix = self.again = nnx.Linear(5, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(self.norm(jnp.tanh(self.mix(self.up(x)))))
        return self.again(x)


def wrapped(model=None, **fields):
    config = LoraConfig(**dict(r=2, lora_alpha=3, target_modules="all-linear") | fields)
    model = Model(nnx.Rngs(0)) if model is None else model
    return lora_nnx.wrap(model, config, X, rngs=nnx.Rngs(1))


def away_from_zero(model: LoRAModel) -> None:
    rng = np.random.default_rng(2)
    values = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype),
        lora_nnx.adapters(model),
    )
    lora_nnx.put(model, values)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def loss(model, x):
    return jnp.sum(jnp.sin(model(x)))


@pytest.mark.slow
def test_a_fresh_wrapper_is_the_model_in_output_and_state():
    plain, model = Model(nnx.Rngs(0)), wrapped()
    with jax.disable_jit():
        for _ in range(2):
            assert bits(model(X)) == bits(plain(X))
    for kind in (nnx.BatchStat, nnx.RngCount):
        assert bits(nnx.state(model.base, kind)) == bits(nnx.state(plain, kind))
    assert int(model.base.dropout.rngs.count[...]) == 2


def test_a_shared_module_is_adapted_once():
    model = wrapped()
    assert {leaf.path: leaf.sites for leaf in model.plan.adapted} == {
        "again.kernel": 2,
        "up.kernel": 1,
    }
    assert model.base.mix is model.base.again


def test_training_moves_the_adapters_alone():
    model = wrapped(bias="all")
    frozen = bits(nnx.state(model.base, nnx.Param))
    before = bits(nnx.state(model, LoRAParam))
    statistics = bits(nnx.state(model, nnx.BatchStat))
    optimizer = nnx.Optimizer(model, optax.sgd(1e-1), wrt=LoRAParam)

    @nnx.jit
    def step(model, optimizer, x):
        value, gradient = nnx.value_and_grad(loss, argnums=WRT)(model, x)
        optimizer.update(model, gradient)
        return value

    values = [float(step(model, optimizer, X)) for _ in range(3)]
    assert len(set(values)) == 3
    assert bits(nnx.state(model.base, nnx.Param)) == frozen
    assert not set(before) & set(bits(nnx.state(model, LoRAParam)))
    assert not set(statistics) & set(bits(nnx.state(model, nnx.BatchStat)))
    assert int(model.base.dropout.rngs.count[...]) == 3
    assert {"norm.bias", "up.bias"} < lora_nnx.adapters(model).keys()


def test_outputs_and_gradients_are_those_of_the_function():
    model = wrapped()
    away_from_zero(model)
    model.eval()
    graph, params, rest = nnx.split(model.base, nnx.Param, ...)

    def fn(params, x):
        return nnx.merge(graph, params, rest, copy=True)(x)

    adapters = lora_nnx.adapters(model)
    y = nnx.jit(lambda m, x: m(x))(model, X)
    assert relative(y, jax.jit(lora(fn))(params, adapters, X)) < 1e-6
    got = nnx.to_pure_dict(nnx.jit(nnx.grad(loss, argnums=WRT))(model, X))["lora"]
    wanted = jax.grad(lambda a: jnp.sum(jnp.sin(lora(fn)(params, a, X))))(adapters)
    wanted = paths.flatten(wanted)
    assert got.keys() == wanted.keys()
    for path, leaf in wanted.items():
        assert relative(got[path], leaf) < 1e-5, path
    again = nnx.merge(*nnx.split(model), copy=True)
    merged = merge(params, adapters)
    nnx.update(again.base, merged)
    assert relative(again.base(X), model(X)) < 1e-5
    assert relative(again.base(X), model.base(X)) > 1e-2


def test_adapters_go_out_to_a_file_and_in_again(tmp_path):
    model, other = wrapped(bias="all"), wrapped(bias="all")
    away_from_zero(model)
    assert not set(bits(nnx.state(other, LoRAParam))) & set(bits(nnx.state(model, LoRAParam)))
    save_pretrained(tmp_path / "a", model.plan, lora_nnx.adapters(model))
    lora_nnx.put(other, load_pretrained(tmp_path / "a", other.plan))
    assert bits(nnx.state(other, LoRAParam)) == bits(nnx.state(model, LoRAParam))
    assert bits(nnx.jit(lambda m, x: m(x))(other, X)) == bits(nnx.jit(lambda m, x: m(x))(model, X))


def test_put_lists_everything_that_does_not_fit_and_sets_nothing():
    model, other = wrapped(), wrapped(r=3)
    before = bits(nnx.state(model, LoRAParam))
    values = lora_nnx.adapters(other)
    values["down.kernel"] = values.pop("again.kernel")
    with pytest.raises(AdapterError) as caught:
        lora_nnx.put(model, values)
    assert str(caught.value).splitlines()[1:] == [
        "  again.kernel.a: got none, wanted (5, 2)",
        "  again.kernel.b: got none, wanted (2, 5)",
        "  down.kernel.a: got (5, 3), wanted none",
        "  down.kernel.b: got (3, 5), wanted none",
        "  up.kernel.a: got (6, 3), wanted (6, 2)",
        "  up.kernel.b: got (3, 5), wanted (2, 5)",
    ]
    assert bits(nnx.state(model, LoRAParam)) == before


def test_dropout_of_the_low_rank_path_follows_train_eval_and_the_call():
    class Call(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 5, rngs=nnx.Rngs(0))

        def __call__(self, x, deterministic=None):
            return self.linear(x)

    model = wrapped(Call(), lora_dropout=0.5)
    away_from_zero(model)
    run = nnx.jit(lambda model, x, **options: model(x, **options), static_argnames="deterministic")
    one, two = run(model, X), run(model, X)
    assert bits(one) != bits(two), "each call draws its own mask"
    still = run(model, X, deterministic=True)
    assert bits(still) == bits(run(model, X, deterministic=True))
    model.eval()
    assert bits(run(model, X)) == bits(still)
    assert bits(run(model, X, deterministic=False)) != bits(still)
    model.train()
    assert bits(run(model, X)) != bits(still)


def test_random_streams_among_the_arguments_advance():
    class Call(nnx.Module):
        def __init__(self):
            self.linear, self.dropout = nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            return self.dropout(self.linear(x), rngs=rngs)

    plain, config = Call(), LoraConfig(r=2, target_modules="all-linear")
    model = lora_nnx.wrap(plain, config, X, nnx.Rngs(3), rngs=nnx.Rngs(1))
    ours, theirs = nnx.Rngs(3), nnx.Rngs(3)
    with jax.disable_jit():
        for _ in range(2):
            assert bits(model(X, rngs=ours)) == bits(plain(X, rngs=theirs))
    assert int(ours.default.count[...]) == 2


def test_transforms_inside_the_model_are_followed():
    class Inside(nnx.Module):
        def __init__(self):
            self.up, self.down = (nnx.Linear(6, 6, rngs=nnx.Rngs(n)) for n in range(2))

        def __call__(self, x):
            x = nnx.remat(lambda layer, x: jnp.tanh(layer(x)))(self.up, x)
            return nnx.jit(lambda layer, x: layer(x))(self.down, x)

    model = wrapped(Inside())
    assert {leaf.sites for leaf in model.plan.adapted} == {1}
    away_from_zero(model)
    merged = nnx.clone(model.base)
    nnx.update(merged, merge(nnx.state(merged, nnx.Param), lora_nnx.adapters(model)))
    assert relative(model(X), merged(X)) < 1e-6


def test_a_call_that_adds_modules_is_refused():
    class Growing(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 5, rngs=nnx.Rngs(0))

        def __call__(self, x):
            self.new = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
            return self.linear(x)

    model = wrapped(Growing())
    with pytest.raises(LoraError, match="changes the model's structure in a way that cannot be"):
        model(X)


class Two(nn.Module):
    def setup(self):
        self.up, self.down = nn.Dense(5), nn.Dense(6)

    def __call__(self, x):
        return self.down(self.encode(x))

    def encode(self, x):
        self.sow("intermediates", "x", x)
        return jnp.tanh(self.up(x))


def test_linen_wrap_is_apply():
    params = Two().init(jax.random.key(0), X)["params"]
    for method in (None, Two.encode, "encode"):
        fn = linen.wrap(Two(), method)
        for mutable in (False, ["intermediates"], "intermediates"):
            wanted = Two().apply({"params": params}, X, method=method, mutable=mutable)
            assert bits(fn(params, X, mutable=mutable)) == bits(wanted)
    found = plan(fn, params, LoraConfig(r=2, target_modules="all-linear"), X)
    assert [leaf.path for leaf in found.adapted] == ["up.kernel"]
    step = jax.jit(lora(fn), static_argnames="mutable")
    y, state = step(params, found.init(jax.random.key(1)), X, mutable="intermediates")
    assert y.shape == (4, 5) and bits(state["intermediates"]["x"]) == bits([X])


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


def test_linen_wrap_passes_on_state_and_keys():
    variables = jax.jit(Noisy().init, static_argnames="train")(jax.random.key(0), X, train=False)
    params, stats = variables["params"], jax.tree.map(lambda leaf: leaf + 2, variables)
    state, fn = {"batch_stats": stats["batch_stats"]}, linen.wrap(Noisy())
    rngs = {"dropout": jax.random.key(1)}
    for options in (dict(train=False), dict(train=True, rngs=rngs, mutable=["batch_stats"])):
        wanted = Noisy().apply({"params": params, **state}, X, **options)
        assert bits(fn(params, X, variables=state, **options)) == bits(wanted)


def test_linen_wrap_refuses_a_second_set_of_parameters():
    variables = Two().init(jax.random.key(0), X)
    with pytest.raises(LoraError, match="got the collection 'params', wanted the others alone"):
        linen.wrap(Two())(variables["params"], X, variables=variables)
