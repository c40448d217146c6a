"""``lora_bias`` in PEFT's files, and what PEFT itself makes of the same numbers."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from lora_jax import (
    LoraConfig,
    load_config,
    load_pretrained,
    lora,
    merge,
    open_adapter,
    plan,
    save_pretrained,
    write_adapter,
)
from lora_jax.core.errors import AdapterError
from lora_jax.parity.suite.torch_models import trainable
from lora_jax.peft.tensors import decode, encode
from lora_jax.torch.from_torch import from_torch
from parity_tests.laws.laws import planned, random_adapters
from parity_tests.laws.test_lora_bias import SUBJECTS
from parity_tests.parity.oracle import UNIT_ROUNDOFF, assert_within_rule

# PEFT takes the bias for a weight that was cut, and warns of bases that have none.
pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")

X = np.random.default_rng(0).normal(size=(5, 3, 8)).astype(np.float32)


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.conv = nn.Conv1d(3, 7, 3, groups=1, bias=bias)
        self.up = nn.Linear(6, 11, bias=bias)

    def forward(self, x):
        return torch.tanh(self.up(torch.tanh(self.conv(x))))


def pefts(bias=True):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["conv", "up"], lora_bias=True, init_lora_weights=False
    )
    return peft.get_peft_model(Net(bias), config).eval()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    theirs = pefts()
    theirs.save_pretrained(directory)
    torch.manual_seed(0)
    fn, params = from_torch(Net())
    found = plan(fn, params, load_config(directory), X)
    return theirs, directory, fn, params, found, load_pretrained(directory, found)


def test_outputs_gradients_and_merged_tensors_are_pefts(given):
    theirs, _, fn, params, found, adapters = given
    x = torch.from_numpy(X)
    value = torch.sin(theirs(x)).sum()
    value.backward()
    truth = pefts().double()
    torch.sin(truth(x.double())).sum().backward()
    gradients = jax.grad(lambda a: jnp.sum(jnp.sin(lora(fn)(params, a, X))))(adapters)
    ours = encode(found, gradients)
    assert "base_model.model.up.lora_B.bias" in ours and "base_model.model.conv.lora_B.bias" in ours
    wanted, exact = trainable(theirs), trainable(truth)
    assert ours.keys() == wanted.keys()
    for name, got in ours.items():
        args = (got, wanted[name].grad.numpy(), exact[name].grad.numpy())
        assert_within_rule(*args, 8.0, UNIT_ROUNDOFF["float32"], name)
    merged = merge(params, adapters)
    theirs_merged = pefts().merge_and_unload().state_dict()
    for name, tensor in pefts().double().merge_and_unload().state_dict().items():
        args = (np.asarray(merged[name]), theirs_merged[name].numpy(), tensor.numpy())
        assert_within_rule(*args, 2.0, UNIT_ROUNDOFF["float32"], name)


def test_our_file_is_pefts_and_stays_the_same(given, tmp_path):
    theirs, _, _, _, found, adapters = given
    save_pretrained(tmp_path / "one", found, adapters)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "one")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    save_pretrained(tmp_path / "two", found, load_pretrained(tmp_path / "one", found))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_without_a_bias_to_merge_into_both_refuse():
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        pefts(bias=False).merge_and_unload()
    fn, params = from_torch(Net(bias=False))
    config = LoraConfig(r=2, target_modules=["conv", "up"], lora_bias=True)
    with pytest.raises(AdapterError, match=r"(?s)conv.weight: its module.*up.weight: its module"):
        merge(params, plan(fn, params, config, X).init(jax.random.key(0)))


def test_a_plan_without_it_does_not_fit_the_file(given):
    _, directory, fn, params, found, _ = given
    other = plan(fn, params, replace(found.config, lora_bias=False), X)
    with pytest.raises(AdapterError) as error:
        load_pretrained(directory, other)
    assert set(error.value.problems) == {
        "lora_bias: the file has True, the plan False",
        "base_model.model.conv.lora_B.bias: unexpected",
        "base_model.model.up.lora_B.bias: unexpected",
    }
    with pytest.raises(AdapterError, match="got .*'bias'.*wanted|wanted .*'bias'"):
        encode(found, {name: replace(one, bias=None) for name, one in given[-1].items()})


def test_a_file_without_its_model_has_the_biases_and_comes_back(given, tmp_path):
    _, directory, *_, adapters = given
    file, opened = open_adapter(directory)
    assert opened.keys() == {"conv", "up"}
    for name, one in opened.items():
        np.testing.assert_array_equal(one.bias, adapters[f"{name}.weight"].bias)
    write_adapter(tmp_path / "again", file, opened)
    again = open_adapter(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again[1], opened)
    without = {name: replace(one, bias=None) for name, one in opened.items()}
    with pytest.raises(AdapterError, match="conv: got no bias.*\n.*up: got no bias"):
        write_adapter(tmp_path / "none", file, without)


@pytest.mark.parametrize("name", ["scan_of_transposed", "heads_out"])
def test_stacked_and_split_axes_are_matrices_in_the_file(name):
    subject = next(s for s in SUBJECTS if s.name == name)
    adapters, *_ = random_adapters(subject)
    found = planned(subject)[0]
    modules = {"scan_of_transposed": "layers.{}.m", "heads_out": "m"}
    tensors = encode(found, adapters, lambda path: modules[name])
    whole = adapters["m.kernel"].bias
    if name == "heads_out":
        np.testing.assert_array_equal(tensors["base_model.model.m.lora_B.bias"], np.ravel(whole))
    for n in range(len(whole) if name != "heads_out" else 0):
        key = f"base_model.model.layers.{n}.m.lora_B.bias"
        np.testing.assert_array_equal(tensors[key], whole[n])
    again = decode(found, tensors, lambda path: modules[name])
    jax.tree.map(np.testing.assert_array_equal, dict(again), dict(adapters))


def test_loraplus_has_pefts_groups():
    """PEFT gives ``lora_B.bias`` the rate of B, and no decay."""
    theirs = pefts()
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4, loraplus_weight_decay=0.5
    )
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    told = {
        (groups[id(p)]["lr"], groups[id(p)]["weight_decay"])
        for name, p in theirs.named_parameters()
        if name.endswith("lora_B.default.bias")
    }
    assert told == {(0.4, 0.0)}
