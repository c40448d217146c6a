"""PyTorch models through ``from_torch``: PEFT's logits, loss and gradients, and PEFT's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from lora_jax import (
    Full,
    LoraConfig,
    load_config,
    load_pretrained,
    lora,
    merge,
    plan,
    save_pretrained,
)
from lora_jax.parity.sides.wide_torch import Wide, widened
from lora_jax.parity.suite.torch_models import (
    CLASS,
    DECODER,
    MODELS,
    NEXT,
    TEXT,
    D,
    F,
    H,
    Model,
    T,
    V,
    outputs,
    outputs_and_gradients,
)
from lora_jax.peft.tensors import encode
from lora_jax.torch.from_torch import from_torch
from parity_tests.laws.laws import relative
from parity_tests.parity.oracle import UNIT_ROUNDOFF, assert_within_rule, rel_l2
from parity_tests.tiers import cases

# What the other tests of whole models take from here.
__all__ = [
    "CLASS",
    "DECODER",
    "MODELS",
    "NEXT",
    "TEXT",
    "D",
    "F",
    "H",
    "Model",
    "T",
    "V",
    "Wide",
    "arrays",
    "check",
    "outputs",
    "outputs_and_gradients",
]

UNIT = UNIT_ROUNDOFF["float32"]

# Roundings in the chain of products behind one gradient or logit.
CHAIN = 32.0


@dataclass(frozen=True)
class Given:
    """A model read through the front end, with adapters whose B is away from zero."""

    model: Model
    module: Any
    fn: Callable[..., Any]
    params: Any
    plan: Any
    adapters: Any
    base: Callable[..., Any]
    step: Callable[..., Any]


@pytest.fixture(scope="module", params=cases(MODELS, slow=("llama", "qwen3", "bert")))
def given(request) -> Given:
    model = MODELS[request.param]
    module = model.make()
    fn, params = from_torch(module)
    config = LoraConfig(
        r=3, lora_alpha=4, target_modules=model.targets, modules_to_save=model.saved
    )
    found = plan(fn, params, config, **model.batch)
    rng = np.random.default_rng(1)

    def draw(entry):
        def normal(leaf):
            return jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype)

        return (
            Full(normal(entry.value))
            if isinstance(entry, Full)
            else replace(entry, b=normal(entry.b))
        )

    adapters = {path: draw(entry) for path, entry in found.init(jax.random.key(3)).items()}

    def loss(adapters, params):
        out = lora(fn)(params, adapters, **model.batch)
        return out["loss"], out["logits"]

    return Given(
        model,
        module,
        fn,
        params,
        found,
        adapters,
        jax.jit(lambda params: fn(params, **model.batch)),
        jax.jit(jax.value_and_grad(loss, has_aux=True)),
    )


def arrays(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in tree.items()}


def ours(given: Given, adapters) -> dict[str, np.ndarray]:
    """Return our loss, logits and gradients by the names and in the layout of PEFT's file."""
    (loss, logits), gradients = given.step(adapters, given.params)
    return arrays({"loss": loss, "logits": logits} | encode(given.plan, gradients))


def check(got, theirs, truth) -> None:
    """Hold every tensor to the rule of ``parity_tests/parity/oracle.py``."""
    for name, value in got.items():
        values = (np.atleast_1d(v) for v in (value, theirs[name], truth[name]))
        assert_within_rule(*values, CHAIN, UNIT, name)


def test_outputs_and_gradients_are_pefts(given, tmp_path):
    before = {name: t.clone() for name, t in given.module.state_dict().items()}
    saved = save_pretrained(tmp_path / "adapter", given.plan, given.adapters)
    theirs = given.model.peft_load(saved, is_trainable=True)
    truth = outputs_and_gradients(widened(theirs), given.model.batch)
    got = ours(given, given.adapters)
    assert got.keys() == truth.keys()
    check(got, outputs_and_gradients(theirs, given.model.batch), truth)
    fresh = given.plan.init(jax.random.key(0))
    assert rel_l2(ours(given, fresh)["logits"], truth["logits"]) > 1e-2, "vacuous"
    for name, tensor in given.module.state_dict().items():
        assert torch.equal(tensor.view(torch.int8), before[name].view(torch.int8)), name
    assert given.module.training


@pytest.mark.slow
def test_fresh_adapters_change_nothing(given):
    fresh = given.plan.init(jax.random.key(0))
    with jax.disable_jit():
        base = given.fn(given.params, **given.model.batch)
        adapted = lora(given.fn)(given.params, fresh, **given.model.batch)
    assert base.keys() == adapted.keys() == {"loss", "logits"}
    jax.tree.map(np.testing.assert_array_equal, base, adapted)
    (loss, logits), _ = given.step(fresh, given.params)
    assert relative({"loss": loss, "logits": logits}, given.base(given.params)) <= 1e-6


def test_merged_parameters_give_what_pefts_merged_model_gives(given, tmp_path):
    theirs = given.model.peft_load(save_pretrained(tmp_path / "a", given.plan, given.adapters))
    truth = outputs(widened(theirs), given.model.batch)
    merged = given.base(merge(given.params, given.adapters))
    check(arrays(merged), outputs(theirs.merge_and_unload(), given.model.batch), truth)


def test_an_adapter_of_peft_gives_pefts_outputs(given, tmp_path):
    config = peft.LoraConfig(
        r=3,
        lora_alpha=4,
        target_modules=list(given.model.targets),
        modules_to_save=given.model.saved and list(given.model.saved),
        fan_in_fan_out=given.model.conv1d,
        init_lora_weights=False,
    )
    torch.manual_seed(5)
    theirs = peft.get_peft_model(given.model.make(), config).eval()
    theirs.save_pretrained(tmp_path)
    found = plan(given.fn, given.params, load_config(tmp_path), **given.model.batch)
    (loss, logits), _ = given.step(load_pretrained(tmp_path, found), given.params)
    got = arrays({"loss": loss, "logits": logits})
    truth = outputs(widened(theirs), given.model.batch)
    check(got, outputs(theirs, given.model.batch), truth)
    assert rel_l2(truth["logits"], arrays(given.base(given.params))["logits"]) > 1e-2
