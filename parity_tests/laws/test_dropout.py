"""Dropout on the low-rank path: a mask for each site and step, none without a key.

With ``W = 0`` and A and B the identity a site returns what dropout left of its input, so that
every mask can be read off the output.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax import Adapter, lora
from parity_tests.laws import subjects
from parity_tests.laws.laws import loss, planned, random_adapters, relative
from parity_tests.tiers import cases

ROWS, D, RATE = 6, 16, 0.5
KEY = jax.random.key(3)

shared_jit = jax.jit(lambda w, x: x @ w)
shared_remat = jax.checkpoint(lambda w, x: x @ w)


def body(x, w):
    return x, x @ w


def scanned(x, ws, *, wrap=lambda f: f):
    return lax.scan(wrap(body), x, ws)[1]


def shared_scan(w, x):
    """Every step uses the same weight."""
    return lax.scan(lambda c, _: (c, x @ w), 0.0, None, length=3)[1]


def nested(x, ws):
    return lax.scan(partial(lax.scan, body), x, ws)[1].reshape(-1, *x.shape)


# name -> what returns the outputs of its sites, the shapes of its weights, their axes
CASES = {
    "sites": (lambda p, x: (x @ p["w"], x @ p["w"]), {"w": (D, D)}, "io"),
    "paths": (lambda p, x: (x @ p["v"], x @ p["w"]), {"v": (D, D), "w": (D, D)}, "io"),
    "transposed": (lambda p, x: (x @ p["w"], x @ p["w"].T), {"w": (D, D)}, "io"),
    "two_jits": (lambda p, x: [shared_jit(p["w"], x) for _ in "ab"], {"w": (D, D)}, "io"),
    "two_remats": (lambda p, x: [shared_remat(p["w"], x) for _ in "ab"], {"w": (D, D)}, "io"),
    "jit_in_jit": (
        lambda p, x: jax.jit(lambda w, x: [shared_jit(w, x), shared_jit(w, x), x @ w])(p["w"], x),
        {"w": (D, D)},
        "io",
    ),
    "scan": (lambda p, x: scanned(x, p["w"]), {"w": (3, D, D)}, "sio"),
    "two_scans": (
        lambda p, x: [*scanned(x, p["w"]), *scanned(x, p["w"])],
        {"w": (3, D, D)},
        "sio",
    ),
    "scan_remat": (
        lambda p, x: scanned(x, p["w"], wrap=jax.checkpoint),
        {"w": (3, D, D)},
        "sio",
    ),
    "remat_scan": (
        jax.checkpoint(lambda p, x: scanned(x, p["w"])),
        {"w": (3, D, D)},
        "sio",
    ),
    "shared_in_scan": (lambda p, x: shared_scan(p["w"], x), {"w": (D, D)}, "io"),
    "nested_scans": (lambda p, x: nested(x, p["w"]), {"w": (2, 3, D, D)}, "ssio"),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def identity(shapes, axes, rate=RATE):
    """Zero weights, and A and B that pass the input on."""
    params = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    eye = {path: jnp.broadcast_to(jnp.eye(D), shape) for path, shape in shapes.items()}
    return params, {path: Adapter(e, e, 1.0, axes, rate) for path, e in eye.items()}


def run(fn, params, adapters, x, key=None):
    """Return the outputs of all sites, one below the other."""
    return jnp.stack([*lora(fn)(params, adapters, x, dropout_key=key)])


def test_every_use_of_every_weight_in_every_step_has_its_own_mask(case):
    fn, shapes, axes = case
    params, adapters = identity(shapes, axes)
    out = np.asarray(run(fn, params, adapters, jnp.ones((ROWS, D)), KEY))
    assert set(np.unique(out)) == {0.0, 2.0}
    assert len(out) > 1
    agree = [np.mean(one == two) for n, one in enumerate(out) for two in out[:n]]
    # Two masks of one rate agree in half of their 96 places, ± 0.05.
    assert 0.25 < min(agree) and max(agree) < 0.75


def test_a_key_gives_one_result_however_the_function_runs(case):
    fn, shapes, axes = case
    params, adapters = identity(shapes, axes)
    rest = (params, adapters, jnp.ones((ROWS, D)))
    keys = jax.random.split(KEY, 2)
    plain = np.asarray(run(fn, *rest, keys[0]))
    np.testing.assert_array_equal(jax.jit(partial(run, fn))(*rest, keys[0]), plain)
    with jax.disable_jit():
        np.testing.assert_array_equal(run(fn, *rest, keys[0]), plain)
    mapped = jax.jit(jax.vmap(partial(run, fn, *rest)))(keys)
    np.testing.assert_array_equal(mapped[0], plain)
    assert not np.array_equal(mapped[1], plain)


@pytest.mark.parametrize("name", ["sites", "two_remats", "nested_scans"])
def test_without_a_key_or_a_rate_nothing_is_dropped(name):
    fn, shapes, axes = CASES[name]
    x = jax.random.normal(KEY, (ROWS, D))
    params, adapters = identity(shapes, axes)
    without = {path: replace(one, dropout=0.0) for path, one in adapters.items()}
    step = jax.jit(partial(run, fn))
    wanted = step(params, without, x)
    np.testing.assert_array_equal(wanted, jnp.broadcast_to(x, wanted.shape))
    np.testing.assert_array_equal(step(params, adapters, x), wanted)
    np.testing.assert_array_equal(step(params, without, x, KEY), wanted)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.9])
def test_what_is_kept_is_scaled_exactly(rate):
    x = jax.random.normal(KEY, (50, D))
    params, adapters = identity({"w": (D, D)}, "io", rate)
    out = lora(lambda p, x: x @ p["w"])(params, adapters, x, dropout_key=KEY)
    kept = np.asarray(out != 0)
    wanted = np.asarray(x) * np.float32(1 / (1 - rate))
    np.testing.assert_array_equal(np.asarray(out)[kept], wanted[kept])
    deviation = np.sqrt(rate * (1 - rate) / x.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * deviation


def test_the_mean_over_keys_is_the_result_without_dropout():
    """Linear layers in a chain: every mask is independent, so the mean of the products is exact."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, D, D)) / 4, jnp.float32)}
    pair = (jnp.asarray(rng.normal(size=s) / 2, jnp.float32) for s in ((3, D, 2), (3, 2, D)))
    adapters = {"w": Adapter(*pair, 1.0, "sio", 0.25)}
    x = jnp.ones((D,))

    def chain(p, x):
        return lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0]

    wanted = lora(chain)(params, adapters, x)
    keys = jax.random.split(KEY, 20_000)
    outs = jax.jit(jax.vmap(lambda key: lora(chain)(params, adapters, x, dropout_key=key)))(keys)
    error = np.std(outs, axis=0) / np.sqrt(len(keys))
    assert (error > 0).all() and (error < 0.05 * np.abs(wanted).max()).all(), "vacuous"
    assert (np.abs(np.mean(outs, axis=0) - wanted) < 5 * error).all()


