"""Products of one input share their ``x·A``; everything else is as if each had its own."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

from lora_jax import LoraConfig, lora, plan
from lora_jax.rewrite import shared_inputs

R, RANKS = 2, {"k": 3, "v": 5}
IN, OUT = 6, {"q": (16,), "k": (4,), "v": (4,)}


def matrices(form=lambda shape: shape):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=form((IN, *out)))) for name, out in OUT.items()}


def attend(q, k, v):
    """Use the three so that each depends on the others."""
    return jnp.tanh(q[..., :4] * k) + v**2 + q[..., -4:]


def one_after_another(params, x):
    """Each product's result is used before the next one is written."""
    y = jnp.tanh(x @ params["q"])
    z = y[..., :4] + jnp.sin(x @ params["k"])
    return z * jnp.cos(x @ params["v"]) + y[..., -4:]


def transposed(params, x):
    def linear(w):
        return lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())))

    return attend(*(linear(params[name]) for name in "qkv"))


def through_structure(params, x):
    """One weight is ready before the first product is written, one after it."""
    v = params["v"].reshape(2, 3, 4)
    q = x @ params["q"]
    k = x @ params["k"].T.reshape(2, 2, 6).reshape(4, 6).T
    return attend(q, k, x @ v.reshape(6, 4))


def two_inputs(params, x):
    """Both are flattened alike, and are not the same."""
    y = jnp.tanh(x).reshape(-1, IN)
    q, k, v = (
        one @ params[name] for one, name in zip((x.reshape(-1, IN), y, y), "qkv", strict=True)
    )
    return attend(q, k, v)


def waiting(params, x):
    """Which column of k is used is known by q's result alone."""
    q = x @ params["q"]
    k = lax.dynamic_slice(params["k"], (jnp.int32(0), jnp.int32(q.sum() > 0)), (IN, 1))
    return attend(q, x @ k, x @ params["v"])


def own_views(params, x):
    """As layers do that flatten the rows, each for itself."""

    def linear(w):
        return (x.reshape(-1, IN) @ w).reshape(*x.shape[:-1], -1)

    return attend(*(linear(params[name]) for name in "qkv"))


def heads(params, x):
    return attend(*(jnp.tensordot(x, params[name], 1).reshape(*x.shape[:-1], -1) for name in "qkv"))


def scanned(params, x):
    def body(x, layer):
        return jnp.tanh(x + attend(*(x @ layer[name] for name in "qkv")) @ jnp.ones((4, IN))), None

    return lax.scan(body, x, params)[0]


def rematerialised(params, x):
    return jax.checkpoint(one_after_another)(params, x)


# The function, its parameters' shape from (in, *out), and how many products with some A it has.
SUBJECTS = {
    "one after another": (one_after_another, lambda s: s, 1),
    "transposed": (transposed, lambda s: s[::-1], 1),
    "through structure": (through_structure, lambda s: s, 1),
    "views of their own": (own_views, lambda s: s, 1),
    "heads": (heads, lambda s: (s[0], 4, s[1] // 4), 1),
    "two inputs": (two_inputs, lambda s: s, 2),
    "waiting": (waiting, lambda s: s, 2),
    "a scan": (scanned, lambda s: (3, *s), 1),
    "rematerialised": (rematerialised, lambda s: s, 1),
}


def given(name, **fields):
    fn, form, products = SUBJECTS[name]
    params = matrices(form)
    return fn, params, *drawn(fn, params, **fields), products


def drawn(fn, params, **fields):
    """Return adapters away from zero, and an input."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, IN)))
    config = LoraConfig(
        r=R, rank_pattern=RANKS, alpha_pattern={"v": 9}, target_modules=["q", "k", "v"], **fields
    )
    found = plan(fn, params, config, x)
    rng = np.random.default_rng(2)
    adapters = {
        path: jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), entry)
        for path, entry in found.init(jax.random.key(0)).items()
    }
    return adapters, x


@pytest.fixture(autouse=True)
def precise(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with jax.enable_x64(True):
        yield


def values(fn, params, adapters, x, **options):
    """Return the function's value and its derivatives, forwards and backwards."""

    def loss(adapters, params, x):
        return (lora(fn)(params, adapters, x, **options) ** 2).sum()

    every = adapters, params, x
    ones = jax.tree.map(jnp.ones_like, every)
    return (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*every),
        jax.jvp(loss, every, ones)[1],
    )


def agree(one, two):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), one, two)


