"""``nn.MultiheadAttention`` in PEFT's files, read through ``from_torch`` or by a table."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import flax.linen as linen
import numpy as np
import peft
import pytest
import torch

from lora_jax import LoraConfig, load_config, load_pretrained, lora, merge, plan, save_pretrained
from lora_jax.core.errors import AdapterError, PlanError
from lora_jax.peft.files import read_weights
from lora_jax.peft.keys import HALVED, PREFIX
from lora_jax.peft.names.naming import Fused
from lora_jax.torch.from_torch import from_torch
from parity_tests.models.named_models import random_adapters, relative

N, T, D, HEADS = 2, 5, 12, 3
RELATIVE = 1e-5
X = np.random.default_rng(0).normal(size=(N, T, D)).astype(np.float32)
FILES = ("adapter_config.json", "adapter_model.safetensors")


class Attending(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(D, HEADS, batch_first=True, **options)
        self.head = torch.nn.Linear(D, 4)

    def forward(self, x, key=None, value=None):
        key, value = (x if one is None else one for one in (key, value))
        return self.head(self.attn(x, key, value, need_weights=False)[0])


@functools.cache
def given():
    torch.manual_seed(0)
    module = Attending().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return (module, *from_torch(module))


def test_out_proj_counts_twice_in_pefts_files(tmp_path):
    """The direct formula: the file's pairs once in in_proj and twice in out_proj, as in PEFT."""
    module, fn, params = given()
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=["attn"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(module), config).eval()
    theirs.save_pretrained(tmp_path)
    tensors = read_weights(tmp_path)
    change = {
        name: 3.5 * tensors[f"{own}.lora_B.weight"] @ tensors[f"{own}.lora_A.weight"]
        for name, own in (
            ("attn.in_proj_weight", f"{PREFIX}attn"),
            ("attn.out_proj.weight", f"{PREFIX}attn{HALVED}"),
        )
    }
    found = plan(fn, params, load_config(tmp_path), X)
    merged = merge(params, load_pretrained(tmp_path, found))
    for name, factor in {"attn.in_proj_weight": 1, "attn.out_proj.weight": 2}.items():
        np.testing.assert_allclose(
            np.asarray(merged[name] - params[name]), factor * change[name], rtol=1e-4, atol=1e-5
        )
    wanted = theirs(torch.from_numpy(X)).detach().numpy()
    assert relative(fn(params, X), wanted) > 1e-2, "vacuous: the adapter does nothing"
    assert relative(fn(merged, X), wanted) <= RELATIVE
    whole = theirs.merge_and_unload()(torch.from_numpy(X)).detach().numpy()
    assert relative(fn(merged, X), whole) <= RELATIVE


def test_keys_and_values_of_their_own(tmp_path):
    module, fn, params = given()
    key, value = X[:, :3] * 0.7, X[:, 1:4]
    # ranges of the outputs are one pair of the whole in the file
    slices = {"attn": [(0, 5), (9, 12)]}
    config = LoraConfig(r=2, lora_alpha=7, target_modules=["attn", "head"], output_slices=slices)
    found = plan(fn, params, config, X, key, value)
    adapters = random_adapters(found)
    theirs = peft.PeftModel.from_pretrained(
        copy.deepcopy(module), save_pretrained(tmp_path / "a", found, adapters)
    ).eval()
    wanted = theirs(*map(torch.from_numpy, (X, key, value))).detach().numpy()
    ours = lora(fn)(params, adapters, X, key, value)
    assert relative(fn(params, X, key, value), wanted) > 1e-2, "vacuous"
    assert relative(ours, wanted) <= RELATIVE


def test_names_and_patterns_mean_the_module_as_in_peft():
    _, fn, params = given()
    config = LoraConfig(
        target_modules=["attn"], rank_pattern={"attn": 3}, alpha_pattern={"out_proj|attn": 5}
    )
    adapted = plan(fn, params, config, X).adapted
    assert [(leaf.path, leaf.r, leaf.module) for leaf in adapted] == [
        ("attn.in_proj_weight", 3, "attn"),
        ("attn.out_proj.weight", 3, "attn"),
    ]
    with pytest.raises(PlanError, match="rank_pattern: got 'out_proj'"):
        plan(fn, params, replace(config, rank_pattern={"out_proj": 3}), X)
    # PEFT's all-linear gives out_proj a pair that no forward uses
    every = plan(fn, params, LoraConfig(target_modules="all-linear"), X)
    assert [leaf.path for leaf in every.adapted] == ["head.weight"]
    assert "PyTorch's attention, which PEFT adapts by its name" in str(every)


def test_what_peft_has_no_layer_for_is_refused(tmp_path):
    _, fn, params = given()
    dora = LoraConfig(r=2, target_modules=["attn"], use_dora=True)
    for config, why in (
        (dora, "DoRA in an nn.MultiheadAttention"),
        (LoraConfig(r=2, target_modules=["out_proj"]), "half of an nn.MultiheadAttention"),
    ):
        found = plan(fn, params, config, X)
        with pytest.raises(AdapterError, match=why):
            save_pretrained(tmp_path / "a", found, random_adapters(found))
    assert not (tmp_path / "a").exists()
    other = from_torch(Attending(kdim=4, vdim=6))
    arguments = (X, X[..., :4], X[..., :6])
    with pytest.raises(PlanError, match="target_modules: got 'attn'"):
        plan(*other, LoraConfig(target_modules=["attn"]), *arguments)


