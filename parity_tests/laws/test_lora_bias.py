"""``lora_bias``: the laws on modules with a bias of their own, and the uses it has no rule for."""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lora_jax import Full, LoraConfig, lora, merge, merge_report, plan
from lora_jax.adapters import arithmetic
from lora_jax.adapters.combine import combine
from lora_jax.adapters.resize import resize
from lora_jax.adapters.stack import stack, unstack
from lora_jax.core import paths
from lora_jax.core.errors import AdapterError, ConfigError, PlanError
from lora_jax.optim.optimizers import loraplus
from parity_tests.laws import laws, subjects, subjects_products, subjects_structure
from parity_tests.laws.laws import random_adapters, relative
from parity_tests.laws.subjects import B, D, E, F, H, K, L, Subject, T
from parity_tests.laws.subjects_products import ROWS, C, G, N
from parity_tests.tiers import cases


def module(name, fn, w, axes, bias, **options):
    """Return a subject whose one module ``m`` has a kernel and a bias: ``fn(w, b, x)``."""
    return Subject(
        name,
        lambda p, x: fn(p["m.kernel"], p["m.bias"], x),
        {"m.kernel": w, "m.bias": bias},
        {"m": axes},
        options={"lora_bias": True},
        **options,
    )


def conv(dimensions, **options):
    def fn(w, b, x):
        spec = (f"N{dimensions}C", f"{dimensions}IO", f"N{dimensions}C")
        given = dict(window_strides=(1,) * len(dimensions), padding="SAME") | options
        return jnp.tanh(lax.conv_general_dilated(x, w, dimension_numbers=spec, **given) + b)

    return fn


def layer_scan(w, b, x, wrap=lambda f: f):
    @wrap
    def layer(h, wb):
        return jnp.tanh(h @ wb[0] + wb[1]), None

    return lax.scan(layer, x, (w, b))[0]


def joined(p, x):
    """Query, a frozen matrix and value as one product, as fused attention has them."""
    frozen = jnp.ones((D, K), x.dtype)
    w = jnp.concatenate([p["q.kernel"], frozen, p["v.kernel"]], axis=1)
    b = jnp.concatenate([p["q.bias"], jnp.zeros(K, x.dtype), p["v.bias"]])
    return jnp.tanh(x @ w + b)


def stacked(p, x):
    w, b = (jnp.stack([p[f"{name}.{leaf}"] for name in "qv"]) for leaf in ("kernel", "bias"))
    return layer_scan(w, b, x)


def fused(w, b, x):
    parts = zip(jnp.split(w, 3, axis=1), jnp.split(b, 3), strict=True)
    q, k, v = (x @ one + own for one, own in parts)
    return jax.nn.softmax(q * k) * v


def sharded(w, b, x):
    """A column-parallel product: each device has a part of the outputs."""
    mesh = jax.make_mesh((1,), ("out",), axis_types=(AxisType.Auto,))
    specs = (P(None, "out"), P("out"), P())

    def part(w, b, x):
        return jnp.tanh(x @ w + b)

    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P(None, None, "out"))(w, b, x)


@jax.jit
def jitted(w, b, x):
    return jnp.tanh(x @ w + b)


def half(w, b, x):
    low = (one.astype(jnp.bfloat16) for one in (x, w, b))
    return (lambda x, w, b: x @ w + b)(*low).astype(x.dtype)


def by_group(b):
    return jnp.repeat(b, jnp.asarray(ROWS), axis=0, total_repeat_length=B)


def two(name, fn, q, v):
    shapes = {"q.kernel": (D, q), "q.bias": (q,), "v.kernel": (D, v), "v.bias": (v,)}
    return Subject(name, fn, shapes, {"q": "io", "v": "io"}, options={"lora_bias": True})


