"""One layer against PyTorch, twice: the reference layer and PEFT's, every tensor, B not zero."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from peft.tuners.lora.layer import Linear as PeftLinear

from lora_jax import linen, lowrank
from lora_jax import nnx as lora_nnx
from lora_jax.adapter import Adapter
from lora_torch_ref import DoRALinear, LinearWithLoRA
from parity_tests import oracle
from parity_tests.oracle import UNIT_ROUNDOFF, Case, Vacuous

# n, in, r, out: all different within a shape; 16 / r is in none of them exact in bfloat16.
SHAPES = [(5, 7, 3, 11), (16, 96, 6, 31), (9, 33, 6, 5), (3, 64, 5, 129)]
ALPHA = 16


def random_case(shape, seed, *, rslora=False):
    n, fan_in, r, out = shape
    rng = np.random.default_rng(seed)

    def normal(*shape, std=1.0):
        return (std * rng.standard_normal(shape)).astype(np.float32)

    return Case(
        x=normal(n, fan_in),
        w=normal(fan_in, out, std=fan_in**-0.5),
        bias=normal(out),
        a=normal(fan_in, r, std=fan_in**-0.5),
        b=normal(r, out, std=0.3),
        g=normal(n, out),
        scale=ALPHA / (r**0.5 if rslora else r),
    )


def exact_case(seed):
    """Small integers and a dyadic scale: every order of summation is exact, in bfloat16 too."""
    rng = np.random.default_rng(seed)
    shapes = {"x": (3, 7), "w": (7, 5), "bias": (5,), "a": (7, 4), "b": (4, 5), "g": (3, 5)}
    values = {k: rng.integers(-1, 2, shape).astype(np.float32) for k, shape in shapes.items()}
    return Case(**values, scale=0.5)


# The sides: each takes a case and returns y, dx, dA, dB in numpy, from live code.


@functools.cache
def jitted(side, features, config, base, low_rank):
    return jax.jit(side(features, dict(config), base, low_rank))


def in_jax(side):
    def run(case, alpha=ALPHA, rslora=False, base="float32", low_rank="float32"):
        config = (("r", case.b.shape[0]), ("lora_alpha", alpha), ("use_rslora", rslora))
        step = jitted(side, case.w.shape[1], config, base, low_rank)
        args = [jnp.asarray(value, base) for value in (case.w, case.bias, case.x, case.g)]
        args += [jnp.asarray(value, low_rank) for value in (case.a, case.b)]
        y, grads, dx = step(*args)
        assert set(grads) == {"lora_a", "lora_b"}
        assert y.dtype == dx.dtype == base and grads["lora_a"].dtype == low_rank
        tensors = {"y": y, "dx": dx, "dA": grads["lora_a"], "dB": grads["lora_b"]}
        return {name: np.asarray(value) for name, value in tensors.items()}

    return run


def lora_dense(features, config, base, low_rank):
    layer = linen.LoRADense(features, dtype=base, param_dtype=base, lora_dtype=low_rank, **config)

    def step(w, bias, x, g, a, b):
        params = {"kernel": w, "bias": bias}
        adapters = {"lora_a": a, "lora_b": b}
        y, pull = jax.vjp(
            lambda lora, x: layer.apply({"params": params, "lora": lora}, x), adapters, x
        )
        return y, *pull(g)

    return step


def lora_linear(features, config, base, low_rank):
    def step(w, bias, x, g, a, b):
        layer = lora_nnx.LoRALinear(
            *w.shape, dtype=base, param_dtype=base, lora_dtype=low_rank, **config, rngs=nnx.Rngs(0)
        )
        layer.kernel[...], layer.bias[...], layer.lora_a[...], layer.lora_b[...] = w, bias, a, b

        def loss(layer, x):
            y = layer(x)
            return jnp.vdot(g, y), y

        wrt = nnx.DiffState(0, lora_nnx.LoRAParam)
        (grads, dx), y = nnx.grad(loss, argnums=(wrt, 1), has_aux=True)(layer, x)
        return y, nnx.to_pure_dict(grads), dx

    return step


def in_torch(build):
    def run(case, alpha=ALPHA, rslora=False, base="float32", low_rank="float32"):
        dtypes = getattr(torch, base), getattr(torch, low_rank)
        linear = torch.nn.Linear(*case.w.shape, dtype=dtypes[0]).requires_grad_(False)
        linear.weight.copy_(torch.from_numpy(case.w).T)
        linear.bias.copy_(torch.from_numpy(case.bias))
        layer, a, b, transposed = build(linear, case, alpha, rslora, dtypes[1])
        x = torch.from_numpy(case.x).to(dtypes[0]).requires_grad_()
        y = layer(x)
        y.backward(torch.from_numpy(case.g).to(dtypes[0]))
        trained = [p for p in layer.parameters() if p.grad is not None]
        assert {id(p) for p in trained} == {id(a), id(b)}
        assert y.dtype == dtypes[0] and a.grad.dtype == dtypes[1]
        da, db = (a.grad.T, b.grad.T) if transposed else (a.grad, b.grad)
        tensors = {"y": y.detach(), "dx": x.grad, "dA": da, "dB": db}
        return {name: value.double().numpy() for name, value in tensors.items()}

    return run


def reference(linear, case, alpha, rslora, dtype):
    rank = case.b.shape[0]
    # The reference has no rank-stabilised scale; sqrt(r) times alpha makes it.
    layer = LinearWithLoRA(linear, rank, alpha * (rank**0.5 if rslora else 1), dtype=dtype)
    with torch.no_grad():
        layer.lora.A.copy_(torch.from_numpy(case.a))
        layer.lora.B.copy_(torch.from_numpy(case.b))
    return layer, layer.lora.A, layer.lora.B, False


def peft_linear(linear, case, alpha, rslora, dtype):
    r = case.b.shape[0]
    config = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora)
    layer = PeftLinear(linear, "default", config, r=r, lora_alpha=alpha)
    a, b = (pair.to(dtype)["default"].weight for pair in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        a.copy_(torch.from_numpy(case.a).T)
        b.copy_(torch.from_numpy(case.b).T)
    return layer, a, b, True


JAX = {"LoRADense": in_jax(lora_dense), "LoRALinear": in_jax(lora_linear)}
TORCH = {"reference": in_torch(reference), "peft": in_torch(peft_linear)}
each_jax = pytest.mark.parametrize("ours", JAX.values(), ids=JAX)
each_torch = pytest.mark.parametrize("theirs", TORCH.values(), ids=TORCH)


@each_jax
@each_torch
@settings(max_examples=12, deadline=None, derandomize=True)
@given(shape=st.sampled_from(SHAPES), rslora=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_fp32_holds_the_rule(ours, theirs, shape, rslora, seed):
    case = random_case(shape, seed, rslora=rslora)
    oracle.refuse_vacuous(case)
    hold(case, ours(case, rslora=rslora), theirs(case, rslora=rslora))


@each_jax
@each_torch
@pytest.mark.parametrize(
    ("base", "low_rank"),
    [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")],
)
def test_integers_and_a_dyadic_scale_are_bitwise_equal(ours, theirs, base, low_rank):
    case = exact_case(seed=0)
    oracle.refuse_vacuous(case, exact_scale=True)
    truth = oracle.truth(case)
    got, reference = (side(case, alpha=2, base=base, low_rank=low_rank) for side in (ours, theirs))
    for name, value in truth.items():
        assert (value == value.astype(ml_dtypes.bfloat16)).all(), f"{name} is not exact in bf16"
        for side in (got[name].astype(np.float64), reference[name]):
            np.testing.assert_array_equal(side, value, name)
            np.testing.assert_array_equal(np.signbit(side), np.signbit(value), name)


@pytest.mark.parametrize("side", [*JAX.values(), *TORCH.values()], ids=[*JAX, *TORCH])
def test_bf16_has_no_common_factor(side):
    """A scale that is rounded to bfloat16 shows as a slope of 2e-3 in everything it touches."""
    slopes = {"healthy": [], "rounded": []}
    for seed in range(8):
        # Without the base, whose rounding and whose share would hide it.
        case = random_case((64, 45, 6, 53), seed)
        case = dataclasses.replace(case, w=np.zeros_like(case.w), bias=np.zeros_like(case.bias))
        case = rounded_to_bf16(case)
        oracle.refuse_vacuous(case)
        scale = float(np.float32(case.scale).astype(ml_dtypes.bfloat16))
        found = {
            "healthy": side(case, base="bfloat16", low_rank="bfloat16"),
            "rounded": oracle.truth(dataclasses.replace(case, scale=scale)),
        }
        truth = oracle.truth(case)
        for kind, tensors in found.items():
            slopes[kind].append([oracle.slope(tensors[name], truth[name]) for name in truth])
    # One low-rank product has few independent roundings, so a single slope is noisy.
    healthy, rounded = (np.abs(np.mean(slopes[kind], axis=0)) for kind in ("healthy", "rounded"))
    print(healthy, rounded)
    assert (healthy < 4e-4).all() and (rounded > 1.8e-3).all()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(shape=st.sampled_from(SHAPES[:3]), seed=st.integers(0, 2**32 - 1))
def test_dora_norm_composes_to_the_reference(shape, seed):
    case = random_case(shape, seed)
    magnitude = np.random.default_rng(seed).uniform(0.5, 2.0, shape[3]).astype(np.float32)
    case = dataclasses.replace(case, m=magnitude)
    oracle.refuse_vacuous(case)
    hold(case, dora_in_jax(case), dora_in_torch(case))


def dora_in_jax(case):
    arrays = {name: jnp.asarray(getattr(case, name)) for name in ("x", "a", "b", "m")}
    y, grads = dora_step(arrays, jnp.asarray(case.w), case.bias, case.g, case.scale)
    tensors = {"y": y, "dx": grads["x"], "dA": grads["a"], "dB": grads["b"], "dm": grads["m"]}
    return {name: np.asarray(value) for name, value in tensors.items()}


@functools.partial(jax.jit, static_argnames="scale")
def dora_step(arrays, w, bias, g, scale):
    def dora(x, a, b, m):
        adapter = Adapter(a, b, scale)
        norm = lax.stop_gradient(lowrank.dora_norm(w, adapter))
        return m / norm * (x @ w + lowrank.dot(x, adapter, ([1], [0]))) + bias

    y, pull = jax.vjp(lambda arrays: dora(**arrays), arrays)
    return y, *pull(g)


def dora_in_torch(case):
    linear = torch.nn.Linear(*case.w.shape).requires_grad_(False)
    linear.weight.copy_(torch.from_numpy(case.w).T)
    linear.bias.copy_(torch.from_numpy(case.bias))
    layer = DoRALinear(linear, case.b.shape[0], ALPHA)
    with torch.no_grad():
        layer.lora.A.copy_(torch.from_numpy(case.a))
        layer.lora.B.copy_(torch.from_numpy(case.b))
        layer.magnitude.copy_(torch.from_numpy(case.m))
    x = torch.from_numpy(case.x).requires_grad_()
    y = layer(x)
    y.backward(torch.from_numpy(case.g))
    assert linear.weight.grad is None and linear.bias.grad is None
    a, b, m = layer.lora.A, layer.lora.B, layer.magnitude
    tensors = {"y": y.detach(), "dx": x.grad, "dA": a.grad, "dB": b.grad, "dm": m.grad}
    return {name: value.numpy() for name, value in tensors.items()}


# The oracle and the rule are code too.


def test_the_oracle_is_the_derivative_of_its_forward():
    case = random_case((5, 7, 3, 11), seed=0)
    case = dataclasses.replace(case, m=np.linspace(0.5, 2.0, 11).astype(np.float32))
    # ‖V‖ is a constant for the gradient, so it is frozen at the point of derivation.
    for kind in (case, dataclasses.replace(case, m=None)):
        gain = oracle.gain(kind)
        for field, name in {"x": "dx", "a": "dA", "b": "dB"}.items():
            step = 1e-6 * np.random.default_rng(1).standard_normal(getattr(case, field).shape)
            values = [
                np.vdot(case.g, oracle.evaluate(dataclasses.replace(kind, **{field: v}), gain)["y"])
                for v in (getattr(case, field) + step, getattr(case, field) - step)
            ]
            slope = np.vdot(oracle.truth(kind)[name], step)
            assert (values[0] - values[1]) / 2 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("tensor", ["y", "dx", "dA", "dB"])
def test_the_rule_sees_a_scale_wrong_by_1e_5(tensor):
    case = random_case(SHAPES[1], seed=0)
    truth, cond = oracle.truth(case)[tensor], oracle.cond(case)[tensor]
    wrong = oracle.truth(dataclasses.replace(case, scale=case.scale * (1 + 1e-5)))[tensor]
    unit = UNIT_ROUNDOFF["float32"]
    oracle.assert_within_rule(truth.astype("f4"), truth.astype("f4"), truth, cond, unit)
    with pytest.raises(AssertionError, match="jax is further"):
        oracle.assert_within_rule(wrong.astype("f4"), truth.astype("f4"), truth, cond, unit)
    with pytest.raises(AssertionError, match="the reference itself is wrong"):
        oracle.assert_within_rule(wrong.astype("f4"), wrong.astype("f4"), truth, cond, unit)


def test_vacuous_comparisons_are_refused():
    case = random_case(SHAPES[1], seed=0)
    oracle.refuse_vacuous(case)
    vacuous = {
        "zero": dataclasses.replace(case, b=np.zeros_like(case.b)),
        "of y": dataclasses.replace(case, b=case.b * 1e-4),
        "bfloat16 holds": dataclasses.replace(case, scale=2.0),
        "not all different": random_case((5, 7, 3, 7), seed=0),
    }
    for reason, kind in vacuous.items():
        with pytest.raises(Vacuous, match=reason):
            oracle.refuse_vacuous(kind)
    truth = oracle.truth(case)["y"]
    for wrong in (np.zeros_like(truth), truth * np.nan, truth.astype(np.float32)):
        with pytest.raises(Vacuous):
            oracle.assert_within_rule(truth, truth, wrong, 1.0, 1.0)
    with pytest.raises(AssertionError, match="shapes"):
        oracle.assert_within_rule(truth[:1], truth, truth, 1.0, 1.0)
    with pytest.raises(AssertionError, match="nan"):
        oracle.assert_within_rule(truth * np.nan, truth, truth, 1.0, 1.0)


def rounded_to_bf16(case):
    arrays = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    return dataclasses.replace(
        case,
        **{
            name: value.astype(ml_dtypes.bfloat16).astype(np.float32)
            for name, value in arrays.items()
            if isinstance(value, np.ndarray)
        },
    )


def hold(case, got, reference):
    truth, cond = oracle.truth(case), oracle.cond(case)
    assert got.keys() == reference.keys() == truth.keys()
    unit = UNIT_ROUNDOFF["float32"]
    for name in truth:
        args = got[name], reference[name], truth[name], cond[name], unit
        print(name, *oracle.assert_within_rule(*args, name))
