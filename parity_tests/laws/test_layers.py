"""The laws of the Flax layers, each on every layer and kernel layout of both front ends."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.extend import core

from lora_jax import LoraConfig, lora, merge
from lora_jax.core.errors import ConfigError
from lora_jax.core.flax_layer import FIELDS
from lora_jax.linen import LoRADense
from lora_jax.nnx import LoRALinear
from parity_tests.laws.layer_subjects import (
    DENSE,
    LINEAR,
    SUBJECTS,
    Subject,
    loss,
    relative,
    same_bits,
)


def identity(subject: Subject) -> None:
    params, adapters = subject.init()
    x = subject.draw()[2]
    assert not adapters["lora_b"].any() and adapters["lora_a"].any()
    with jax.disable_jit():
        wanted = subject.plain(params, x)
        assert same_bits(subject.apply(params, adapters, x), wanted)
    assert relative(jax.jit(subject.apply)(params, adapters, x), wanted) <= 1e-6


def drop_in(subject: Subject) -> None:
    wanted, (params, adapters) = subject.plain_init(), subject.init()
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    assert jax.tree.all(jax.tree.map(same_bits, params, wanted))
    assert {leaf.dtype for leaf in adapters.values()} == {np.dtype(np.float32)}
    loaded, _, x = subject.draw()
    with jax.disable_jit():
        assert same_bits(subject.apply(loaded, adapters, x), subject.plain(loaded, x))


def merging(subject: Subject) -> None:
    with jax.enable_x64(True):
        params, pair, x = subject.draw(np.float64)
        adapters = subject.adapters(params, pair)
        (adapter,) = adapters.values()
        assert (adapter.scale, adapter.axes) == (16 / 6, subject.axes)
        got, wanted = subject.apply(params, pair, x), subject.plain(merge(params, adapters), x)
        assert relative(wanted, subject.plain(params, x)) > 1e-2, "vacuous: no delta to see"
        assert relative(got, wanted) <= 1e-13
        stabilised = subject.adapters(params, pair, use_rslora=True)
        wanted = subject.plain(merge(params, stabilised), x)
        assert relative(subject.apply(params, pair, x, use_rslora=True), wanted) <= 1e-13


def gradient(subject: Subject) -> None:
    """``dA = s · dW · Bᵀ`` and ``dB = s · Aᵀ · dW``, dW being the merged plain layer's."""
    with jax.enable_x64(True):
        params, pair, x = subject.draw(np.float64)
        got = jax.grad(lambda pair: loss(subject.apply, params, pair, x))(pair)
        merged = merge(params, subject.adapters(params, pair))
        dw = jax.grad(lambda params: loss(subject.plain, params, x))(merged)["kernel"]
        sizes = [
            math.prod(n for n, axis in zip(dw.shape, subject.axes, strict=True) if axis == letter)
            for letter in "sio"
        ]
        (stacked, fan_in, out), r = sizes, subject.low_rank["r"]
        dw = dw.reshape(stacked, fan_in, out)
        a = pair["lora_a"].reshape(stacked, fan_in, r)
        b = pair["lora_b"].reshape(stacked, r, out)
        wanted = {
            "lora_a": 16 / 6 * np.einsum("sio,sro->sir", dw, b),
            "lora_b": 16 / 6 * np.einsum("sir,sio->sro", a, dw),
        }
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert relative(got[name], value.reshape(got[name].shape)) <= 1e-12


def frugality(subject: Subject) -> None:
    """The step forms no weight-sized array: no gradient of W, no merged W."""
    params, pair, x = subject.draw()
    step = jax.grad(lambda pair, params, x: loss(subject.apply, params, pair, x))
    weight = sorted(params["kernel"].shape)
    jaxpr = jax.make_jaxpr(step)(pair, params, x).jaxpr
    assert not [eqn for eqn, shape in produced(jaxpr) if sorted(shape) == weight]


def transforms(subject: Subject) -> None:
    with jax.enable_x64(True):
        params, pair, x = subject.draw(np.float64)
        wanted = subject.apply(params, pair, x)
        assert relative(jax.jit(subject.apply)(params, pair, x), wanted) <= 1e-14
        assert relative(jax.checkpoint(subject.apply)(params, pair, x), wanted) <= 1e-14
        two = jax.tree.map(lambda leaf: jnp.stack([leaf, -2 * leaf]), pair)
        many = jax.vmap(subject.apply, in_axes=(None, 0, None))(params, two, x)
        assert relative(many[0], wanted) <= 1e-14
        other = subject.apply(params, jax.tree.map(lambda leaf: -2 * leaf, pair), x)
        assert relative(many[1], other) <= 1e-14