SUBJECTS = [
    module("dense", lambda w, b, x: jnp.tanh(x @ w + b), (D, F), "io", (F,)),
    module("torch_layout", lambda w, b, x: x @ w.T + b, (F, D), "oi", (F,)),
    module("weight_first", lambda w, b, x: w @ x + b[:, None], (F, D), "oi", (F,), x=(D, B)),
    module(
        "heads_out",
        lambda w, b, x: jnp.einsum("btd,dhk->bhtk", x, w) + b[:, None],
        (D, H, K),
        "ioo",
        (H, K),
    ),
    module(
        "heads_in",
        lambda w, b, x: jnp.einsum("bkth,hdk->bdt", x, w) + b[:, None],
        (H, D, K),
        "ioi",
        (D,),
        x=(B, K, T, H),
    ),
    module(
        "experts_last",
        lambda w, b, x: jnp.einsum("bed,dfe->ebf", x, w) + b[:, None],
        (D, F, E),
        "ios",
        (E, F),
        x=(B, E, D),
    ),
    module(
        "experts_weight_first",
        lambda w, b, x: jnp.einsum("efd,ebd->efb", w, x) + b[..., None],
        (E, F, D),
        "soi",
        (E, F),
        x=(E, B, D),
    ),
    module(
        "two_batch_axes",
        lambda w, b, x: jnp.einsum("hebd,edhf->hebf", x, w) + b.swapaxes(0, 1)[:, :, None],
        (E, D, H, F),
        "siso",
        (E, H, F),
        x=(H, E, B, D),
    ),
    module(
        "split_heads",
        lambda w, b, x: jnp.einsum("btd,dhk->bthk", x, w.reshape(D, H, K)) + b.reshape(H, K),
        (D, H * K),
        "io",
        (H * K,),
    ),
    module(
        "merged_then_transposed",
        lambda w, b, x: x @ w.transpose(1, 2, 0).reshape(H * K, D).T + b.reshape(-1),
        (D, H, K),
        "ioo",
        (H, K),
    ),
    module(
        "unit_axes",
        lambda w, b, x: jnp.einsum("btdu,udf->btf", x[..., None], w[None]) + b,
        (D, F),
        "io",
        (F,),
    ),
    module(
        "unit_batch",
        lambda w, b, x: jnp.einsum("ubtd,ufd->ubtf", x[None], w.T[None]) + b,
        (D, F),
        "io",
        (F,),
    ),
    module(
        "vmapped",
        lambda w, b, x: jax.vmap(lambda w, b, h: jnp.tanh(h @ w + b))(w, b, x),
        (E, D, F),
        "sio",
        (E, F),
        x=(E, B, D),
    ),
    module(
        "jitted_twice", lambda w, b, x: jitted(w, b, jitted(w, b, x)), (D, D), "io", (D,), sites=2
    ),
    module("a_part_of_the_outputs", lambda w, b, x: x @ w[:, 3:9] + b[3:9], (D, F), "io", (F,)),
    module("scaled_weight", lambda w, b, x: x @ (-0.5 * w) + b, (D, F), "io", (F,)),
    module("shard_map", sharded, (D, F), "io", (F,)),
    module("scan", layer_scan, (L, D, D), "sio", (L, D)),
    module("scan_remat", partial(layer_scan, wrap=jax.checkpoint), (L, D, D), "sio", (L, D)),
    module(
        "scan_of_transposed",
        lambda w, b, x: layer_scan(w.transpose(2, 1, 0), b, x),
        (D, D, L),
        "ois",
        (L, D),
    ),
    module("split", fused, (D, 3 * F), "io", (3 * F,), sites=3),
    two("joined", joined, F, H),
    two("stacked", stacked, D, D),
    module("conv_1d", conv("H"), (3, C, N), "iio", (N,), x=(B, T, C)),
    module(
        "conv_2d_torch",
        lambda w, b, x: lax.conv_general_dilated(x, w, (2, 1), [(1, 1), (2, 0)]) + b,
        (N, C, 3, 2),
        "oiii",
        (N, 1, 1),
        x=(B, C, 7, 8),
    ),
    module(
        "conv_2d_groups",
        conv("HW", feature_group_count=G, rhs_dilation=(1, 2)),
        (3, 2, C // G, N),
        "iiio",
        (N,),
        x=(B, 7, 8, C),
    ),
    module(
        "experts_by_index",
        lambda w, b, x: jnp.einsum("bd,bdf->bf", x, w[jnp.arange(B) % E]) + b[jnp.arange(B) % E],
        (E, D, F),
        "sio",
        (E, F),
        x=(B, D),
    ),
    module(
        "ragged_dot",
        lambda w, b, x: jnp.tanh(lax.ragged_dot(x, w, jnp.asarray(ROWS)) + by_group(b)),
        (len(ROWS), D, F),
        "sio",
        (len(ROWS), F),
        x=(B, D),
        vmaps=False,
    ),
    module("half_precision", half, (D, F), "io", (F,), half=True),
]


def bias_gradient(subject):
    """``d bias = s · d b``, with the gradient of the module's own bias in the merged model."""
    with laws.wide(subject) as dtype:
        adapters, fn, params, args = random_adapters(subject, dtype)

        @jax.jit
        def both(adapters, params, args):
            got = jax.grad(lambda a: laws.loss(lora(fn), params, a, *args))(adapters)
            return got, jax.grad(lambda p: laws.loss(fn, p, *args))(merge(params, adapters))

        got, whole = both(adapters, params, args)
        bound = laws.BOUNDS[subject.precision][1]
        for path, adapter in adapters.items():
            own = whole[f"{paths.module_of(path)}.bias"].reshape(adapter.bias.shape)
            assert relative(got[path].bias, adapter.scale * own) <= bound


# One of each rule, and the laws that see the bias itself; the others are slow.
QUICK = ("heads_out", "scan_of_transposed", "joined", "conv_2d_groups", "ragged_dot")
QUICK_LAWS = ("merging", "bias_gradient")


@pytest.mark.parametrize(
    "law", cases([*laws.ALL, bias_gradient], quick=QUICK_LAWS, name=lambda law: law.__name__)
)
@pytest.mark.parametrize("subject", cases(SUBJECTS, quick=QUICK))
def test_law(law, subject):
    with laws.quick_compilation():
        law(subject)


def in_parts(p, x):
    """The module's inputs in two parts, as a row-parallel layer has them."""
    return x[..., :9] @ p["w"][:9] + x[..., 9:] @ p["w"][9:]


EVERY = {s.name: s for s in (*subjects.ALL, *subjects_products.ALL, *subjects_structure.ALL)}
REFUSED = {
    "embedding": "rows that are looked up",
    "embedding_tied_to_the_head": "rows that are looked up",
    "tied": "used the other way round",
    "conv_input_gradient": "used the other way round",
    "ragged_dot_back": "used the other way round",
    "custom_vjp": "author's derivative knows nothing of lora_bias",
    "custom_jvp": "author's derivative knows nothing of lora_bias",
    "joined_in": "each part of what is summed over",
    "in_parts": "each part of what is summed over",
    "sum_of_two": "no rule for a sum of weights",
    "sum_of_slices": "no rule for a sum of weights",
}
EVERY["in_parts"] = Subject("in_parts", in_parts, {"w": (D, F)}, {"w": "io"}, sites=2)


@pytest.mark.parametrize("name", cases(REFUSED, quick=("tied", "custom_vjp", "in_parts")))
def test_a_use_without_a_rule_is_refused_when_planning_and_at_the_call(name):
    found, fn, params, args = laws.planned(EVERY[name])
    config = replace(found.config, lora_bias=True)
    with pytest.raises(PlanError, match=REFUSED[name]) as error:
        plan(fn, params, config, *args)
    assert {line.split(":")[0] for line in error.value.problems} == {x.path for x in found.adapted}
    adapters = {
        leaf.name: replace(one, bias=jnp.ones(leaf.bias_shape))
        for leaf, one in zip(found.adapted, found.init(jax.random.key(0)).values(), strict=True)
    }
    last_words = " ".join(REFUSED[name].split()[-2:])
    with pytest.raises(PlanError, match=last_words):
        lora(fn)(params, adapters, *args)


def test_no_weight_is_formed_in_place_of_a_bias():
    def squares(p, x):
        return jnp.sum(p["w"] * p["w"]) + x @ p["w"]

    params, x = {"w": jnp.ones((D, F))}, jnp.ones((B, D))
    config = LoraConfig(target_modules=["w"], on_unsupported="materialize", lora_bias=True)
    with pytest.raises(PlanError, match="w: mul .* one by one"):
        plan(squares, params, config, x)


def fn(params, x):
    return jnp.tanh(x @ params["up.kernel"] + params["up.bias"]) @ params["down.kernel"]


RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"up.kernel": (30, 41), "up.bias": (41,), "down.kernel": (41, 7)}.items()
}
X = jnp.asarray(RNG.normal(size=(8, 30)), jnp.float32)
CONFIG = LoraConfig(r=4, lora_alpha=6, target_modules=["up", "down"], lora_bias=True)


