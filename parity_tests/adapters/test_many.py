"""Many adapters at once equal the same number of separate runs, and share the frozen weights."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import (
    Adapter,
    Full,
    LoraError,
    lora,
    map_adapters,
    merge,
    per_example,
    rescale,
    select,
    stack,
    unstack,
)
from lora_jax.adapters.stack import AT_ONCE
from lora_jax.core import delta
from lora_jax.core.adapter import a_shape, b_shape
from parity_tests.laws import subjects
from parity_tests.laws.laws import loss, relative
from parity_tests.laws.subjects import Subject
from parity_tests.tiers import cases

NAMED = {subject.name: subject for subject in subjects.ALL}
KINDS = [NAMED[name] for name in ("dense", "heads_out", "two_targets", "scan", "experts")]
RANKS, SCALES, RATES = (1, 3, 2, 3), (0.5, 2.0, 16 / 6, 2.0), (1e-3, 1e-2, 3e-3, 1e-3)
MANY = len(RANKS)
STEPS = 5


def draw(axes, shape, r, scale, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=s) / 4 for s in (a_shape(shape, axes, r), b_shape(shape, axes, r)))
    return Adapter(jnp.asarray(a, dtype), jnp.asarray(b, dtype), scale, axes)


def several(subject: Subject, dtype=np.float32, seed=0):
    """Adapters of different ranks, scales and seeds; a bias is trained in full."""
    bias = [path for path in subject.shapes if path == "bias"]
    return [
        {
            path: draw(axes, subject.shapes[path], r, scale, seed + 10 * n, dtype)
            for path, axes in subject.axes.items()
        }
        | {path: Full(jnp.full(subject.shapes[path], n / 4, dtype)) for path in bias}
        for n, (r, scale) in enumerate(zip(RANKS, SCALES, strict=True))
    ]


def equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


# Few shapes: each one compiles anew.
@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(["io", "soi", "ossi"]),
    st.lists(st.tuples(st.sampled_from([1, 3]), st.floats(0.01, 99)), min_size=1, max_size=3),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_unstack_undoes_stack(axes, members, dtype):
    shape = (2, 3, 5, 4)[: len(axes)]
    adapters = [
        {"w": draw(axes, shape, r, scale, seed, dtype), "bias": Full(jnp.full(3, scale, dtype))}
        for seed, (r, scale) in enumerate(members)
    ]
    stacked = stack(adapters)
    equal(unstack(stacked), adapters)
    equal(stack(unstack(stacked)), stacked)
    for k, one in enumerate(adapters):
        np.testing.assert_allclose(
            np.float64(delta.delta(select(stacked, k)["w"])),
            np.float64(delta.delta(one["w"])),
            rtol=1e-5,
            atol=1e-5 * members[k][1],
        )
    none = select(stacked, -1, {"bias": jnp.ones(3)})["w"]
    np.testing.assert_array_equal(delta.delta(none), np.zeros(shape))


def one_loss(subject, adapters, scales, params, x):
    adapters = rescale(adapters, scales) if scales is not None else adapters
    return loss(partial(lora(subject.fn), params), adapters, x)


def train(subject, adapters, scales, rate, params, x):
    """Return output and gradient before training, and what five steps of AdamW make of it."""
    fixed = ("b1", "b2", "eps", "eps_root", "weight_decay")
    adamw = optax.inject_hyperparams(optax.adamw, static_args=fixed)
    optimizer = adamw(learning_rate=0.0, weight_decay=0.1)
    state = optimizer.init(adapters)
    state.hyperparams["learning_rate"] = jnp.asarray(rate, x.dtype)
    differentiate = jax.value_and_grad(partial(one_loss, subject))

    def step(carry, _):
        adapters, state = carry
        value, gradients = differentiate(adapters, scales, params, x)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer's power
            updates, state = optimizer.update(gradients, state, adapters)
        return (optax.apply_updates(adapters, updates), state), (value, gradients)

    (trained, _), history = jax.lax.scan(step, (adapters, state), None, length=STEPS)
    return trained, history


@pytest.mark.parametrize(
    "subject", cases(KINDS, slow=("scan", "experts", "heads_out", "two_targets"))
)
def test_training_together_is_training_apart(subject):
    with jax.enable_x64(True):
        params, x = subject.draw(np.float64)
        adapters = several(subject, np.float64)
        stacked, rates = stack(adapters), np.asarray(RATES)
        together = jax.jit(
            jax.vmap(partial(train, subject), in_axes=(0, 0, 0, None, None)),
        )
        trained, (values, gradients) = together(stacked.adapters, stacked.scales, rates, params, x)
        # The padding has stayed zero, or stacking again would not give the same bits.
        trained = replace(stacked, adapters=trained)
        equal(stack(unstack(trained)), trained)
        first = replace(stacked, adapters=jax.tree.map(lambda leaf: leaf[:, 0], gradients))
        for k, one in enumerate(adapters):
            apart = jax.jit(partial(train, subject, one, None, RATES[k]))
            alone, (alone_values, alone_gradients) = apart(params, x)
            assert relative(alone, one) > 1e-3, "vacuous: training did not move it"
            assert relative(values[k], alone_values) <= 1e-12
            wanted = jax.tree.map(lambda leaf: leaf[0], alone_gradients)
            assert relative(unstack(first)[k], wanted) <= 1e-12
            assert relative(unstack(trained)[k], alone) <= 1e-11


def serve(subject, stacked, index, params, x, rows=None):
    run = per_example(lora(subject.fn), rows=rows)
    return run(params, select(stacked, index, params), x)


# The batch is the first axis of x and of the output.
BATCHED = [NAMED[name] for name in ("dense", "torch_layout", "heads_out", "two_targets", "scan")]
INDEX = np.array([2, 0, -1, 3, 1, -1, 0, 2, 3, 3, -1])


@pytest.mark.parametrize("rows", [None, AT_ONCE // 2, AT_ONCE], ids="rows {}".format)
@pytest.mark.parametrize("subject", BATCHED, ids=str)
def test_each_example_gets_its_own_adapter_or_none(subject, rows):
    """All examples at once; two at a time, with one left over; one at a time."""
    with jax.enable_x64(True):
        params, x = subject.draw(np.float64)
        adapters = several(subject, np.float64)
        got = jax.jit(partial(serve, subject, rows=rows))(stack(adapters), INDEX, params, x)
        base = jax.jit(subject.fn)(params, x)
        for k, one in enumerate([*adapters, None]):
            at = INDEX == (k if one is not None else -1)
            alone = base if one is None else jax.jit(subject.fn)(merge(params, one), x)
            assert relative(got[at], alone[at]) <= 1e-12
            assert one is None or relative(got[at], base[at]) > 1e-2, "vacuous"


@pytest.mark.parametrize("subject", BATCHED, ids=str)
def test_no_adapter_is_the_base_bit_for_bit(subject):
    params, x = subject.draw()
    none = np.full(x.shape[0], -1)
    alone = jax.jit(jax.vmap(lambda row: subject.fn(params, row[None])[0]))(x)
    got = jax.jit(partial(serve, subject))(stack(several(subject)), none, params, x)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(alone))


def test_a_plain_vmap_serves_as_well():
    subject = NAMED["dense"]
    params, x = subject.draw()
    stacked = stack(several(subject))
    mapped = jax.vmap(lora(subject.fn), in_axes=(None, 0, 0))
    got = mapped(params, select(stacked, INDEX), x)
    assert relative(got, serve(subject, stacked, INDEX, params, x)) <= 1e-6


def test_examples_drop_their_own_inputs():
    params, x = {"w": jnp.zeros((40, 5))}, jnp.ones((4, 40))
    one = {"w": Adapter(jnp.ones((40, 1)), jnp.ones((1, 5)), 1.0, dropout=0.5)}
    adapters = select(stack([one]), np.zeros(4, int))
    fn = per_example(lora(lambda p, x: x @ p["w"]))
    out = fn(params, adapters, x, dropout_key=jax.random.key(0))[:, 0]
    assert len(set(out.tolist())) > 1
    np.testing.assert_array_equal(fn(params, adapters, x)[:, 0], np.full(4, 40.0))
    for rows in (AT_ONCE // 3, AT_ONCE):
        fewer = per_example(lora(lambda p, x: x @ p["w"]), rows=rows)
        got = fewer(params, adapters, x, dropout_key=jax.random.key(0))[:, 0]
        np.testing.assert_array_equal(got, out)


# What the frozen weights cost: they are in no array once for each adapter.


def frozen_copies(subject: Subject, step, many: int, *args) -> list[str]:
    """Return every array of the compiled step that has the size of many frozen weights."""
    hlo = jax.jit(step).lower(*args).compile().as_text()
    sizes = {math.prod(shape) * many for shape in step_shapes(subject)}
    sizes |= {math.prod(subject.shapes[path]) * many for path in subject.axes}
    arrays = re.findall(r"^\s*(?:ROOT )?\S+ = \w+\[([\d,]+)\]", hlo, re.MULTILINE)
    assert arrays, "vacuous: no array found"
    return [dims for dims in arrays if math.prod(map(int, dims.split(","))) in sizes]


def step_shapes(subject: Subject) -> list[tuple[int, ...]]:
    """Return each weight's shape as one product meets it."""
    stacked_by_product = subject.name == "experts"
    return [
        tuple(
            size
            for size, letter in zip(subject.shapes[path], axes, strict=True)
            if letter != "s" or stacked_by_product
        )
        for path, axes in subject.axes.items()
    ]


