"""PyTorch models through ``from_torch``: PEFT's logits, loss and gradients, and PEFT's files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode

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
from lora_jax.peft.tensors import encode
from lora_jax.torch import from_torch
from parity_tests.laws import relative
from parity_tests.oracle import UNIT_ROUNDOFF, Vacuous, assert_within_rule, rel_l2
from parity_tests.tiers import cases
from parity_tests.training import copied, trainable

UNIT = UNIT_ROUNDOFF["float32"]

# Roundings in the chain of products behind one gradient or logit.
CHAIN = 32.0

B, T, V, D, F, H, L = 2, 7, 41, 21, 37, 3, 2
IDS = np.random.default_rng(0).integers(0, V, (B, T))
MASK = (np.arange(T) < [[5], [T]]).astype(np.int32)
TEXT = dict(input_ids=IDS, attention_mask=MASK)
NEXT = TEXT | dict(labels=np.where(MASK, IDS, -100))
CLASS = dict(labels=np.array([3, 1]))
IMAGE = dict(pixel_values=np.random.default_rng(0).normal(size=(B, 3, 10, 15)).astype(np.float32))
COMMON = dict(attn_implementation="eager", initializer_range=0.3)
LAYERS = dict(hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H)
DECODER = LAYERS | dict(vocab_size=V, num_key_value_heads=1, head_dim=10, use_cache=False)


@dataclass(frozen=True)
class Model:
    """A transformers model with a random configuration, and what is done to it."""

    model: Callable[[Any], Any]
    config: Callable[..., Any]
    sizes: Mapping[str, Any]
    targets: tuple[str, ...]
    batch: Mapping[str, np.ndarray]
    saved: tuple[str, ...] | None = None
    conv1d: bool = False

    def make(self) -> Any:
        torch.manual_seed(0)
        return self.model(self.config(**self.sizes, **COMMON))

    def peft_load(self, directory: Any, **kwargs: Any) -> Any:
        # PEFT finds out by itself that GPT-2 keeps its weights as (in, out), and says so.
        warns = partial(pytest.warns, UserWarning, match="fan_in_fan_out")
        with warns() if self.conv1d else nullcontext():
            return peft.PeftModel.from_pretrained(self.make(), directory, **kwargs).eval()


MODELS = {
    "llama": Model(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        DECODER,
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        NEXT,
    ),
    "qwen3": Model(
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        DECODER | dict(tie_word_embeddings=True),
        ("q_proj", "v_proj", "down_proj"),
        NEXT,
    ),
    "bert": Model(
        transformers.BertForSequenceClassification,
        transformers.BertConfig,
        LAYERS | dict(vocab_size=V, num_labels=5),
        ("query", "value"),
        TEXT | CLASS,
        saved=("classifier",),
    ),
    "gpt2": Model(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        dict(vocab_size=V, n_embd=D, n_inner=F, n_layer=L, n_head=H, use_cache=False),
        ("c_attn", "c_proj", "c_fc"),
        NEXT,
        conv1d=True,
    ),
    "vit": Model(
        transformers.ViTForImageClassification,
        transformers.ViTConfig,
        LAYERS | dict(image_size=(10, 15), patch_size=5, num_labels=5),
        ("query", "value", "intermediate.dense"),
        IMAGE | CLASS,
    ),
}


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


@pytest.fixture(scope="module", params=cases(MODELS, slow=("llama",)))
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


class Wide(TorchFunctionMode):
    """Makes float64 of every float32 that a model asks for, as its norms, softmax and RoPE do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = {torch.float32: torch.float64}
        args = [wide.get(v, v) if isinstance(v, torch.dtype) else v for v in args]
        kwargs = {
            k: wide.get(v, v) if isinstance(v, torch.dtype) else v
            for k, v in (kwargs or {}).items()
        }
        out = (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            raise Vacuous(f"the oracle holds the float32 of {func}")
        return out


def outputs(model, batch, mode=nullcontext) -> dict[str, np.ndarray]:
    """Return PyTorch's loss and logits."""
    return copied(run(model, batch, mode))


def outputs_and_gradients(model, batch, mode=nullcontext) -> dict[str, np.ndarray]:
    """Return PyTorch's loss and logits, and the gradient of every trained tensor by PEFT's name."""
    out = run(model, batch, mode)
    out["loss"].backward()
    return copied(out | {name: p.grad for name, p in trainable(model).items()})


def run(model, batch, mode) -> dict[str, torch.Tensor]:
    dtype = next(model.parameters()).dtype
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    with mode():
        out = model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()})
    return {"loss": out.loss, "logits": out.logits}


def arrays(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in tree.items()}


def ours(given: Given, adapters) -> dict[str, np.ndarray]:
    """Return our loss, logits and gradients by the names and in the layout of PEFT's file."""
    (loss, logits), gradients = given.step(adapters, given.params)
    return arrays({"loss": loss, "logits": logits} | encode(given.plan, gradients))


def check(got, theirs, truth) -> None:
    """Hold every tensor to the rule of ``parity_tests/oracle.py``."""
    for name, value in got.items():
        values = (np.atleast_1d(v) for v in (value, theirs[name], truth[name]))
        assert_within_rule(*values, CHAIN, UNIT, name)


def test_outputs_and_gradients_are_pefts(given, tmp_path):
    before = {name: t.clone() for name, t in given.module.state_dict().items()}
    saved = save_pretrained(tmp_path / "adapter", given.plan, given.adapters)
    theirs = given.model.peft_load(saved, is_trainable=True)
    truth = outputs_and_gradients(copy.deepcopy(theirs).double(), given.model.batch, Wide)
    got = ours(given, given.adapters)
    assert got.keys() == truth.keys()
    check(got, outputs_and_gradients(theirs, given.model.batch), truth)
    fresh = given.plan.init(jax.random.key(0))
    assert rel_l2(ours(given, fresh)["logits"], truth["logits"]) > 1e-2, "vacuous"
    for name, tensor in given.module.state_dict().items():
        assert torch.equal(tensor.view(torch.int8), before[name].view(torch.int8)), name
    assert given.module.training


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
    truth = outputs(copy.deepcopy(theirs).double(), given.model.batch, Wide)
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
    truth = outputs(copy.deepcopy(theirs).double(), given.model.batch, Wide)
    check(got, outputs(theirs, given.model.batch), truth)
    assert rel_l2(truth["logits"], arrays(given.base(given.params))["logits"]) > 1e-2
