"""What the rewriter costs while tracing and leaves in the program, in counts; never in seconds."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from benchmarks.cases import decoder, decoder_step, rewrite_trace
from benchmarks.measure import harness
from lora_jax import lora, plan
from lora_jax.rewrite import replay, shared_inputs
from lora_jax.rewrite.frugality import compiled, count

SIZES = decoder.Sizes(layers=2, width=24, hidden=40, heads=2, vocabulary=31, rows=1, tokens=7)


def adapters_for(sizes):
    fn, params = decoder.decoder(sizes), decoder.shapes(sizes)
    return plan(fn, params, decoder.config(decoder_step.R), decoder.tokens(sizes)).abstract()


def evaluated(monkeypatch, layers):
    """Return how many equations are evaluated one by one while a decoder is traced."""
    sizes = dataclasses.replace(SIZES, layers=layers)
    arguments = (decoder.shapes(sizes), adapters_for(sizes), decoder.tokens(sizes))
    found = 0

    def counting(closed):
        def run(*values):
            nonlocal found
            found += len(closed.jaxpr.eqns)
            return core.jaxpr_as_fun(closed)(*values)

        return run

    replay.shared.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(replay, "as_function", counting)
        jax.jit(lora(decoder.decoder(sizes))).trace(*arguments)
    return found


def test_layers_that_repeat_each_other_are_evaluated_no_more_often(monkeypatch):
    few, many = evaluated(monkeypatch, 4), evaluated(monkeypatch, 8)
    assert 0 < few == many


def test_the_low_rank_path_adds_the_equations_that_a_hand_would_write():
    case = dataclasses.replace(rewrite_trace.case(SIZES), rounds=1, warm_up=0)
    assert harness.run(case).difference == 0


@pytest.mark.slow
def test_the_decoder_step_equals_the_one_by_hand():
    case = dataclasses.replace(decoder_step.case(SIZES), rounds=1, warm_up=0)
    assert harness.run(case).difference <= case.tolerance


def operations(program):
    """Return how often a compiled program holds each operation and shape."""
    words = (line.split(" = ", 1)[1].split() for line in program.splitlines() if " = " in line)
    return Counter((shape.partition("{")[0], rest[0].partition("(")[0]) for shape, *rest in words)


def test_the_compiled_step_is_the_one_by_hand(monkeypatch):
    """But for what sharing x·A takes away, which the hand has not written."""
    ids = decoder.tokens(SIZES)
    arguments = (adapters_for(SIZES), decoder.shapes(SIZES), ids)
    ours, theirs = (
        decoder_step.gradient_step(make(SIZES))
        for make in (decoder_step.rewritten, decoder.by_hand)
    )
    wanted = count(theirs, *arguments)
    assert count(ours, *arguments) < wanted
    monkeypatch.setattr(shared_inputs, "in_order", shared_inputs.as_written)
    apart_from_each_other = decoder_step.gradient_step(decoder_step.rewritten(SIZES))
    assert count(apart_from_each_other, *arguments) == wanted
    programs = (compiled(fn, *arguments) for fn in (apart_from_each_other, theirs))
    assert len({frozenset(operations(one).items()) for one in programs}) == 1


def alike(one, two):
    """Tell whether two functions' equations count as the same, on a traced argument."""
    replay.shared.cache_clear()
    for fn in (one, two):
        closed = jax.make_jaxpr(fn)(jnp.ones(3))
        inside = closed.jaxpr

        def run(x, inside=inside):
            return replay.evaluate(inside, inside.eqns, inside.invars, inside.outvars, [x])

        got = jax.jit(run)(jnp.arange(3.0))
        np.testing.assert_array_equal(got[0], fn(jnp.arange(3.0)))
    return replay.shared.cache_info().currsize == 1


def scoped(name):
    def fn(x):
        with jax.named_scope(name):
            return x * 2.0

    return fn


DIFFERENT = {
    "literals": (lambda x: x * 2.0, lambda x: x * 3.0),
    "the sign of a zero": (lambda x: 1 / (x * 0.0), lambda x: 1 / (x * -0.0)),
    "primitives": (jnp.sin, jnp.cos),
    "parameters": (lambda x: x.astype(jnp.int32), lambda x: x.astype(jnp.int16)),
    "order": (lambda x: jnp.sin(x) - x, lambda x: x - jnp.sin(x)),
    "outputs": (lambda x: (jnp.sin(x), jnp.cos(x))[0], lambda x: (jnp.sin(x), jnp.cos(x))[1]),
    "names": (scoped("one"), scoped("two")),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_equations_that_differ_are_never_shared(name):
    assert not alike(*DIFFERENT[name])


def test_equal_equations_are_shared():
    assert alike(lambda x: jnp.sin(x) * 2.0, lambda x: jnp.sin(x) * 2.0)


def test_equations_with_an_effect_are_not_shared():
    said = []

    def fn(x):
        jax.debug.callback(lambda: said.append(1))
        return x + 1

    alike(fn, fn)
    assert replay.shared.cache_info().currsize == 0
    jax.effects_barrier()
    assert len(said) >= 2
