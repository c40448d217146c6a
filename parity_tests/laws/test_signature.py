"""``lora(fn)`` has a signature of its own, and JAX and Equinox count and name arguments by it."""

from __future__ import annotations

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import Adapter, LoraConfig, alora_mask, lora, per_example, plan, select, stack

PARAMS, X = {"w": jnp.arange(6.0).reshape(3, 2)}, jnp.arange(12.0).reshape(4, 3)
ADAPTERS = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), 2.0)}
WANTED = X @ (PARAMS["w"] + 2.0)


def fn(p, x, mode="plain", *, times=1):
    """Say what it does."""
    y = x @ p["w"]
    return times * (y if mode == "plain" else -y)


# What goes into jax.jit or wraps it; the other arguments; what comes out.
STATIC = {
    "static_argnums": (dict(static_argnums=3), ("minus",), {}, -1),
    "static_argnums from the end": (dict(static_argnums=-1), ("minus",), {}, -1),
    "static_argnums given by name": (dict(static_argnums=3), (), {"mode": "minus"}, -1),
    "static_argnames": (dict(static_argnames="mode"), (), {"mode": "minus"}, -1),
    "static_argnames by position": (dict(static_argnames="mode"), ("minus",), {}, -1),
    "keyword only": (dict(static_argnames=("mode", "times")), ("minus",), {"times": 3}, -3),
}


def test_static_arguments_are_the_ones_that_are_named():
    for name, (options, args, kwargs, factor) in STATIC.items():
        got = jax.jit(lora(fn), **options)(PARAMS, ADAPTERS, X, *args, **kwargs)
        np.testing.assert_allclose(got, factor * WANTED, rtol=1e-6, err_msg=name)
    got = eqx.filter_jit(lora(fn))(PARAMS, ADAPTERS, X, "minus", times=3)
    np.testing.assert_allclose(got, -3 * WANTED, rtol=1e-6)
    got = eqx.filter_grad(lambda a: lora(fn)(PARAMS, a, X, mode="plain").sum())(ADAPTERS)
    assert got["w"].b.shape == (1, 2)


def test_what_is_donated_is_what_is_named():
    def shaped(p, x):
        """Return arrays of everything's shape, so that each may be given away."""
        y = x @ p["w"]
        return y, y.sum() * jnp.ones((2, 1)), y.sum() * jnp.ones((1, 2)), y.sum() * jnp.ones((2, 2))

    for name in ("params", "adapters", "x"):
        pair = Adapter(jnp.ones((2, 1)), jnp.ones((1, 2)), 2.0)
        given = {"params": {"w": jnp.eye(2)}, "adapters": {"w": pair}, "x": jnp.ones((4, 2))}
        jitted = jax.jit(lora(shaped), donate_argnames=name)
        jax.block_until_ready(jitted(*given.values()))
        for key, tree in given.items():
            assert all(leaf.is_deleted() == (key == name) for leaf in jax.tree.leaves(tree)), key


def keywords(fn):
    return list(inspect.signature(lora(fn)).parameters)


def test_the_signature_names_what_there_is():
    own = ["dropout_key", "active"]
    assert keywords(fn) == ["params", "adapters", "x", "mode", "times", *own]
    assert keywords(functools.partial(fn, mode="minus"))[:4] == ["params", "adapters", "x", "mode"]
    assert keywords(lambda *args: None) == ["params", "adapters", "args", *own]
    assert keywords(lambda p, **options: None) == ["params", "adapters", *own, "options"]
    assert keywords(lambda p, adapters, active: None) == [
        "params",
        "adapters_",
        "adapters",
        "active",
        "dropout_key",
    ]
    assert keywords(jax.jit(fn)) == keywords(fn)
    assert keywords(print)[:2] == ["params", "adapters"]
    wrapped = lora(fn)
    assert (wrapped.__name__, wrapped.__doc__) == ("fn", "Say what it does.")
    assert inspect.unwrap(wrapped) is wrapped
    assert inspect.signature(per_example(wrapped)) == inspect.signature(wrapped)


def test_a_function_whose_argument_is_called_adapters():
    def taking(params, adapters, *, active):
        return adapters @ params["w"] * active

    for given in (dict(adapters=X), {}):
        args = () if given else (X,)
        got = jax.jit(lora(taking))(PARAMS, ADAPTERS, *args, active=2.0, **given)
        np.testing.assert_allclose(got, 2 * WANTED, rtol=1e-6)
    batch = select(stack([ADAPTERS]), jnp.zeros(4, int))
    per = per_example(lora(lambda p, adapters: adapters @ p["w"]))
    np.testing.assert_allclose(per(PARAMS, batch, X), WANTED, rtol=1e-6)


def test_a_key_that_the_function_knows_is_given_to_both():
    def dropping(params, x, dropout_key=None):
        assert dropout_key is not None
        return x @ params["w"] + jax.random.uniform(dropout_key)

    pair = Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), 2.0, dropout=0.5)
    key = jax.random.key(0)
    got = lora(dropping)(PARAMS, {"w": pair}, X, dropout_key=key)
    without = lora(lambda p, x: x @ p["w"])(PARAMS, {"w": pair}, X, dropout_key=key)
    np.testing.assert_allclose(got, without + jax.random.uniform(key), rtol=1e-6)


def test_a_mask_that_the_function_knows_is_given_to_both():
    def attending(params, x, active):
        return jnp.where(active[..., None], x @ params["w"], 0)

    ids = jnp.array([[1, 7, 2, 3]])
    config = LoraConfig(r=1, target_modules=["w"], alora_invocation_tokens=[7])
    found = plan(attending, PARAMS, config, X[None], jnp.ones((1, 4), bool))
    adapters = jax.tree.map(jnp.ones_like, found.init(jax.random.key(0)))
    mask = alora_mask(ids, (7,))
    got = lora(attending)(PARAMS, adapters, X[None], active=mask)
    scale = adapters["w"].scale
    np.testing.assert_allclose(got[0, 1:], (X @ (PARAMS["w"] + scale))[1:], rtol=1e-6)
    assert not got[0, 0].any()


def test_adapters_may_still_be_given_by_name():
    got = lora(fn)(PARAMS, adapters=ADAPTERS, x=X)
    np.testing.assert_allclose(got, WANTED, rtol=1e-6)
    np.testing.assert_allclose(lora(fn)(params=PARAMS, adapters=ADAPTERS, x=X), got)
    with pytest.raises(TypeError, match="missing 'adapters'"):
        lora(fn)(PARAMS, x=X)


def test_each_example_with_arguments_that_are_no_arrays():
    def tagged(p, x, mode, times):
        return {"y": fn(p, x, mode, times=times), "mode": mode, "x": x}

    batch = select(stack([ADAPTERS]), jnp.array([0, -1, 0, -1]))
    for rows in (None, 512):
        got = per_example(lora(tagged), rows=rows)(PARAMS, batch, X, "minus", 3)
        assert got["mode"] == "minus"
        np.testing.assert_array_equal(got["x"], X)
        base = X @ PARAMS["w"]
        wanted = jnp.where(jnp.array([True, False, True, False])[:, None], WANTED, base)
        np.testing.assert_allclose(got["y"], -3 * wanted, rtol=1e-6)
    jitted = jax.jit(per_example(lora(fn)), static_argnames="mode")
    np.testing.assert_allclose(jitted(PARAMS, batch, X, "minus"), -wanted, rtol=1e-6)
    with jax.checking_leaks():
        per_example(lora(tagged))(PARAMS, batch, X, "minus", 3)
