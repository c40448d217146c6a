"""Tables of names: both directions, every family, and PEFT's logits on the other side."""

from __future__ import annotations

import copy
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import LoraConfig, load_config, load_pretrained, plan, save_pretrained
from lora_jax.core.errors import AdapterError, ConfigError
from lora_jax.core.paths import flatten
from lora_jax.peft.names import naming
from lora_jax.peft.names import tables as tables
from lora_jax.peft.names.naming import jax_name, torch_name
from parity_tests.models import named_models
from parity_tests.models.named_models import random_adapters, twins

TABLES = {name: table for name, table in vars(tables).items() if name.isupper() and name[0] != "_"}


@pytest.mark.parametrize("family", named_models.ALL[:6], ids=str)
def test_every_module_of_the_family_has_a_row(family):
    pair = twins(family)
    theirs = {name.rpartition(".")[0] for name in pair.model.state_dict()}
    for path in flatten(pair.params):
        name = torch_name(family.names, path)
        if re.search(r"(kernel|weight|bias|scale|embedding)$", path) and "logits_bias" not in path:
            assert name in theirs, path
            assert torch_name(family.names, f"{jax_name(family.names, name)}.kernel") == name


FIELD = re.compile(r"\{(\w*)(?::([^{}]*))?\}")


@pytest.mark.parametrize("name", TABLES)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_both_directions_are_one_table(name, data):
    table = data.draw(st.sampled_from([TABLES[name], naming.stacked(TABLES[name])]))
    pattern = data.draw(st.sampled_from(sorted(table)))
    module = FIELD.sub(
        lambda field: data.draw(
            st.sampled_from(field[2].split("|")) if field[2] else st.integers(0, 200).map(str)
        ),
        pattern,
    )
    there = torch_name(table, f"{module}.kernel")
    assert there is not None
    # what two rows make, as a stack of one name could, must come back to where it came from
    back = naming.origins(table, there.replace("{}", "7"))
    assert module in [origin.name for origin in back]
    assert len(back) == (3 if isinstance(table[pattern], naming.Fused) else 1)


def test_names_that_need_a_choice_of_rows():
    table = {"a.{n}.{p:q|k}": "x.{n}.{p}", "b": "y.{}.{}"}
    assert torch_name(table, "a.3.q.kernel") == "x.3.q"
    assert torch_name(table, "a.3.v.kernel") is None
    assert torch_name(table, "aa.3.q.kernel") is None
    assert jax_name(table, "x.3.v") is None
    assert jax_name(table, "y.1.22") == "b"
    assert jax_name(table, "y.1") is None
    twice = {"a_{n}.b_{n}": "a.{n}.{n}"}
    assert torch_name(twice, "a_3.b_3.kernel") == "a.3.3"
    assert torch_name(twice, "a_3.b_7.kernel") is None


def test_rows_that_do_not_work_are_all_listed():
    table = {"a.{n}": "x", "b.{}": "y.{}", "c": "z", "d": "z", "e": "w.k"}
    table |= {"f": naming.Fused("w.{p:q|k}")}
    with pytest.raises(ConfigError) as error:
        torch_name(table, "a.1.kernel")
    for own in ("'a.{n}'", "'b.{}'", "'d'", "'f'"):
        assert own in str(error.value)


def small(targets=("q", "k", "o"), **fields):
    """Two weights named as in JAX, one of them the end of the other's name, and one idle."""
    params = {
        "q": {"kernel": jnp.ones((4, 5))},
        "enc": {"q": {"kernel": jnp.ones((5, 6))}, "k": {"kernel": jnp.ones((6, 4))}},
        "o": {"kernel": jnp.ones((4, 3))},
    }

    def fn(p, x):
        x = x @ p["q"]["kernel"] @ p["enc"]["q"]["kernel"] @ p["enc"]["k"]["kernel"]
        return x @ p["o"]["kernel"]

    found = plan(fn, params, LoraConfig(target_modules=targets, **fields), jnp.ones((2, 4)))
    return found, params, random_adapters(found)


NAMES = {"q": "wq", "enc.{p:q|k}": "deep.w{p}", "o": "out"}


def test_every_unmapped_name_is_listed(tmp_path):
    found, _, adapters = small()
    for names in ({"o": "out"}, {"o.kernel": "out"}.__getitem__):
        with pytest.raises(AdapterError, match="no PyTorch name") as error:
            save_pretrained(tmp_path / "a", found, adapters, names=names)
        assert not (tmp_path / "a").exists()
        for path in ("q.kernel", "enc.q.kernel", "enc.k.kernel"):
            assert f"  {path}" in str(error.value)
        assert "  o.kernel" not in str(error.value)
    save_pretrained(tmp_path / "a", found, adapters, names=NAMES)
    with pytest.raises(AdapterError, match="no PyTorch name"):
        load_pretrained(tmp_path / "a", found, names={"o": "out"})
    with pytest.raises(AdapterError, match="no name in the JAX model") as error:
        load_config(tmp_path / "a", names={"o": "out"})
    assert all(f"  {name}" in str(error.value) for name in ("wq", "deep.wq", "deep.wk"))


def test_two_parameters_of_one_name_are_an_error(tmp_path):
    found, _, adapters = small()
    with pytest.raises(AdapterError, match="the same name"):
        save_pretrained(tmp_path / "a", found, adapters, names=lambda path: "w")