def frozen_products(subject: Subject, step, *args) -> int:
    """Return how many products read a frozen weight as it is."""
    text = jax.jit(step).lower(*args).as_text()
    shapes = {"x".join(map(str, shape)) for shape in step_shapes(subject)}
    products = [line for line in text.splitlines() if "dot_general" in line]
    found = sum(f"tensor<{shape}xf32>" in line for line in products for shape in shapes)
    assert found, "vacuous: no such product"
    return found


def training_step(subject, adapters, scales, params, x):
    one = jax.grad(partial(one_loss, subject))
    return jax.vmap(one, in_axes=(0, 0, None, None))(adapters, scales, params, x)


@pytest.mark.parametrize("subject", KINDS, ids=str)
def test_training_reads_each_frozen_weight_once_for_all(subject):
    params, x = subject.draw()
    adapters = several(subject)
    stacked = stack(adapters)
    args = (stacked.adapters, stacked.scales, params, x)
    assert frozen_copies(subject, partial(training_step, subject), MANY, *args) == []
    alone = jax.grad(partial(one_loss, subject))
    assert frozen_products(subject, partial(training_step, subject), *args) == frozen_products(
        subject, alone, rescale(adapters[0], {p: 1.0 for p in stacked.scales}), None, params, x
    )


@pytest.mark.parametrize("subject", BATCHED, ids=str)
def test_serving_reads_each_frozen_weight_once_for_all(subject):
    params, x = subject.draw()
    args = (stack(several(subject)), INDEX, params, x)
    assert frozen_copies(subject, partial(serve, subject), len(INDEX), *args) == []
    assert frozen_products(subject, partial(serve, subject), *args) == frozen_products(
        subject, subject.fn, params, x
    )