@functools.cache
def drawn(**changes):
    config = replace(CONFIG, init_lora_weights=False, **changes)
    return plan(fn, PARAMS, config, X).init(jax.random.key(3))


def test_a_plan_counts_shows_and_draws_the_biases():
    found = plan(fn, PARAMS, CONFIG, X)
    fresh = found.init(jax.random.key(0))
    assert found.trainable == sum(leaf.size for leaf in jax.tree.leaves(fresh))
    assert jax.tree.map(jnp.shape, found.abstract()) == jax.tree.map(jnp.shape, fresh)
    assert "with a bias" in str(found)
    assert not np.asarray(fresh["up.kernel"].bias).any()
    np.testing.assert_array_equal(lora(fn)(PARAMS, fresh, X), fn(PARAMS, X))
    # PEFT's B is a fresh nn.Linear(r, out) where init_lora_weights is False.
    values = np.abs(np.concatenate([one.bias for one in drawn().values()]))
    assert 0.4 < values.max() <= 0.5 and values.min() < 0.1
    assert np.abs(drawn()["up.kernel"].bias[:7] - drawn()["down.kernel"].bias).max() > 0.01


def test_what_has_no_bias_to_merge_into_is_listed():
    adapters = drawn()
    with pytest.raises(AdapterError, match=r"down\.kernel: its module has no bias to add \(7,\)"):
        merge(PARAMS, adapters)
    other = PARAMS | {"up.bias": jnp.ones(40), "down.bias": jnp.ones(8)}
    with pytest.raises(AdapterError) as error:
        merge_report(other, adapters)
    assert error.value.problems == (
        "down.bias: got (8,), the adapter's bias is (7,)",
        "up.bias: got (40,), the adapter's bias is (41,)",
    )