@pytest.mark.parametrize(
    "name", cases(["heads_in", "experts", "tied", "jitted", "scan_remat"], slow=("scan_remat",))
)
def test_dropout_leaves_the_base_path_alone(name):
    subject = next(s for s in subjects.ALL if s.name == name)
    found, _, params, (x,) = planned(subject)
    fresh = {p: replace(one, dropout=0.9) for p, one in found.init(KEY).items()}
    assert all(bool((one.b == 0).all()) for one in fresh.values())
    base, out = subject.fn(params, x), lora(subject.fn)(params, fresh, x, dropout_key=KEY)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(base))


@pytest.mark.parametrize(
    "name",
    cases(
        ["heads_in", "tied", "remat", "scan_remat", "scan_in_scan"],
        quick=("heads_in",),
    ),
)
def test_the_gradient_is_that_of_the_masks_of_the_forward_pass(name):
    """Reverse mode, which may compute a mask again, agrees with forward mode, which does not."""
    subject = next(s for s in subjects.ALL if s.name == name)
    with jax.enable_x64(True):
        adapters, _, params, (x,) = random_adapters(subject, np.float64)
        adapters = {path: replace(one, dropout=RATE) for path, one in adapters.items()}
        along = jax.tree.map(jnp.cos, adapters)

        @jax.jit
        def slopes(key):
            def value(adapters):
                dropped = partial(lora(subject.fn), params, dropout_key=key)
                return loss(dropped, adapters, x)

            forward = jax.jvp(value, (adapters,), (along,))[1]
            found = [jax.grad(value)(adapters), jax.grad(jax.checkpoint(value))(adapters)]
            dots = [jax.tree.map(lambda g, v: jnp.sum(g * v), one, along) for one in found]
            return forward, [sum(jax.tree.leaves(dot)) for dot in dots]

        forward, backward = slopes(KEY)
        for found in backward:
            assert relative(found, forward) <= 1e-12
        assert relative(slopes(jax.random.key(4))[0], forward) > 1e-3, "vacuous: one for all keys"


def test_a_key_may_pass_an_authors_derivative_that_drops_nothing():
    """The weight inside has no dropout, the weight before it has; keys are mapped over."""

    def fn(p, x):
        return subjects.scaled_backward(p["w"], x @ p["v"])

    params, adapters = identity({"v": (D, D), "w": (D, D)}, "io")
    adapters["w"] = replace(adapters["w"], dropout=0.0)
    x, keys = jnp.ones((2, ROWS, D)), jax.random.split(KEY, 2)

    def step(key):
        return jax.value_and_grad(lambda a: lora(fn)(params, a, x, dropout_key=key).sum())(adapters)

    many, _ = jax.jit(jax.vmap(step))(keys)
    np.testing.assert_array_equal(many, [step(key)[0] for key in keys])
    assert float(many[0]) != float(many[1])