# By a table: Flax's attention, whose kernels are apart, and PyTorch's.


class Flax(linen.Module):
    @linen.compact
    def __call__(self, x):
        attn = linen.MultiHeadDotProductAttention(HEADS, name="attn")
        return linen.Dense(4, name="head")(attn(x, x))


TABLE = {
    "attn.{p:query|key|value}": Fused("attn.in_proj_weight"),
    "attn.out": "attn.out_proj",
    "head": "head",
}


@functools.cache
def flax():
    """The same weights in Flax's layout, moved by hand and not by the table."""
    _, _, params = given()
    kernels = params["attn.in_proj_weight"].reshape(3, HEADS, -1, D).transpose(0, 3, 1, 2)
    biases = params["attn.in_proj_bias"].reshape(3, HEADS, -1)
    attn = {
        name: dict(kernel=kernels[n], bias=biases[n])
        for n, name in enumerate(("query", "key", "value"))
    }
    attn["out"] = dict(
        kernel=params["attn.out_proj.weight"].T.reshape(HEADS, -1, D),
        bias=params["attn.out_proj.bias"],
    )
    head = dict(kernel=params["head.weight"].T, bias=params["head.bias"])
    return lambda p, x: Flax().apply({"params": p}, x), dict(attn=attn, head=head)


CASES: dict[str, Any] = {
    "all": dict(target_modules=["query", "key", "value", "out", "head"]),
    "query and value alone": dict(target_modules=["query", "value"]),
    "ranks and scales of their own": dict(
        target_modules=["query", "key", "value", "out"],
        rank_pattern={"query": 3, "out": 4},
        alpha_pattern={"key": 2, "out": 3},
    ),
    "a higher rank in out": dict(target_modules=["query", "out"], rank_pattern={"out": 5}),
    "rsLoRA": dict(target_modules=["query", "key", "out"], use_rslora=True),
}


@pytest.mark.parametrize("case", CASES)
def test_flaxs_attention_is_pytorchs_in_peft(case, tmp_path):
    fn, params = flax()
    found = plan(fn, params, LoraConfig(r=2, lora_alpha=7, **CASES[case]), X)
    adapters = random_adapters(found)
    save_pretrained(tmp_path / "a", found, adapters, names=TABLE)
    module = given()[0]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(module), tmp_path / "a").eval()
    wanted = theirs(torch.from_numpy(X)).detach().numpy()
    assert relative(fn(params, X), wanted) > 1e-2, "vacuous: the adapters change nothing"
    assert relative(lora(fn)(params, adapters, X), wanted) <= RELATIVE
    again = plan(fn, params, load_config(tmp_path / "a", names=TABLE, params=params), X)
    read = load_pretrained(tmp_path / "a", again, names=TABLE)
    assert relative(lora(fn)(params, read, X), wanted) <= RELATIVE
    save_pretrained(tmp_path / "b", again, read, names=TABLE)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_pefts_attention_is_flaxs(tmp_path):
    module, (fn, params) = given()[0], flax()
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, lora_alpha=7, target_modules=["attn", "head"], init_lora_weights=False,
        rank_pattern={"attn": 3},
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(module), config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    wanted = theirs(torch.from_numpy(X)).detach().numpy()
    found = plan(fn, params, load_config(tmp_path / "peft", names=TABLE), X)
    adapters = load_pretrained(tmp_path / "peft", found, names=TABLE)
    assert {leaf.path.split(".")[1]: leaf.r for leaf in found.adapted} == {
        "kernel": 2, "query": 3, "key": 3, "value": 3, "out": 3,
    }  # fmt: skip
    assert relative(lora(fn)(params, adapters, X), wanted) <= RELATIVE
    save_pretrained(tmp_path / "a", found, adapters, names=TABLE)
    ours, pefts = read_weights(tmp_path / "a"), read_weights(tmp_path / "peft")
    assert ours.keys() == pefts.keys()
    for key, tensor in pefts.items():
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)


def test_out_alone_and_the_bias_of_in_proj_have_no_place(tmp_path):
    fn, params = flax()
    alone = plan(fn, params, LoraConfig(r=2, target_modules=["out"]), X)
    with pytest.raises(AdapterError, match="the out_proj of attn"):
        save_pretrained(tmp_path / "a", alone, random_adapters(alone), names=TABLE)
    config = LoraConfig(r=2, target_modules=["query", "key", "value"], bias="lora_only")
    biased = plan(fn, params, config, X)
    with pytest.raises(AdapterError, match="its bias is trained in full, which PEFT does not"):
        save_pretrained(tmp_path / "a", biased, random_adapters(biased), names=TABLE)


def test_the_bias_of_out_proj_lies_where_peft_has_it(tmp_path):
    fn, params = flax()
    config = LoraConfig(r=2, target_modules=["out", "query", "key", "value"], bias="lora_only")
    found = plan(fn, params, config, X)
    kept = {path: value for path, value in found.full.items() if path == "attn.out.bias"}
    leaves = tuple(
        leaf if leaf.path in kept or leaf.adapted else replace(leaf, why="frozen")
        for leaf in found.leaves
    )
    found = replace(found, full=kept, leaves=leaves)
    save_pretrained(tmp_path / "a", found, random_adapters(found), names=TABLE)
    assert f"{PREFIX}attn{HALVED}.base_layer.bias" in read_weights(tmp_path / "a")
