"""``frugality`` on a small decoder, and on what it has to find: planted, one at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks.cases import decoder
from lora_jax import Adapter, LoraConfig, frugality, plan
from lora_jax.core import delta as changes
from lora_jax.core.errors import AdapterError, PlanError
from lora_jax.rewrite import RULES
from lora_jax.rewrite.frugality import compiled, count, weight_sized
from lora_jax.rewrite.interpret import base_of
from lora_jax.rewrite.rules.products import dot_general
from lora_jax.rewrite.weight import adapter_at
from parity_tests.laws import subjects

SIZES = decoder.Sizes(layers=2, width=48, hidden=80, heads=4, vocabulary=61, rows=2, tokens=23)
R = 6


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def reported(fn, params, config, *args):
    return frugality(fn, params, plan(fn, params, config, *args).abstract(), *args)


def decoder_report():
    def loss(params, ids):
        return decoder.loss(decoder.decoder(SIZES)(params, ids), ids)

    return reported(loss, decoder.shapes(SIZES), decoder.config(R), decoder.tokens(SIZES))


def merged(call, x, weight):
    """A bug: ``x(W + s·A·B)``, for the layout of the decoder's linears."""
    if weight.planning:
        return dot_general(call, x, weight)
    call.site(weight, (0,), ())
    return call.plain(x, changes.merged(weight.base, adapter_at(weight, (0,), ())))


def with_dense_gradient(call, x, weight):
    """A bug: the right sum, but A's and B's gradients go through ``dW``."""
    if weight.planning:
        return dot_general(call, x, weight)
    factors = jax.tree.map(lax.stop_gradient, (weight.a, weight.b))
    kept = type(weight)(base_of(weight), *factors, weight.origin, weight.looped, weight.leaves)
    delta = changes.delta(adapter_at(weight, (0,), ()))
    return dot_general(call, x, kept) + call.plain(x, delta - lax.stop_gradient(delta))


def test_the_step_of_a_decoder_costs_what_is_expected():
    """Low-rank products: ``2·rows·r·(in + out)`` forwards, twice that backwards."""
    report = decoder_report()
    rows, d, h, v = SIZES.rows * SIZES.tokens, SIZES.width, SIZES.hidden, SIZES.vocabulary
    assert report.low_rank == 3 * 2 * rows * R * SIZES.layers * (4 * (d + d) + 3 * (d + h))
    assert report.floor == 4 * rows * (SIZES.layers * (4 * d * d + 3 * d * h) + d * v)
    assert abs(report.excess) < 0.02, report
    assert report.weight_sized == report.notes == ()
    assert report.forward > report.floor / 2 and report.input_gradient > 0.9 * report.floor / 2


