"""Every family of names: PEFT's logits from our files, and ours from PEFT's."""

from __future__ import annotations

import copy
import functools

import jax
import numpy as np
import peft
import pytest
import torch

from lora_jax import LoraConfig, load_config, load_pretrained, lora, plan, save_pretrained
from lora_jax.peft.names import tables as tables
from lora_jax.peft.names.naming import torch_name
from parity_tests.laws import laws
from parity_tests.models import named_models
from parity_tests.models.named_models import random_adapters, relative, twins
from parity_tests.tiers import cases

RELATIVE = 1e-5

# One whose names are PyTorch's, and one whose layers are stacked; the others are slow.
QUICK = ("bert", "llama, stacked", "neox, heads interleaved")


@pytest.fixture(autouse=True)
def quick():
    with laws.quick_compilation():
        yield


# PEFT says so of Conv1D and corrects itself.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


@pytest.mark.parametrize("family", cases(named_models.ALL, quick=QUICK))
def test_peft_loads_our_file_and_gives_our_logits(family, tmp_path):
    pair = twins(family)
    config = LoraConfig(
        r=2, lora_alpha=7, target_modules=family.targets, rank_pattern=family.patterns
    )
    found = plan(pair.fn, pair.params, config, pair.inputs)
    assert {leaf.r for leaf in found.adapted} >= {2, 3}, "vacuous: one rank"
    adapters = random_adapters(found)
    save_pretrained(tmp_path / "a", found, adapters, names=family.names)
    ours = laws.jit(lora(pair.fn))(pair.params, adapters, pair.inputs)
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(pair.model), tmp_path / "a").eval()
    theirs = pair.run(wrapped)
    base = pair.run(pair.model)
    assert relative(base, theirs) > 1e-2, "vacuous: the adapters change nothing"
    assert relative(pair.fn(pair.params, pair.inputs), base) <= RELATIVE
    assert relative(ours, theirs) <= RELATIVE
    loaded = load_config(tmp_path / "a", names=family.names, params=pair.params)
    again = plan(pair.fn, pair.params, loaded, pair.inputs)
    read = load_pretrained(tmp_path / "a", again, names=family.names)
    if family.fused:
        assert relative(laws.jit(lora(pair.fn))(pair.params, read, pair.inputs), theirs) <= RELATIVE
    else:
        jax.tree.map(np.testing.assert_array_equal, read, adapters)
    save_pretrained(tmp_path / "b", again, read, names=family.names)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("family", cases(named_models.ALL, quick=QUICK))
def test_we_load_pefts_file_and_give_its_logits(family, tmp_path):
    pair = twins(family)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=7,
        init_lora_weights=False,
        target_modules=list(family.torch_targets),
        rank_pattern=dict(family.torch_patterns),
    )
    wrapped = peft.get_peft_model(copy.deepcopy(pair.model), config).eval()
    wrapped.save_pretrained(tmp_path)
    names = family.names
    if family.name == "vit, heads apart":
        # its pooler has no twin in PyTorch, and a function is a table, too
        names = functools.partial(torch_name, tables.VIT_FLAX)
    found = plan(
        pair.fn, pair.params, load_config(tmp_path, names=names, params=pair.params), pair.inputs
    )
    adapters = load_pretrained(tmp_path, found, names=names)
    ours = laws.jit(lora(pair.fn))(pair.params, adapters, pair.inputs)
    theirs = pair.run(wrapped)
    assert relative(pair.run(pair.model), theirs) > 1e-2, "vacuous: the adapters change nothing"
    assert relative(ours, theirs) <= RELATIVE