def rewriting(subject: Subject) -> None:
    """The layer is the plain layer under the transform."""
    with jax.enable_x64(True):
        params, pair, x = subject.draw(np.float64)
        rewritten = lora(subject.plain)(params, subject.adapters(params, pair), x)
        assert relative(subject.apply(params, pair, x), rewritten) <= 1e-14


def dropout(subject: Subject) -> None:
    params, pair, x = subject.draw()
    apply = partial(subject.apply, lora_dropout=0.25)
    key, other = jax.random.split(jax.random.key(0))
    plain, whole = subject.plain(params, x), subject.apply(params, pair, x)
    assert same_bits(apply(params, pair, x, deterministic=True), whole)
    assert same_bits(subject.apply(params, pair, x, deterministic=False), whole)
    one, two = (apply(params, pair, x, deterministic=False, key=k) for k in (key, other))
    assert relative(one, whole) > 1e-2 < relative(one, two)
    assert same_bits(apply(params, pair, x, deterministic=False, key=key), one)
    # The base path is not touched.
    without = pair | {"lora_b": jnp.zeros_like(pair["lora_b"])}
    assert same_bits(apply(params, without, x, deterministic=False, key=key), plain)


def half(subject: Subject) -> None:
    """Beside a bf16 base the fp32 path computes in fp32 and rounds once, to the base's dtype."""
    _, pair, _ = subject.draw()
    params, _, x = subject.draw(jnp.bfloat16)
    with jax.disable_jit():
        y = subject.apply(params, pair, x)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        addend = subject.apply(nothing, pair, x.astype(jnp.float32))
        base = subject.plain(params, x)
    assert base.dtype == jnp.bfloat16 and addend.dtype == jnp.float32
    assert same_bits(y, (base.astype(jnp.float32) + addend).astype(jnp.bfloat16))
    grads = jax.grad(lambda pair: loss(subject.apply, params, pair, x))(pair)
    assert {leaf.dtype for leaf in grads.values()} == {np.dtype(np.float32)}


def purity(subject: Subject) -> None:
    params, pair, x = subject.draw()
    before = jax.tree.map(np.array, params)
    subject.apply(params, pair, x)
    merge(params, subject.adapters(params, pair))
    assert jax.tree.all(jax.tree.map(same_bits, params, before))


LAWS = [
    identity,
    drop_in,
    merging,
    gradient,
    frugality,
    transforms,
    rewriting,
    dropout,
    half,
    purity,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_law(law, subject):
    law(subject)


def produced(jaxpr: core.Jaxpr) -> Iterator[tuple[core.JaxprEqn, tuple[int, ...]]]:
    """Yield every equation with the shape of each of its results, inner jaxprs' too."""
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            yield eqn, var.aval.shape
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, core.Jaxpr):
                yield from produced(inner)


# One layer, in ways that the laws do not reach.

each_front = pytest.mark.parametrize("subject", [DENSE, LINEAR], ids=str)


@each_front
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"r": 0}, "r: got 0, wanted an integer of at least 1"),
        ({"r": -2, "lora_dropout": 1.0}, "(?s)r: got -2.*lora_dropout: got 1.0, wanted 0 <= p < 1"),
        ({"lora_alpha": math.inf}, "lora_alpha: got inf, wanted a finite number"),
        ({"init_lora_weights": "zeros"}, "init_lora_weights: got 'zeros', wanted one of True, "),
        ({"init_lora_weights": "orthogonal", "r": 3}, "r: got 3, .* wants an even one"),
    ],
)
def test_bad_fields_are_refused_together(subject, bad, message):
    with pytest.raises(ConfigError, match=message):
        subject.init(**bad)


def test_defaults_are_those_of_the_configuration():
    wanted = {name: getattr(LoraConfig(), name) for name in FIELDS}
    dense = LoRADense(5)
    assert {name: getattr(dense, name) for name in FIELDS} == wanted
    arguments = inspect.signature(LoRALinear.__init__).parameters
    assert {name: arguments[name].default for name in FIELDS} == wanted