def test_merging_rounds_once_adds_to_a_bias_trained_in_full_and_reports_it():
    low = {name: value.astype(jnp.bfloat16) for name, value in PARAMS.items()}
    one = drawn(target_modules="up")
    trained = Full(low["up.bias"] + 1)
    merged = merge(low, one | {"up.bias": trained})["up.bias"]
    pair = one["up.kernel"]
    wanted = np.asarray(trained.value, np.float32) + 1.5 * np.asarray(pair.bias)
    np.testing.assert_array_equal(merged, jnp.asarray(wanted).astype(jnp.bfloat16))
    report = merge_report(low, one | {"up.bias": trained})
    assert list(report) == ["up.kernel", "up.bias"]
    error = np.asarray(merged, np.float64) - wanted
    assert report["up.bias"].error == pytest.approx(
        np.linalg.norm(error) / np.linalg.norm(1.5 * np.asarray(pair.bias)), rel=1e-3
    )
    small = {"up.kernel": replace(pair, bias=1e-6 * pair.bias)}
    assert "rounding to bfloat16" in str(merge_report(low, small)["up.bias"].warning)


def test_a_low_precision_output_is_rounded_once():
    adapters = drawn()
    low = {name: value.astype(jnp.bfloat16) for name, value in PARAMS.items()}
    x = X.astype(jnp.bfloat16)
    pair = adapters["up.kernel"]

    def one(params, x):
        return x @ params["up.kernel"]

    got = lora(one)(low, {"up.kernel": pair}, x)
    wide = (np.asarray(z, np.float64) for z in (x, low["up.kernel"], pair.a, pair.b, pair.bias))
    x64, w, a, b, bias = wide
    base = np.asarray((x @ low["up.kernel"]), np.float64)
    wanted = base + 1.5 * (x64 @ a @ b + bias)
    assert got.dtype == jnp.bfloat16
    exact = jnp.asarray(wanted, jnp.float32).astype(jnp.bfloat16)
    assert np.mean(np.asarray(got) == np.asarray(exact)) > 0.99


def test_dropout_does_not_reach_the_bias():
    pair = drawn()["up.kernel"]
    one = {"w": replace(pair, a=0 * pair.a, dropout=0.5)}
    got = lora(lambda p, x: x @ p["w"])(
        {"w": 0 * PARAMS["up.kernel"]}, one, X, dropout_key=jax.random.key(0)
    )
    np.testing.assert_allclose(got, np.tile(1.5 * pair.bias, (8, 1)), rtol=1e-6)


