"""Layers behind two of JAX's and Flax's transforms, in every nesting, weights handed out again."""

from __future__ import annotations

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from lora_jax import LoraConfig, lora, merge, plan
from lora_jax.rewrite import passed_through
from parity_tests.laws import laws
from parity_tests.models.model_subjects import drawn

D, TURNS, CONFIG = 5, 3, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
SHAPES = {"up": (D, 7), "down": (7, D)}


def block(h, w):
    """A layer that hands its weights out again, as Flax's transforms make theirs do."""
    return h + jnp.tanh(h @ w["up"]) @ w["down"], w


# Each makes a layer of a layer; ``scan`` wants its weights stacked.
TRANSFORMS = {
    "scan": lambda layer: partial(lax.scan, layer),
    "checkpoint": jax.checkpoint,
    "jit": jax.jit,
    "vmap": lambda layer: jax.vmap(layer, in_axes=(0, None), out_axes=(0, None)),
    "cond": lambda layer: partial(lax.cond, jnp.bool_(True), layer, lambda h, w: (h, w)),
    "fori": lambda layer: lambda h, w: lax.fori_loop(0, 2, lambda _, c: layer(*c), (h, w)),
    "while": lambda layer: (
        lambda h, w: lax.while_loop(
            lambda c: c[0] < 2, lambda c: (c[0] + 1, *layer(*c[1:])), (0, h, w)
        )[1:]
    ),
}
USUAL = ("scan", "checkpoint", "jit", "cond")


def nested(names):
    """Return a function that uses twice nested layers twice, and their weights."""
    layer = block
    for name in reversed(names):
        layer = TRANSFORMS[name](layer)
    lead = (TURNS,) * names.count("scan")
    rng = np.random.default_rng(0)
    weights = {
        name: jnp.asarray(rng.normal(size=(*lead, *shape)) / 4, jnp.float32)
        for name, shape in SHAPES.items()
    }
    rows = (2,) * (1 + names.count("vmap"))
    x = jnp.asarray(rng.normal(size=(*rows, D)), jnp.float32)

    def fn(params, x):
        h, again = layer(x, params)
        return layer(h, again)[0]  # the weights that came out

    return fn, weights, x


def check(models, names, paths, differentiated):
    """Hold the adapted models to the merged ones, all in one program: that compiles sooner."""
    arguments = {}
    for key, (fn, params, x) in models.items():
        found = plan(fn, params, CONFIG, x)
        axes = "s" * key.count("scan") + "io"
        assert {leaf.path: leaf.axes for leaf in found.adapted} == dict.fromkeys(paths, axes), key
        adapters = jax.tree.map(lambda leaf: jnp.ones(leaf.shape) / 8, found.abstract())
        if key in names:
            arguments[key] = params, adapters, x

    def both(arguments):
        got, wanted = {}, {}
        for key, (params, adapters, x) in arguments.items():
            change = partial(lambda fn, p, x, a: lora(fn)(p, a, x), models[key][0], params, x)
            whole = partial(lambda fn, p, x, a: fn(merge(p, a), x), models[key][0], params, x)
            seen = (lambda f, a: _value_and_grad(f, a)) if key in differentiated else _value
            got[key], wanted[key] = seen(change, adapters), seen(whole, adapters)
        return got, wanted

    with laws.quick_compilation():
        got, wanted = jax.jit(both)(arguments)
    for key in names:
        assert laws.relative(got[key], wanted[key]) < 1e-5, key


def _value(fn, adapters):
    return fn(adapters)


def _value_and_grad(fn, adapters):
    def total(adapters):
        out = fn(adapters)
        return jnp.sum(jnp.sin(out)), out

    (_, out), gradients = jax.value_and_grad(total, has_aux=True)(adapters)
    return out, gradients


def test_every_nesting_is_adapted_and_gives_the_merged_models_values():
    models = {names: nested(names) for names in itertools.product(TRANSFORMS, TRANSFORMS)}
    usual = list(itertools.product(USUAL, USUAL))
    check(models, [*usual, ("fori", "vmap"), ("vmap", "while")], list(SHAPES), usual)


def test_what_a_loop_changes_is_not_passed_on():
    """A planted relative of each pass: one that looks like it and hands another value out."""

    def through(fn, *args):
        return passed_through.passed(jax.make_jaxpr(fn)(*args).jaxpr)

    w, x = jnp.ones((3, 2, 2)), jnp.ones(2)
    doubled = jax.jit(lambda w, x: (2 * w, x))
    assert through(doubled, w, x) == [None, 1]
    assert through(lambda w, x: lax.scan(lambda h, w: (h, doubled(w, h)[0]), x, w), w, x)[1] is None
    swap = lambda a, b: lax.fori_loop(0, 3, lambda _, c: (c[1], c[0]), (a, b))  # noqa: E731
    assert through(swap, x, x + 1) == [None, None]
    either = lambda p, a, b: lax.cond(p, lambda: (a, b), lambda: (a, a))  # noqa: E731
    assert through(either, True, x, x) == [1, None]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(D, 7, rngs=rngs), nnx.Linear(7, D, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


NNX = {
    "scan": nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry),
    "remat": nnx.remat,
    "jit": nnx.jit,
}


class Deep(nnx.Module):
    def __init__(self, names):
        def make(times):
            if not times:
                return lambda rngs: Block(rngs)
            return nnx.split_rngs(splits=TURNS)(nnx.vmap(make(times - 1)))

        self.blocks, self.names = make(names.count("scan"))(nnx.Rngs(0)), names

    def __call__(self, x):
        layer = lambda x, block: block(x)  # noqa: E731
        for name in reversed(self.names):
            layer = NNX[name](layer)
        return layer(layer(x, self.blocks), self.blocks)


def nnx_model(names):
    graph, state = nnx.split(Deep(names))
    return lambda state, x: nnx.merge(graph, state)(x), state, jnp.ones((2, D))


def test_every_nesting_of_nnx():
    models = {names: nnx_model(names) for names in itertools.product(NNX, NNX)}
    check(models, list(models), ["blocks.up.kernel", "blocks.down.kernel"], ())


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(D)(jnp.tanh(nn.Dense(7)(x))), None


LINEN = {
    "scan": partial(
        nn.scan, variable_axes={"params": 0}, split_rngs={"params": True}, length=TURNS
    ),
    "remat": nn.remat,
    "jit": nn.jit,
}


def linen_model(names):
    layer = LinenBlock
    for name in reversed(names):
        layer = LINEN[name](layer)
    model, x = layer(), jnp.ones((2, D))
    params = jax.eval_shape(model.init, jax.random.key(0), x, None)["params"]
    params = {"net": drawn(params, jnp.float32)}
    return lambda p, x: model.apply({"params": p["net"]}, x, None)[0], params, x


def test_every_nesting_of_linen():
    models = {names: linen_model(names) for names in itertools.product(LINEN, LINEN)}
    check(models, list(models), ["net.Dense_0.kernel", "net.Dense_1.kernel"], ())
