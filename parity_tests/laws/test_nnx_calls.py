"""Calls of wrapped NNX models: any transform around them, and all that a call may do to a model."""

from __future__ import annotations

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export

from lora_jax import LoraConfig, merge
from lora_jax import nnx as lora_nnx
from lora_jax.core.errors import LoraError
from lora_jax.nnx import BaseParam, LoRALinear, LoRAParam
from parity_tests.laws.laws import relative

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
CONFIG = LoraConfig(r=2, lora_alpha=3, target_modules="all-linear")


class Noisy(nnx.Module):
    """Layers in a list, statistics and dropout."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.dropout(x)


class Remembering(nnx.Module):
    """Counts, keeps and sows in its call."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 5, rngs=rngs)
        self.calls = 0
        self.total = nnx.Cache(jnp.zeros(()))
        self.gone = nnx.Cache(jnp.ones(()))

    def __call__(self, x):
        y = self.linear(x)
        self.calls += 1
        self.total[...] += y.sum()
        self.last = nnx.Cache(y)
        self.names = ("a", self.calls)
        if hasattr(self, "gone"):
            del self.gone
        self.sow(nnx.Intermediate, "h", y)
        return y * self.calls


def wrapped(model, *args, **kwargs):
    """A wrapper whose adapters are not zero, and the same model with them merged."""
    found = lora_nnx.wrap(model, CONFIG, *args, rngs=nnx.Rngs(1), **kwargs)
    rng = np.random.default_rng(2)
    values = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype),
        lora_nnx.adapters(found),
    )
    lora_nnx.put(found, values)
    merged = nnx.clone(model)
    nnx.update(merged, merge(nnx.state(model, nnx.Param), values))
    return found, merged


def test_flaxs_own_filter_selects_and_trains_what_lora_trains():
    for model in (
        LoRALinear(6, 5, r=2, rngs=nnx.Rngs(0)),
        wrapped(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), X)[0],
    ):
        frozen = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, BaseParam)))
        before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, LoRAParam)))
        assert len(jax.tree.leaves(before)) == 2 and len(jax.tree.leaves(frozen)) == 2
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        for _ in range(2):
            optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(X) ** 2), argnums=wrt)(model))
        after = nnx.to_pure_dict(nnx.state(model, LoRAParam))
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert jax.tree.leaves(moved) == [True, True]
        jax.tree.map(
            np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model, BaseParam)), frozen
        )


def test_a_model_of_low_rank_layers_is_no_target_itself():
    model, _ = wrapped(nnx.Sequential(LoRALinear(6, 5, r=2, rngs=nnx.Rngs(0))), X)
    assert [leaf.path for leaf in model.plan.adapted] == ["layers.0.kernel"]


TRANSFORMS = {
    "jit": lambda fn: jax.jit(fn)(X),
    "vmap": lambda fn: jax.vmap(fn)(X[:, None])[:, 0],
    "map": lambda fn: jax.lax.map(fn, X[:, None])[:, 0],
    "scan": lambda fn: jax.lax.scan(lambda _, x: (None, fn(x)), None, X[:, None])[1][:, 0],
    "checkpoint": lambda fn: jax.checkpoint(fn)(X),
    "export": lambda fn: export.export(jax.jit(fn))(X).call(X),
    "cond": lambda fn: jax.lax.cond(X[0, 0] > 9, lambda x: 0 * x, fn, X),
}


def test_any_transform_may_close_over_a_model_in_evaluation_mode():
    base = Noisy(nnx.Rngs(0))
    model, merged = wrapped(base, X)
    model.eval()
    merged.eval()
    wanted = merged(X)
    assert relative(wanted, base(X)) > 1e-2
    for name, transform in TRANSFORMS.items():
        assert relative(transform(model), wanted) < 1e-5, name
    # The gradient of x, and every example's.
    grad = jax.grad(lambda x: jnp.sum(model(x) ** 2))(X)
    assert relative(grad, jax.grad(lambda x: jnp.sum(merged(x) ** 2))(X)) < 1e-5
    # What changes something cannot be a closure, as with the base alone.
    model.train()
    for one in (model, base):
        with pytest.raises(flax.errors.TraceContextError):
            jax.jit(lambda x, one=one: one(x))(X)