@pytest.mark.parametrize("subject", KINDS, ids=str)
def test_a_copied_weight_is_seen(subject):
    params, x = subject.draw()
    stacked = stack(several(subject))

    def merged_step(adapters, scales, params, x):
        return jax.vmap(lambda a, s: loss(subject.fn, merge(params, rescale(a, s)), x))(
            adapters, scales
        )

    args = (stacked.adapters, stacked.scales, params, x)
    assert frozen_copies(subject, merged_step, MANY, *args)


# Adapters are arguments: exchanging them, their scales and the index compiles nothing.


def test_swapping_adapters_compiles_once(caplog):
    subject, traces = NAMED["scan"], []
    params, x = subject.draw()

    def counted_model(params, x):
        traces.append(1)
        return subject.fn(params, x)

    @jax.jit
    def serving(params, adapters, x):
        return per_example(lora(counted_model))(params, adapters, x)

    @jax.jit
    def alone(params, adapters, x):
        return lora(counted_model)(params, adapters, x)

    pool = [several(subject, seed=seed) for seed in range(3)]
    for one in pool[1]:
        one["up"] = replace(one["up"], scale=7.0)
    pool[2].reverse()  # the ranks and the scales in another order
    stacks = [stack(adapters) for adapters in pool]
    chosen = [select(stacked, index) for stacked in stacks for index in (INDEX, INDEX[::-1] * 0)]
    single = [select(stacked, index) for stacked in stacks for index in (0, 3, -1)]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        outs = [serving(params, adapters, x) for adapters in chosen]
        outs += [alone(params, adapters, x) for adapters in single]
    compiled = [line for line in caplog.messages if line.startswith("Compiling")]
    assert sum("serving" in line for line in compiled) == 1
    assert sum("alone" in line for line in compiled) == 1
    assert len(traces) == 2
    served = {float(jnp.sum(out)) for out in outs[: len(chosen)]}
    assert len(served) == len(chosen), "vacuous: some are equal"


# Errors: all of them at once, and nothing that is silently wrong.

PAIR = Adapter(jnp.ones((3, 1)), jnp.ones((1, 4)), 1.0)