@each_front
def test_dropout_zeroes_and_scales_the_elements_of_x(subject):
    """With A and B the identity and W zero, the output is the dropped input."""
    fan_in, rate = subject.x[-1], 0.25
    params = jax.tree.map(jnp.zeros_like, subject.plain_init())
    pair = {"lora_a": jnp.eye(fan_in), "lora_b": jnp.eye(fan_in, params["kernel"].shape[1])}
    x = jax.random.uniform(jax.random.key(1), (200, fan_in), minval=1.0, maxval=2.0)
    call = dict(r=fan_in, lora_alpha=fan_in, lora_dropout=rate, deterministic=False)
    y = subject.apply(params, pair, x, key=jax.random.key(0), **call)[:, :fan_in]
    kept = y != 0
    assert abs(float(kept.mean()) - (1 - rate)) < 0.05
    np.testing.assert_allclose(y, jnp.where(kept, x / (1 - rate), 0), rtol=1e-6)


def test_linen_dropout_wants_a_key_and_a_switch():
    params, pair, x = DENSE.draw()
    with pytest.raises(ValueError, match="deterministic"):
        DENSE.apply(params, pair, x, lora_dropout=0.5)
    with pytest.raises(Exception, match='needs PRNG for "dropout"'):
        DENSE.apply(params, pair, x, lora_dropout=0.5, deterministic=False)
    whole = DENSE.apply(params, pair, x)
    as_field = LoRADense(11, **DENSE.low_rank, lora_dropout=0.5, deterministic=True)
    assert same_bits(as_field.apply({"params": params, "lora": pair}, x), whole)


def test_nnx_dropout_follows_train_eval_and_view():
    x = jnp.ones((2, 7), jnp.float32)
    layer = LoRALinear(7, 5, r=2, init_lora_weights=False, lora_dropout=0.5, rngs=nnx.Rngs(0))
    one, two = layer(x), layer(x)
    assert not same_bits(one, two), "a new mask for every call"
    layer.eval()
    assert same_bits(layer(x), layer(x))
    layer.train()
    assert not same_bits(layer(x), layer(x))
    still = nnx.view(layer, deterministic=True)
    assert same_bits(still(x), layer(x, deterministic=True)) and not layer.deterministic
    masks = [layer(x, rngs=nnx.Rngs(dropout=7)) for _ in range(2)]
    assert same_bits(*masks)
    with pytest.raises(KeyError, match="dropout"):
        LoRALinear(7, 5, lora_dropout=0.5, rngs=nnx.Rngs(params=0))
    late = LoRALinear(7, 5, rngs=nnx.Rngs(0))
    late.lora_dropout = 0.5
    with pytest.raises(ConfigError, match="pass rngs"):
        late(x)


@each_front
def test_the_computation_dtype_is_the_base_layers(subject):
    """``dtype`` rounds x as the base sees it; the path is still computed in A's dtype."""
    params, pair, x = subject.draw()
    half = {**subject.layout, "dtype": jnp.bfloat16}
    y = Subject("", subject.front, half, subject.x, "io").apply(params, pair, x)
    rounded = x.astype(jnp.bfloat16)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert y.dtype == jnp.bfloat16
    assert relative(y, subject.apply(low, pair, rounded)) < 1e-6


@each_front
def test_precision_and_dot_general_are_honoured(subject):
    params, pair, x = subject.draw()
    seen = []

    def dot_general(*args, **kwargs):
        seen.append(kwargs["precision"])
        return lax.dot_general(*args, **kwargs)

    layout = {**subject.layout, "precision": lax.Precision.HIGHEST, "dot_general": dot_general}
    layer = Subject("", subject.front, layout, subject.x, "io")
    jaxpr = jax.make_jaxpr(layer.apply)(params, pair, x).jaxpr
    assert seen == [lax.Precision.HIGHEST], "the base path, once"
    dots = [eqn for eqn, _ in produced(jaxpr) if eqn.primitive.name == "dot_general"]
    assert [set(eqn.params["precision"]) for eqn in dots] == [{lax.Precision.HIGHEST}] * 3


@each_front
def test_integers_are_an_input_as_for_the_base(subject):
    params, pair, _ = subject.draw()
    x = jnp.arange(math.prod(subject.x)).reshape(subject.x)
    with jax.numpy_dtype_promotion("standard"):
        got = subject.apply(params, pair, x)
    assert same_bits(got, subject.apply(params, pair, x.astype(jnp.float32)))
