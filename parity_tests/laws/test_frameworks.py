"""The laws on every framework's models: paths, containers, state and random keys."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import freeze

from lora_jax import linen
from parity_tests.laws import laws
from parity_tests.models.model_subjects import Built, Model, drawn, normal
from parity_tests.tiers import cases

N, T, D, HEADS, FFN = 3, 4, 6, 2, 10


class Net(nn.Module):
    """A projection to heads and back, batch statistics and dropout."""

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.DenseGeneral((HEADS, 5))(x))
        x = nn.Dropout(0.3, deterministic=not train)(nn.relu(x))
        return nn.DenseGeneral(7, axis=(-2, -1))(x)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        def layer(module: Any, x: Any, _: Any) -> Any:
            return x + nn.Dense(D)(jnp.tanh(nn.Dense(FFN)(x))), None

        scanned = nn.scan(
            nn.remat(layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return scanned(self, x, None)[0]


def linen_net(dtype: Any, container: Any = dict) -> Built:
    x, fn = normal(N, D, dtype=dtype), linen.wrap(Net())
    init = partial(Net().init, train=False)
    variables = drawn(jax.eval_shape(init, jax.random.key(0), x), dtype)

    def step(params: Any, variables: Any, key: Any, x: Any) -> Any:
        options = dict(rngs={"dropout": key}, mutable=["batch_stats"])
        return fn(params, x, variables=variables, **options)

    stats = {"batch_stats": variables["batch_stats"]}
    return step, container(variables["params"]), (stats, jax.random.key(1), x)


def linen_scan(dtype: Any) -> Built:
    x = normal(N, D, dtype=dtype)
    params = drawn(jax.eval_shape(Stack().init, jax.random.key(0), x), dtype)["params"]
    return linen.wrap(Stack()), params, (x,)


class Mixer(nnx.Module):
    """``mix`` is one module under two names."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.heads = nnx.Einsum("btd,dhk->bthk", (D, HEADS, 5), (HEADS, 5), rngs=rngs)
        self.back = nnx.LinearGeneral((HEADS, 5), D, axis=(-2, -1), rngs=rngs)
        self.mix = self.again = nnx.Linear(D, D, rngs=rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.norm(jnp.tanh(self.mix(self.back(self.heads(x)))))
        return self.again(self.dropout(x))


def of_nnx(make: Any, dtype: Any) -> Built:
    """As NNX's users do it: the parameters as a State, the rest as another."""
    graph, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)

    def fn(params: Any, rest: Any, x: Any) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        return model(x), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return fn, drawn(params, dtype), (drawn(rest, dtype), normal(N, T, D, dtype=dtype))


def nnx_attention(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)


def eqx_mlp(dtype: Any) -> Built:
    """The model is the parameters, its activations leaves that are no arrays."""
    model = drawn(eqx.nn.MLP(D, 7, FFN, 2, key=jax.random.key(0)), dtype)
    assert any(callable(leaf) for leaf in jax.tree.leaves(model))
    return lambda model, x: jax.vmap(model)(x), model, (normal(N, D, dtype=dtype),)


def eqx_attention(dtype: Any) -> Built:
    model = drawn(eqx.nn.MultiheadAttention(HEADS, D, key=jax.random.key(0)), dtype)
    x = normal(N, T, D, dtype=dtype)
    return lambda model, x: jax.vmap(model)(x, x, x), model, (x,)


class Block(hk.Module):
    """A submodule of ``__init__`` has the path ``block/~/inner``, others ``block/outer``."""

    def __init__(self, name: str = "block") -> None:
        super().__init__(name=name)
        self.inner = hk.Linear(FFN, name="inner")

    def __call__(self, x: Any) -> Any:
        return hk.Linear(7, name="outer")(jnp.tanh(self.inner(x)))


def haiku_block(dtype: Any) -> Built:
    model, x = hk.transform(lambda x: Block()(x)), normal(N, D, dtype=dtype)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), x), dtype)
    assert set(params) == {"block/~/inner", "block/outer"}
    return lambda params, x: model.apply(params, None, x), params, (x,)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layers:
    up: Any
    down: Any


def plain(container: Any, dtype: Any) -> Built:
    """A function on a list of dicts, or of dataclasses."""
    shapes = [dict(up=(D, FFN), down=(FFN, D)), dict(up=(D, 8), down=(8, 7))]
    params = [
        container(**{name: normal(*s, dtype=dtype, seed=n) / 3 for name, s in layer.items()})
        for n, layer in enumerate(shapes)
    ]

    def fn(params: Any, x: Any) -> Any:
        for layer in params:
            get = layer.get if isinstance(layer, dict) else partial(getattr, layer)
            x = jnp.tanh(x @ get("up")) @ get("down")
        return x

    return fn, params, (normal(N, D, dtype=dtype),)


LINEN = {"DenseGeneral_0": "ioo", "DenseGeneral_1": "iio"}
HEADED = {"query": "ioo", "key": "ioo", "value": "ioo", "out": "iio"}
EQX = ("query_proj", "key_proj", "value_proj", "output_proj")

SUBJECTS = [
    Model("linen", linen_net, LINEN, 2),
    Model("linen_frozen_dict", partial(linen_net, container=freeze), LINEN, 2),
    Model("linen_scan", linen_scan, {"Dense_0": "sio", "Dense_1": "sio"}, 2),
    Model(
        "nnx_mixer",
        partial(of_nnx, Mixer),
        {"heads": "ioo", "back": "iio", "again": "io"},
        3,
        sites={"again": 2},
    ),
    Model("nnx_attention", partial(of_nnx, nnx_attention), HEADED, 4),
    Model("eqx_mlp", eqx_mlp, {"layers.0": "oi", "layers.1": "oi", "layers.2": "oi"}, 3),
    Model("eqx_attention", eqx_attention, dict.fromkeys(EQX, "oi"), 4),
    Model("haiku", haiku_block, {"inner": "io", "block.outer": "io"}, 2),
    Model("dicts", partial(plain, dict), {"0.up": "io", "down": "io"}, 3),
    Model("dataclasses", partial(plain, Layers), {"up": "io", "1.down": "io"}, 3),
]


# Laws that compile a whole model or run it op by op: the operations have them in the default
# suite. The twins are models that others are alike.
SLOW = ("frugality", "transforms", "identity")
TWINS = ("linen_frozen_dict", "nnx_attention", "eqx_attention")


@pytest.mark.parametrize("law", cases(laws.ALL, slow=SLOW, name=lambda law: law.__name__))
@pytest.mark.parametrize("subject", cases(SUBJECTS, slow=TWINS))
def test_law(law, subject):
    # What is compiled is looked at, or compared bit by bit.
    whole = law in (laws.identity, laws.frugality)
    with nullcontext() if whole else laws.quick_compilation():
        law(subject)
