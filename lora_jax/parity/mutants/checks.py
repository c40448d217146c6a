"""Checks that are small enough to run after every planted bug, levels 1 to 6.

Imports without PyTorch; the checks need it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ... import lora
from ...core import delta, lowrank
from ...core.adapter import Adapter
from ...core.config import lora_config
from ...core.config.lora_config import LoraConfig
from ..reports.checks import Check
from ..suite import lora_oracle
from ..suite.cases import ALPHA, random_case
from ..tensors import Tensors
from ..verdicts import TensorVerdict, rel_l2
from . import checks_keeping, checks_learning, checks_small
from .holding import UNIT, held, same


def model(seed: int) -> Iterator[TensorVerdict]:
    """Hold the small model to PyTorch: logits, and the gradient of every A and B."""
    drawn = checks_small.draw(seed)
    shape = checks_small.ROWS, checks_small.VOCABULARY
    g = np.random.default_rng(seed + 1).standard_normal(shape)
    g = g.astype(np.float32)
    ours, theirs = checks_small.run_jax(drawn, g), checks_small.run_torch(drawn, g)
    truth = checks_small.run_torch(drawn, g, wide=True)
    moved = checks_small.run_torch(checks_small.off_by_a_rounding(drawn, seed), g, wide=True)
    if ours.keys() != theirs.keys():
        raise AssertionError(f"differing names: {sorted(ours.keys() ^ theirs.keys())}")
    for name, value in truth.items():
        cond = max(1.0, rel_l2(moved[name], value) / UNIT)
        yield from held({name: ours[name]}, {name: theirs[name]}, {name: value}, cond)


PATTERNS: dict[str, Any] = dict(
    r=6,
    lora_alpha=16,
    target_modules=["q", "sub_q", "v", "vo"],
    rank_pattern={r"0\.q": 3, "q": 5, r".*\.v": 7},
    alpha_pattern={"v": 11, r"1\.v": 13, "sub_q": 9},
)


def patterns(seed: int, use_rslora: bool = False) -> Iterator[TensorVerdict]:
    """Hold rank and scale of every module to those that PEFT gives it."""
    config = LoraConfig(**PATTERNS, use_rslora=use_rslora)
    theirs = _peft_scales(use_rslora)
    ours = {}
    for module in theirs:
        r, alpha = lora_config.rank_and_alpha(config, module)
        ours[module] = [r, lora_config.scale(config, r, alpha)]
    yield same("rank and scale", list(ours.values()), list(theirs.values()))


@functools.cache
def _peft_scales(use_rslora: bool) -> dict[str, list[int | float]]:
    import peft
    import torch

    layer = {name: torch.nn.Linear(4, 4) for name in ("q", "sub_q", "v", "vo")}
    net = torch.nn.Module()
    net.layers = torch.nn.ModuleList(torch.nn.ModuleDict(layer) for _ in range(3))
    config = peft.LoraConfig(**PATTERNS, use_rslora=use_rslora)
    with warnings.catch_warnings():
        # A pattern that stands behind a wider one is part of the check.
        warnings.filterwarnings("ignore", "The following alpha_pattern keys", RuntimeWarning)
        wrapped: Any = peft.inject_adapter_in_model(config, net)
    return {
        name: [module.r["default"], module.scaling["default"]]
        for name, module in wrapped.named_modules()
        if hasattr(module, "scaling")
    }


RATE = 0.4  # of dropout


def dropout(seed: int) -> Iterator[TensorVerdict]:
    """Hold a product under dropout to the truth on the dropped input, with an injected mask."""
    case = random_case((9, 33, 6, 5), seed)
    uniform = np.random.default_rng(seed).uniform(size=case.x.shape)
    keep = uniform < 1 - RATE
    with mock.patch.object(lowrank.random, "bernoulli", lambda key, p, shape: uniform < p):
        ours = _dropped(case, seed)
    # The base sees x, the low-rank path sees x under the mask, and 1/(1 - p) beside the scale.
    kept = replace(case, x=case.x * keep, scale=case.scale / (1 - RATE))
    base = replace(case, b=np.zeros_like(case.b))
    low = replace(kept, w=np.zeros_like(case.w), bias=np.zeros_like(case.bias))
    base_truth, low_truth = lora_oracle.truth(base), lora_oracle.truth(low)
    truth = {"y": base_truth["y"] + low_truth["y"], "dA": low_truth["dA"], "dB": low_truth["dB"]}
    narrow = {n: value.astype(np.float32) for n, value in truth.items()}
    yield from held(ours, narrow, truth)
    adapter = Adapter(jnp.ones((300, 1)), jnp.ones((1, 1)), 1.0, dropout=RATE)
    x, _ = lowrank.drop(jnp.ones((300, 300)), adapter, jax.random.key(seed))
    deviation = np.sqrt(RATE * (1 - RATE)) / 300
    near = abs(float(x.mean()) - (1 - RATE)) < 6 * deviation
    yield same("the share of inputs kept", [near], [1])


def _dropped(case: Any, seed: int) -> Tensors:
    params = {"w": jnp.asarray(case.w), "bias": jnp.asarray(case.bias)}

    def run(a: Any, b: Any) -> Any:
        adapters = {"w": Adapter(a, b, case.scale, dropout=RATE)}
        fn: Any = lora(lambda params, x: x @ params["w"] + params["bias"])
        return fn(params, adapters, jnp.asarray(case.x), dropout_key=jax.random.key(seed))

    y, pull = jax.vjp(run, jnp.asarray(case.a), jnp.asarray(case.b))
    da, db = pull(jnp.asarray(case.g))
    return {"y": np.asarray(y), "dA": np.asarray(da), "dB": np.asarray(db)}


def dora(seed: int) -> Iterator[TensorVerdict]:
    """Hold DoRA to the reference layer and to the truth, and its merged weight to its output."""
    import torch

    from lora_torch_ref import DoRALinear

    rng = np.random.default_rng(seed)
    case = replace(random_case((9, 33, 6, 5), seed), m=rng.uniform(0.5, 2, 5).astype(np.float32))
    arrays = {name: jnp.asarray(getattr(case, name)) for name in ("x", "w", "a", "b", "m")}
    y, grads, merged = _dora(case.scale)(arrays, case.bias, case.g)
    ours = {"y": y, "dx": grads["x"], "dA": grads["a"], "dB": grads["b"], "dm": grads["m"]}
    linear = torch.nn.Linear(33, 5).requires_grad_(False)
    linear.weight.copy_(torch.from_numpy(case.w).T)
    linear.bias.copy_(torch.from_numpy(case.bias))
    layer = DoRALinear(linear, 6, ALPHA)
    x = torch.from_numpy(case.x).requires_grad_()
    with torch.no_grad():
        for mine, value in ((layer.lora.A, case.a), (layer.lora.B, case.b)):
            mine.copy_(torch.from_numpy(value))
        layer.magnitude.copy_(torch.from_numpy(case.m))
    out = layer(x)
    out.backward(torch.from_numpy(case.g))
    leaves = {"dx": x, "dA": layer.lora.A, "dB": layer.lora.B, "dm": layer.magnitude}
    theirs = {"y": out.detach().numpy()} | {n: p.grad.numpy() for n, p in leaves.items()}
    truth = lora_oracle.truth(case)
    yield from held({n: np.asarray(v) for n, v in ours.items()}, theirs, truth, cond=4.0)
    whole = {"ours": np.asarray(merged), "theirs": layer.weight.detach().numpy().T}
    products = {side: {"x·merged": case.x.astype("f8") @ w} for side, w in whole.items()}
    true = {"x·merged": truth["y"] - case.bias}
    yield from held(products["ours"], products["theirs"], true, cond=4.0)


@functools.cache
def _dora(scale: float) -> Callable[..., Any]:
    def step(arrays: Any, bias: Any, g: Any) -> Any:
        def run(arrays: Any) -> Any:
            adapters = {"w": Adapter(arrays["a"], arrays["b"], scale, magnitude=arrays["m"])}
            params = {"w": lax.stop_gradient(arrays["w"])}
            return lora(lambda params, x: x @ params["w"] + bias)(params, adapters, arrays["x"])

        y, pull = jax.vjp(run, arrays)
        adapter = Adapter(arrays["a"], arrays["b"], scale, magnitude=arrays["m"])
        return y, pull(g)[0], delta.merged(arrays["w"], adapter)

    return jax.jit(step)


def experts(seed: int) -> Iterator[TensorVerdict]:
    """Hold a product by groups to PyTorch's, one group after the other."""
    import torch

    rng = np.random.default_rng(seed)
    shapes = {"x": (9, 5), "w": (3, 5, 7), "a": (3, 5, 2), "b": (3, 2, 7), "g": (9, 7)}
    drawn = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    y, (da, db) = _experts()({n: jnp.asarray(v) for n, v in drawn.items()})
    ours = {"y": np.asarray(y), "dA": np.asarray(da), "dB": np.asarray(db)}

    def theirs(dtype: Any) -> Tensors:
        t: Any = {
            n: torch.tensor(v, dtype=dtype, requires_grad=n in "ab") for n, v in drawn.items()
        }
        rows = t["x"].split([2, 4, 3])
        whole = [rows[n] @ (t["w"][n] + 16 / 3 * t["a"][n] @ t["b"][n]) for n in range(3)]
        y = torch.cat(whole)
        y.backward(t["g"])
        return {"y": y.detach().numpy(), "dA": t["a"].grad.numpy(), "dB": t["b"].grad.numpy()}

    yield from held(ours, theirs(torch.float32), theirs(torch.float64))