def test_every_difference_is_listed():
    first = {"w": PAIR, "v": PAIR, "u": PAIR, "bias": Full(jnp.ones(3)), "gone": PAIR}
    second = {
        "w": replace(PAIR, axes="oi", dropout=0.5),
        "v": replace(PAIR, b=jnp.ones((1, 5)), scale=None),
        "u": replace(PAIR, a=jnp.ones((3, 1), jnp.bfloat16), scale=jnp.ones(2)),
        "bias": PAIR,
        "new": PAIR,
    }
    with pytest.raises(LoraError) as error:
        stack([first, second])
    for words in (
        "gone: adapter 0 has it, adapter 1 does not",
        "new: adapter 1 has it, adapter 0 does not",
        "w: axes of adapter 1 is oi, of adapter 0 io",
        "w: dropout of adapter 1 is 0.5, of adapter 0 0.0",
        "v: shape of adapter 1 is ((3,), (5,)), of adapter 0 ((3,), (4,))",
        "v: scale of adapter 1: got none, wanted a number",
        "u: scale of adapter 1: got shape (2,), wanted a number",
        "u: dtype of adapter 1",
        "bias: kind of adapter 1 is Adapter, of adapter 0 Full",
    ):
        assert words in str(error.value)
    for nothing in ([], [{}]):
        with pytest.raises(LoraError, match="at least one"):
            stack(nothing)


def test_scales_cannot_be_forgotten():
    params, x = {"w": jnp.ones((3, 4))}, jnp.ones((2, 3))
    fn = lora(lambda p, x: x @ p["w"])
    stacked = stack([{"w": PAIR}, {"w": PAIR}])
    with pytest.raises(LoraError, match="w: got no scale, put it in with rescale"):
        jax.vmap(fn, in_axes=(None, 0, None))(params, stacked.adapters, x)
    with pytest.raises(LoraError, match=r"w: scale got \(2,\), wanted \(\)"):
        fn(params, {"w": replace(PAIR, scale=jnp.ones(2))}, x)
    with pytest.raises(LoraError, match=r"(?s)v: a scale, but no.*w: an adapter, but no"):
        rescale({"w": PAIR}, {"v": 1.0})


def test_an_index_out_of_range_is_an_error_or_no_adapter():
    stacked = stack([{"w": PAIR}, {"w": PAIR}])
    for index, listed in ((2, "[2]"), (np.array([0, -2, 5]), "[-2, 5]")):
        with pytest.raises(
            LoraError, match=re.escape(f"got {listed}, wanted -1 (no adapter) to 1")
        ):
            select(stacked, index)
    traced = jax.jit(lambda index: select(stacked, index))(jnp.array([2, -2, 1]))
    assert [bool(jnp.any(a != 0)) for a in traced["w"].a] == [False, False, True]


def test_no_adapter_needs_the_frozen_value_of_what_is_trained_in_full():
    stacked = stack([{"w": PAIR, "bias": Full(jnp.full(4, n))} for n in (1.0, 2.0)])
    params = {"w": jnp.ones((3, 4)), "bias": jnp.full(4, 9.0)}
    wanted = "bias: trained in full, so an index of -1 needs its value from params"
    for choose in (lambda i: select(stacked, i), lambda i: select(stacked, i, {"w": params["w"]})):
        with pytest.raises(LoraError, match=wanted):
            choose(-1)
        with pytest.raises(LoraError, match=wanted):
            jax.jit(choose)(0)
        assert float(choose(1)["bias"].value[0]) == 2.0
    picked = jax.jit(lambda i: select(stacked, i, params))(jnp.array([1, -1, 0]))
    assert picked["bias"].value[:, 0].tolist() == [2.0, 9.0, 1.0]


@pytest.mark.parametrize("rows", [4, 300, 600, 4096], ids="rows {}".format)
def test_mapped_a_few_at_a_time_they_are_what_they_are_at_once(rows):
    stacked = stack([{"w": replace(PAIR, a=PAIR.a * n, scale=0.5 * n)} for n in range(1, 6)])
    given = stacked.adapters, stacked.scales, jnp.arange(5.0)

    def one(adapters, scales, shift):
        def loss(adapters):
            pair = rescale(adapters, scales)["w"]
            return jnp.sum((pair.a @ pair.b * pair.scale + shift) ** 2)

        return jax.value_and_grad(loss)(adapters)

    mapped, at_once = map_adapters(one, rows=rows), jax.vmap(one)
    jax.tree.map(np.testing.assert_array_equal, mapped(*given), at_once(*given))
    loops = str(jax.make_jaxpr(mapped)(*given)).count("scan[")
    assert loops == (jax.default_backend() == "cpu" and rows * 5 > AT_ONCE)


@pytest.mark.parametrize("given", [(), (jnp.ones(2), jnp.float32(1))], ids=["none", "a scalar"])
def test_what_has_no_leading_axis_is_not_mapped_over(given):
    with pytest.raises(LoraError, match="whose arrays have a leading axis"):
        map_adapters(lambda *args: args, rows=4)(*given)


def test_no_rows_are_refused():
    with pytest.raises(LoraError, match="per_example: rows is -1, wanted 1 or more"):
        per_example(lora(lambda params, x: x), rows=-1)
    with pytest.raises(LoraError, match="map_adapters: rows is 0, wanted 1 or more"):
        map_adapters(lambda adapters: adapters, rows=0)