def outputs(adapters):
    return lora(fn)(PARAMS, adapters, X)


def change(adapters):
    """Return what a module's low-rank path adds to its output."""
    pair = adapters["up.kernel"]
    a, b, x = (np.asarray(z, np.float64) for z in (pair.a, pair.b, X))
    return pair.scale * (x @ a @ b + (0 if pair.bias is None else np.asarray(pair.bias)))


@settings(max_examples=20, deadline=None)
@given(st.floats(-2, 2), st.floats(0.1, 2), st.floats(-2, 2))
def test_arithmetic_is_linear_in_the_bias_too(factor, scale, size):
    one = drawn()
    other = {
        name: replace(pair, scale=scale, bias=size * pair.bias) for name, pair in drawn(r=2).items()
    }
    plain = {name: replace(pair, bias=None) for name, pair in other.items()}
    sums = [
        (arithmetic.scale_by(one, factor), factor * change(one)),
        (arithmetic.add(one, other), change(one) + change(other)),
        (arithmetic.subtract(plain, one), change(plain) - change(one)),
    ]
    for got, wanted in sums:
        np.testing.assert_allclose(change(got), wanted, rtol=1e-4, atol=1e-4)


def test_other_names_and_ranks_keep_the_bias():
    one = drawn()
    renamed = arithmetic.rename(one, {"up.kernel": "in.kernel"})
    np.testing.assert_array_equal(renamed["in.kernel"].bias, one["up.kernel"].bias)
    np.testing.assert_allclose(change(resize(one, 6)[0]), change(one), rtol=1e-4, atol=1e-4)


def test_combining_refuses_a_bias_by_name():
    with pytest.raises(AdapterError, match=r"(?s)down\.kernel: its bias .*up\.kernel: its bias"):
        combine([drawn(), drawn()], [0.5, 0.5], "cat")


def test_many_adapters_have_biases_of_their_own():
    trees = [drawn(), drawn(r=2)]
    for tree, again in zip(trees, unstack(stack(trees)), strict=True):
        assert tree.keys() == again.keys()
        np.testing.assert_array_equal(outputs(tree), outputs(again))
    plain = {name: replace(pair, bias=None) for name, pair in trees[0].items()}
    with pytest.raises(AdapterError, match="up.kernel: bias of adapter 1 is False"):
        stack([trees[0], plain])


def test_loraplus_gives_a_bias_bs_rate_and_no_decay_as_peft_does():
    adapters = drawn()
    zeros = jax.tree.map(jnp.zeros_like, adapters)

    def recipe(rate, decay):
        return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))

    for gradients, bias in ((zeros, 0.0), (jax.tree.map(jnp.ones_like, adapters), -0.4)):
        sgd = loraplus(0.1, ratio=4, optimizer=recipe, weight_decay=0.5)
        updates, _ = sgd.update(gradients, sgd.init(adapters), adapters)
        np.testing.assert_allclose(updates["up.kernel"].bias, bias, rtol=1e-6)
        assert np.any(updates["up.kernel"].b != bias)


@pytest.mark.parametrize(
    "fields",
    [
        dict(use_dora=True),
        dict(output_slices={"up": [(0, 4)]}),
        *(dict(init_lora_weights=name) for name in ("gaussian", "orthogonal", "pissa", "eva")),
    ],
    ids=str,
)
def test_what_peft_refuses_beside_it_is_refused(fields):
    with pytest.raises(ConfigError, match=f"lora_bias: .* beside {next(iter(fields))}"):
        replace(CONFIG, **fields)


def test_a_bias_that_does_not_fit_is_listed():
    pair = drawn()["up.kernel"]
    wrong = {
        "up.kernel": replace(pair, bias=pair.bias[:4]),
        "down.kernel": replace(drawn()["down.kernel"], magnitude=jnp.ones(7)),
    }
    with pytest.raises(AdapterError) as error:
        lora(fn)(PARAMS, wrong, X)
    assert error.value.problems == (
        "up.kernel: bias got (4,), wanted (41,)",
        "down.kernel: got a bias beside a magnitude, wanted one of the two",
    )