def products(fn, params, adapters, x, **options):
    """Count the products that sum over the in axis and give a rank or several."""

    ranks = (R, *RANKS.values())
    widths = {sum(some) for n in (1, 2, 3) for some in itertools.combinations(ranks, n)}

    def count(jaxpr):
        own = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general")
        inner = (count(one) for eqn in jaxpr.eqns for one in core.jaxprs_in_params(eqn.params))
        return sum(eqn.outvars[0].aval.shape[-1] in widths for eqn in own) + sum(inner)

    return count(
        jax.make_jaxpr(lambda adapters: lora(fn)(params, adapters, x, **options))(adapters).jaxpr
    )


@pytest.mark.parametrize("name", SUBJECTS)
def test_they_share_and_nothing_else_changes(name, monkeypatch):
    fn, params, adapters, x, wanted = given(name)
    shared, count = values(fn, params, adapters, x), products(fn, params, adapters, x)
    monkeypatch.setattr(shared_inputs, "in_order", shared_inputs.as_written)
    agree(shared, values(fn, params, adapters, x))
    assert (count, products(fn, params, adapters, x)) == (wanted, 3)


@pytest.mark.parametrize("name", SUBJECTS)
def test_dropout_draws_what_it_drew(name, monkeypatch):
    fn, params, adapters, x, wanted = given(name, lora_dropout=0.4)
    key = jax.random.key(7)
    shared = values(fn, params, adapters, x, dropout_key=key)
    assert products(fn, params, adapters, x, dropout_key=key) == 3
    assert products(fn, params, adapters, x) == wanted
    monkeypatch.setattr(shared_inputs, "in_order", shared_inputs.as_written)
    agree(shared, values(fn, params, adapters, x, dropout_key=key))


def test_several_devices_share_nothing(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert products(*given("transposed")[:4]) == 3


def test_what_an_adapter_does_not_see_alike_is_not_shared(monkeypatch):
    fn, params, adapters, x, _ = given("transposed")
    wide = {**adapters, "k": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapters["k"])}
    assert products(fn, params, wide, x) == 2
    with monkeypatch.context() as patch:
        patch.setattr(shared_inputs, "in_order", shared_inputs.as_written)
        alone = values(fn, params, wide, x)
    agree(values(fn, params, wide, x), alone)
    dora = given("transposed", use_dora=True)[:4]
    count = products(*dora)
    monkeypatch.setattr(shared_inputs, "in_order", shared_inputs.as_written)
    assert count == products(*dora)


def test_what_uses_a_weight_the_other_way_has_an_input_of_its_own(monkeypatch):
    """``x·Qᵀ`` takes B for A, and beside ``x·K`` it has nothing to share."""

    def fn(params, x):
        return (x @ params["q"] @ params["v"]) * (x @ params["k"]) * (x @ params["q"].T)

    params = {name: jnp.ones((IN, IN)) for name in "qkv"}
    adapters, x = drawn(fn, params)
    count, shared = products(fn, params, adapters, x), values(fn, params, adapters, x)
    monkeypatch.setattr(shared_inputs, "in_order", shared_inputs.as_written)
    agree(shared, values(fn, params, adapters, x))
    assert (count, products(fn, params, adapters, x)) == (3, 4)


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_equation_comes_once_after_what_it_reads(name):
    fn, params, _, x, _ = given(name)
    closed = jax.make_jaxpr(fn)(params, x)
    steps = shared_inputs.in_order(closed.jaxpr, closed.jaxpr.invars[:3])
    assert sorted(step.index for step in steps) == list(range(len(closed.jaxpr.eqns)))
    ready = {*closed.jaxpr.invars, *closed.jaxpr.constvars}
    for at, step in enumerate(steps):
        assert {v for v in step.eqn.invars if not isinstance(v, core.Literal)} <= ready
        ready.update(step.eqn.outvars)
        together = steps[at : at + len(step.siblings)]
        assert tuple(one.index for one in together) == step.siblings