TWO = {r"q|enc\.q|enc\.k": (), r"q|enc\.k": ("deep.wq",)}


@pytest.mark.parametrize("targets", TWO)
def test_patterns_are_resolved_before_renaming(targets, tmp_path):
    """``enc.q`` ends with ``q``: PEFT must tell them apart by their new names, as we did."""
    found, params, adapters = small(
        targets=targets,
        rank_pattern={"enc.*": 2, "q": 3},
        alpha_pattern={"enc.*": 5},
        use_rslora=True,
    )
    names = {"q": "wq", "enc.{p:q|k}": "deep.w{p}", "o": "deep.out"}
    save_pretrained(tmp_path / "a", found, adapters, names=names)
    config = load_config(tmp_path / "a")
    assert isinstance(config.target_modules, str) == bool(TWO[targets]), "names where they do"

    class Torch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wq = torch.nn.Linear(4, 5)
            self.deep = torch.nn.ModuleDict(
                {"wq": torch.nn.Linear(5, 6), "wk": torch.nn.Linear(6, 4)}
            )

    theirs = peft.PeftModel.from_pretrained(Torch(), tmp_path / "a").base_model.model
    layers = {"enc.k": theirs.deep.wk, "enc.q": theirs.deep.wq, "q": theirs.wq}
    leaves = {leaf.path.removesuffix(".kernel"): leaf for leaf in found.adapted}
    assert {name for name, own in layers.items() if hasattr(own, "lora_A")} == set(leaves)
    for name, leaf in leaves.items():
        assert layers[name].r["default"] == leaf.r
        assert layers[name].scaling["default"] == pytest.approx(leaf.scale)
    for given_params in (params, None):
        config = load_config(tmp_path / "a", names=names, params=given_params)
        again, _, _ = small(
            config.target_modules,
            r=config.r,
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
            use_rslora=True,
        )
        assert again.leaves == found.leaves
        read = load_pretrained(tmp_path / "a", again, names=names)
        jax.tree.map(np.testing.assert_array_equal, read, adapters)


def test_names_that_rename_nothing_leave_the_bytes_as_they_are(tmp_path):
    found, params, adapters = small(
        targets="all-linear", exclude_modules=["o"], rank_pattern={"k": 3}
    )
    same = {"{p:q|o}": "{p}", "enc.{p:q|k}": "enc.{p}"}
    save_pretrained(tmp_path / "a", found, adapters)
    save_pretrained(tmp_path / "b", found, adapters, names=same)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert load_config(tmp_path / "a", names=same, params=params) == load_config(tmp_path / "a")


def test_what_is_trained_in_full_is_renamed_too(tmp_path):
    found, params, adapters = small(targets=["q"], modules_to_save=["enc.k", "o"])
    save_pretrained(tmp_path / "a", found, adapters, names=NAMES)
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["deep.wk", "out"]
    config = load_config(tmp_path / "a", names=NAMES, params=params)
    assert config.modules_to_save == ("enc.k", "o")
    again, _, _ = small(config.target_modules, modules_to_save=config.modules_to_save)
    read = load_pretrained(tmp_path / "a", again, names=NAMES)
    jax.tree.map(np.testing.assert_array_equal, read, adapters)


def test_a_stack_whose_layers_differ_in_rank_is_an_error(tmp_path):
    pair = twins(named_models.ALL[5])
    config = peft.LoraConfig(target_modules=["q_proj"], rank_pattern={"layers.1.*q_proj": 3})
    peft.get_peft_model(copy.deepcopy(pair.model), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"layers.self_attn.q_proj: .*r=8.*r=3"):
        load_config(tmp_path, names=named_models.STACKED)


def test_a_plan_of_other_ranks_is_refused(tmp_path):
    found, _, adapters = small()
    save_pretrained(tmp_path / "a", found, adapters, names=NAMES)
    other, _, _ = small(lora_alpha=9, rank_pattern={"o": 3})
    with pytest.raises(AdapterError, match="does not fit the model and its plan") as error:
        load_pretrained(tmp_path / "a", other, names=NAMES)
    assert "out: the file has r=8 and scale 1, the plan r=3 and 3 for o.kernel" in str(error.value)
    assert "deep.wk" in str(error.value)


def test_targets_and_tensors_that_disagree_are_refused(tmp_path):
    found, _, adapters = small()
    save_pretrained(tmp_path / "a", found, adapters, names=NAMES)
    path = tmp_path / "a" / "adapter_config.json"
    fields = json.loads(path.read_text()) | {"target_modules": ["out", "deep.wq", "wv"]}
    path.write_text(json.dumps(fields))
    with pytest.raises(AdapterError, match="disagree") as error:
        load_config(tmp_path / "a", names=NAMES)
    assert "deep.wk: has an adapter" in str(error.value)
    fields["target_modules"] += ["deep.wk", "wq"]
    path.write_text(json.dumps(fields))
    with pytest.warns(UserWarning, match="'wv' has no adapter"):
        load_config(tmp_path / "a", names=NAMES)


def test_a_function_goes_one_way(tmp_path):
    found, params, adapters = small()
    names = functools.partial(torch_name, NAMES)
    save_pretrained(tmp_path / "a", found, adapters, names=names)
    assert load_config(tmp_path / "a", names=names, params=params).r == 8
    with pytest.raises(AdapterError, match="pass params"):
        load_config(tmp_path / "a", names=names)