def test_training_mode_updates_statistics_and_streams_once():
    base, plain = Noisy(nnx.Rngs(0)), Noisy(nnx.Rngs(0))
    model = lora_nnx.wrap(base, CONFIG, X, rngs=nnx.Rngs(1))
    step = nnx.jit(lambda model, x: model(x))
    for _ in range(2):
        np.testing.assert_allclose(step(model, X), step(plain, X), rtol=1e-5, atol=1e-6)
    for kind in (nnx.BatchStat, nnx.RngCount):
        ours, theirs = (jax.tree.leaves(nnx.state(one, kind)) for one in (base, plain))
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_capture_gives_what_the_model_sows_and_breaks_no_later_call():
    class Sowing(Noisy):
        def __call__(self, x):
            y = super().__call__(x)
            self.sow(nnx.Intermediate, "h", y)
            return y

    model, merged = wrapped(Sowing(nnx.Rngs(0)), X)
    model.eval()
    merged.eval()
    y, sown = nnx.capture(model, nnx.Intermediate)(X)
    wanted, theirs = nnx.capture(merged, nnx.Intermediate)(X)
    assert relative(y, wanted) < 1e-5
    assert relative(sown["base"]["h"][0], theirs["h"][0]) < 1e-5
    for _ in range(2):
        assert relative(model(X), wanted) < 1e-5
    again, sown = nnx.capture(lambda m, x: m(x), nnx.Intermediate)(model, X)
    assert relative(again, wanted) < 1e-5 and len(sown["base"]["h"]) == 1


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
@pytest.mark.parametrize("jitted", [False, True])
def test_what_a_call_counts_keeps_and_sows_is_in_the_model(jitted):
    base = Remembering(nnx.Rngs(0))
    model, merged = wrapped(base, X)
    assert base.calls == 0 and hasattr(base, "gone") and not hasattr(base, "last")
    run = nnx.jit(lambda model, x: model(x)) if jitted else lambda model, x: model(x)
    for n in range(3):
        assert relative(run(model, X), run(merged, X)) < 1e-5
        assert model.base is base and base.calls == merged.calls == n + 1
        assert base.names == ("a", n + 1) and not hasattr(base, "gone")
        for name in ("last", "total"):
            assert relative(getattr(base, name)[...], getattr(merged, name)[...]) < 1e-5
        sown, theirs = base.h.get_value(), merged.h.get_value()
        assert len(sown) == len(theirs) == n + 1
        assert relative(sown[-1], theirs[-1]) < 1e-5


class Entries(nnx.Module):
    """No ``__call__``, two entries, and a stream as a keyword that must be given."""

    def __init__(self, rngs):
        self.linear, self.dropout = nnx.Linear(6, 5, rngs=rngs), nnx.Dropout(0.5)

    def loss(self, x, *, rngs, scale=2.0):
        return jnp.sum(self.dropout(self.linear(x), rngs=rngs)) * scale

    def sample(self, x):
        return self.linear(x)

    def named(self, x, *, method):
        return self.linear(x) * method


def test_another_method_and_keywords_of_its_own():
    base = Entries(nnx.Rngs(0))
    with pytest.raises(LoraError, match="Entries has no __call__: .*It has: loss, named, sample"):
        lora_nnx.wrap(base, CONFIG, X, rngs=nnx.Rngs(1))
    with pytest.raises(LoraError, match="Entries has no other"):
        lora_nnx.wrap(base, CONFIG, X, rngs=nnx.Rngs(1), method="other")
    with pytest.raises(LoraError, match="rngs: got the streams dropout, wanted 'params'"):
        lora_nnx.wrap(base, CONFIG, X, rngs=nnx.Rngs(dropout=1), method="sample")
    for method in ("loss", Entries.loss):
        rngs, theirs = nnx.Rngs(3), nnx.Rngs(3)
        model, merged = wrapped(base, X, method=method)
        for scale in (2.0, 3.0):
            wanted = merged.loss(X, rngs=theirs, scale=scale)
            assert relative(model(X, rngs=rngs, scale=scale), wanted) < 1e-5
        assert int(rngs.default.count[...]) == 2
        assert relative(model.apply("sample", X), merged.sample(X)) < 1e-5
        assert relative(model.apply(Entries.sample, X), merged.sample(X)) < 1e-5
    model, merged = wrapped(base, X, method="named", call_kwargs={"method": 2.0})
    assert relative(model(X, method=4.0), merged.named(X, method=4.0)) < 1e-5