@pytest.mark.parametrize("bug", [merged, with_dense_gradient], ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found_by_its_flops_and_by_its_sizes(monkeypatch, bug):
    monkeypatch.setitem(RULES, "dot_general", bug)
    report = decoder_report()
    assert report.excess > 0.2, report
    dense = {f"dot[{SIZES.width},{SIZES.hidden}]", f"dot[{SIZES.hidden},{SIZES.width}]"}
    assert dense & set(report.weight_sized), report


def test_a_zero_and_a_sum_of_a_weights_size_are_seen():
    def zero(x):
        return jnp.zeros((30, 37)).at[0, 0].set(x)

    def whole(w, a, b):
        return w + a @ b

    assert weight_sized(compiled(zero, shape()), [(37, 30)])
    assert weight_sized(compiled(whole, shape(30, 37), shape(30, 3), shape(3, 37)), [(30, 37)])
    assert not weight_sized(compiled(zero, shape()), [(37, 31)])


def test_an_authors_own_dense_gradient_is_shown():
    def fn(params, x):
        return jnp.sin(subjects.scaled_backward(params["w"], jnp.tanh(x)))

    params, x = {"w": shape(30, 37)}, shape(11, 13, 30)
    report = reported(fn, params, LoraConfig(r=3, target_modules=["w"]), x)
    assert any("[30,37]" in name for name in report.weight_sized)


def stacked(loop):
    def fn(params, x):
        def layer(h, w):
            return jnp.tanh(h @ w @ params["shared"]), None

        return loop(layer, x, params["w"])

    return fn


def unrolled(layer, x, stack):
    for w in stack:
        x, _ = layer(x, w)
    return x


LOOPS = {
    "scan": lambda layer, x, stack: lax.scan(layer, x, stack)[0],
    "unroll 2": lambda layer, x, stack: lax.scan(layer, x, stack, unroll=2)[0],
    "unroll 9": lambda layer, x, stack: lax.scan(layer, x, stack, unroll=9)[0],
}


@pytest.mark.parametrize("name", LOOPS)
def test_every_step_of_a_scan_is_counted(name):
    params, x = {"w": shape(5, 30, 30), "shared": shape(30, 30)}, shape(101, 30)
    config = LoraConfig(r=3, target_modules=["w", "shared"])
    fn = stacked(LOOPS[name])
    report = reported(fn, params, config, x)
    plain = count(stacked(unrolled), params, x)
    assert report.forward == pytest.approx(plain, rel=0.02)
    assert report.floor == 4 * 101 * 2 * 5 * 30 * 30
    assert report.low_rank == 6 * 101 * 3 * 2 * 5 * (30 + 30)
    assert abs(report.excess) < 0.02, report


def test_scans_in_scans_and_in_branches_are_counted():
    def scans(length):
        return lambda x: lax.scan(lambda h, _: (h @ h, None), x, None, length=length)[0]

    def fn(x):
        x = jax.jit(scans(4))(x)
        x = lax.scan(lambda h, _: (scans(3)(h), None), x, None, length=5)[0]
        return lax.cond(x[0, 0] > 0, scans(7), lambda x: x @ x @ x, x)

    notes = set()
    flops = count(fn, shape(32, 32), notes=notes)
    assert round(flops / (2 * 32**3)) == 4 + 5 * 3 + 7
    assert notes == {"of a cond the dearest branch is counted"}


def test_a_while_loop_is_named():
    def fn(params, x):
        steps = lax.while_loop(lambda n: n < x.shape[0], lambda n: n + 1, 0)
        return jnp.tanh(x @ params["w"]) * steps.astype(x.dtype)

    config = LoraConfig(r=3, target_modules=["w"])
    report = reported(fn, {"w": shape(30, 37)}, config, shape(11, 30))
    assert report.notes == ("a while loop is counted as one step",)
    assert report.notes[0] in str(report)


def test_activations_of_a_weights_size_are_named():
    config = LoraConfig(r=3, target_modules=["w"])
    report = reported(
        lambda p, x: jnp.tanh(x @ p["w"]), {"w": shape(30, 37)}, config, shape(30, 30)
    )
    assert any("30 rows of 37 values" in note for note in report.notes)


def test_the_table_shows_every_figure():
    report = decoder_report()
    shown = str(report)
    for figure in (report.forward, report.low_rank, report.expected, report.flops, report.floor):
        assert f"{figure:,} FLOPs" in shown
    assert "weight-sized: nothing" in shown and f"{report.over_floor:.3f} of the floor" in shown


def test_what_cannot_be_reported_is_an_error():
    params, x = {"w": shape(30, 37)}, shape(11, 30)
    adapters = {"w": Adapter(jnp.ones((30, 3)), jnp.ones((3, 37)), 1.0)}
    with pytest.raises(PlanError, match="nothing of a floating dtype"):
        frugality(lambda p, x: (x @ p["w"]).argmax(), params, adapters, x)
    with pytest.raises(AdapterError, match="w: no product uses it"):
        frugality(lambda p, x: x.sum(), params, adapters, x)
    with pytest.raises(AdapterError, match="w: no such parameter"):
        frugality(lambda p, x: x.sum(), {}, adapters, x)