@functools.cache
def _experts() -> Callable[..., Any]:
    def step(t: Any) -> Any:
        def run(a: Any, b: Any) -> Any:
            adapters = {"w": Adapter(a, b, 16 / 3, "sio")}
            sizes = jnp.array([2, 4, 3], jnp.int32)
            fn = lora(lambda params, x: lax.ragged_dot(x, params["w"], sizes))
            return fn({"w": t["w"]}, adapters, t["x"])

        y, pull = jax.vjp(run, t["a"], t["b"])
        return y, pull(t["g"])

    return jax.jit(step)


def _checks() -> Iterator[Check]:
    both, alone = ("torch", "peft"), ("torch",)
    yield Check("patterns/peft", 1, patterns, both)
    yield Check("patterns/peft rslora", 1, functools.partial(patterns, use_rslora=True), both)
    yield Check("start/peft", 1, checks_keeping.start)
    yield Check("loss/torch", 1, checks_learning.loss, alone)
    yield Check("dropout/injected", 1, dropout)
    yield Check("DoRA/reference", 1, dora, alone)
    yield Check("experts/torch", 1, experts, alone)
    yield Check("optimiser/torch", 3, checks_learning.optimiser, alone)
    yield Check("merging/torch", 5, checks_keeping.merging, alone)
    yield Check("files/peft", 6, checks_keeping.files, both)
    yield Check("files of experts/peft", 6, checks_keeping.expert_files, both)
    yield Check("small model/torch", 2, model, alone)


CHECKS = tuple(_checks())


def reset() -> None:
    """Forget what was compiled and planned, which a planted bug may have gone into."""
    for cached in (_dora, _experts, checks_keeping.filed):
        cached.cache_clear()
    checks_small.reset()
