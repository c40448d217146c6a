"""What a configuration file says is kept or refused, on every path, for every field of PEFT's."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy

from lora_jax import (
    LoraConfig,
    for_changed_base,
    load_config,
    load_pretrained,
    open_adapter,
    plan,
    save_pretrained,
    write_adapter,
)
from lora_jax.cli.main import main
from lora_jax.core.config.peft_fields import DEFAULTS
from lora_jax.core.errors import AdapterError
from lora_jax.peft import config_json, load_adapter_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Values with a meaning for every field: what PEFT or its users write.
CHANGED_BASE = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"]
VALUES = {
    "alora_invocation_tokens": [[5, 6], [6, 5], []],
    "alpha_pattern": [{"q": 3, "0.q": 5.5}, {"0.q": 5, "q": 3}],
    "arrow_config": [{"top_k": 3}, None],
    "auto_mapping": [{"base_model_class": "M", "parent_library": "m"}],
    "base_model_name_or_path": ["some/base", ""],
    "bias": ["all", "lora_only", "none"],
    "corda_config": [{"corda_method": "kpm"}],
    "ensure_weight_tying": [True, False],
    "eva_config": [{"rho": 2.0}],
    "exclude_modules": [["1.q", "0.v"], "1.*", []],
    "fan_in_fan_out": [True, False],
    "inference_mode": [False, True],
    "init_lora_weights": [True, False, "gaussian", "orthogonal", "eva", "mica", *CHANGED_BASE],
    "kasa_config": [{"beta": 1e-4}],
    "layer_replication": [[[0, 4], [2, 5]]],
    "layers_pattern": ["layers", ["layers", "h"], ["h", "blocks"]],
    "layers_to_transform": [1, [0, 2], []],
    "loftq_config": [{"loftq_bits": 4}, {}, None],
    "lora_alpha": [16, 0.5, 0],
    "lora_bias": [True],
    "lora_dropout": [0.1],
    "lora_ga_config": [{"direction": "ArB2r"}],
    "megatron_config": [{"tensor_model_parallel_size": 2}],
    "megatron_core": ["megatron.core", None],
    "modules_to_save": [["classifier", "score"], [], None],
    "monteclora_config": [{"num_samples": 8}],
    "peft_type": ["LORA", "LOHA"],
    "peft_version": ["0.9.0", None],
    "qalora_group_size": [32],
    "r": [4],
    "rank_pattern": [{"q": 3, "0.q": 5}],
    "revision": ["main"],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "target_modules": [["q", "v"], "all-linear", r".*\.(q|v)", None],
    "target_parameters": [["experts.up", "experts.down"]],
    "task_type": ["SEQ_CLS", None],
    "trainable_token_indices": [[3, 1], {"wte": [7, 2]}],
    "use_bdlora": [{"target_modules_bd_a": ["q"]}],
    "use_dora": [True],
    "use_qalora": [True],
    "use_rslora": [True],
    "velora_config": [{"num_groups": 4}],
}
# What a field needs beside it.
BESIDE = {
    "layers_pattern": {"layers_to_transform": [1]},
    # Where no target is set PEFT looks up the architecture's; beside parameters it sets none.
    "target_parameters": {"target_modules": []},
}
# Lists that are sets in PEFT.
UNORDERED = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform")


def content(fields):
    return json.dumps({"peft_type": "LORA", "target_modules": ["q"]} | fields).encode()


def kept(fields):
    """Return the file's fields after decoding and encoding; None where decoding refuses."""
    try:
        return json.loads(config_json.encode(config_json.decode(content(fields))))
    except AdapterError:
        return None


def same(name, one, other):
    return (
        sorted(one) == sorted(other)
        if name in UNORDERED and isinstance(one, list)
        else (json.dumps(one) == json.dumps(other))
    )


def test_every_field_of_pefts_has_values_here():
    assert VALUES.keys() == set(peft.LoraConfig.__dataclass_fields__)


def test_encoding_what_was_decoded_is_the_identity_or_decoding_is_an_error():
    """The law: no field that a file has is lost or changed, and each is refused or said."""
    lost, refused = [], set()
    for name, values in VALUES.items():
        for value in values:
            fields = BESIDE.get(name, {}) | {name: value}
            found = kept(fields)
            if found is None:
                refused.add(name)
                continue
            given = {"peft_type": "LORA", "target_modules": ["q"]} | fields
            lost += [
                f"{field}: {given[field]!r} became {found.get(field)!r}"
                for field in given
                if not same(field, given[field], found.get(field))
            ]
            # What was not said is PEFT's default.
            others = found.keys() - given.keys()
            defaults = peft.LoraConfig().to_dict() | DEFAULTS
            lost += [
                f"{field}: not given, became {found[field]!r}"
                for field in others
                if field not in ("task_type", "base_model_name_or_path", "peft_version")
                and found[field] != defaults[field]
                and field not in UNORDERED
            ]
    assert lost == []
    wanted = {"arrow_config", "kasa_config", "layer_replication", "megatron_config"}
    wanted |= {"monteclora_config", "use_bdlora", "use_qalora", "velora_config", "peft_type"}
    assert refused == wanted


def model(params, x):
    for weight in params.values():
        x = jnp.tanh(x @ weight["weight"])
    return x


PARAMS = {"0.q": {"weight": jnp.ones((7, 5))}, "0.v": {"weight": jnp.ones((5, 4))}}


def planned(**fields):
    config = LoraConfig(**(dict(r=2, lora_alpha=3, target_modules=["q", "v"]) | fields))
    return plan(model, PARAMS, config, jnp.ones((3, 7)))


def adapters_of(found):
    rng = np.random.default_rng(0)
    return {
        leaf.path: leaf.adapter(
            jnp.asarray(rng.normal(size=leaf.a_shape), jnp.float32),
            jnp.asarray(rng.normal(size=leaf.b_shape), jnp.float32),
        )
        for leaf in found.adapted
    }


def edited(directory, **fields):
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


@pytest.fixture
def saved(tmp_path):
    found = planned()
    return save_pretrained(tmp_path / "a", found, adapters_of(found)), found


def run(capsys, *argv):
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("init", [init for init in CHANGED_BASE if init != "corda"])
def test_adapters_of_a_changed_base_are_refused_or_say_so_on_every_path(
    init, saved, tmp_path, capsys
):
    directory, found = saved
    edited(directory, init_lora_weights=init)
    base = tmp_path / "model"
    base.mkdir()
    weights = {f"{n}.weight": np.ones(w["weight"].shape[::-1], "f4") for n, w in PARAMS.items()}
    safetensors.numpy.save_file(weights, base / "model.safetensors")
    # The plan's own field does not matter: the file says what the tensors are.
    for one in (found, plan(model, PARAMS, load_config(directory), jnp.ones((3, 7)))):
        with pytest.raises(AdapterError, match=f"{init}.*changed the base"):
            load_pretrained(directory, one)
    assert load_pretrained(directory, for_changed_base(found)).keys() == {
        "0.q.weight",
        "0.v.weight",
    }
    with pytest.raises(AdapterError, match=f"{init}.*changed the base"):
        open_adapter(directory)
    for argv in (("merge", base, directory), ("combine", tmp_path / "out", directory, directory)):
        code, _, err = run(capsys, *argv, *([tmp_path / "out"] if argv[0] == "merge" else []))
        assert code == 2 and init in err and "changed the base" in err, argv
        assert not (tmp_path / "out").exists()
    code, out, _ = run(capsys, "inspect", directory)
    assert code == 0 and f"suspicious: init_lora_weights='{init}' changed the base" in out
    code, out, _ = run(capsys, "diff", directory, directory)
    assert code == 0 and f"init_lora_weights='{init}' changed the base" in out
    code, _, err = run(capsys, "convert", directory, tmp_path / "new")
    assert code == 0, err
    assert load_config(tmp_path / "new").init_lora_weights == init


# Fields that need no tensor of their own are kept by convert.
KEPT = {
    "alora_invocation_tokens": [5, 6],
    "bias": "all",
    "ensure_weight_tying": True,
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "lora_dropout": 0.25,
    "modules_to_save": ["head"],
    "revision": "main",
    "task_type": "CAUSAL_LM",
}
# The others ask for tensors that the file does not have.
UNMET = {
    "use_dora": True,
    "lora_bias": True,
    "trainable_token_indices": {"wte": [3]},
    "target_parameters": ["experts.up"],
}


@pytest.mark.parametrize("option", [[], ["--lora-alpha", "5"]])
def test_convert_keeps_every_field_or_says_what_has_no_tensors(option, saved, tmp_path, capsys):
    directory, _ = saved
    before = json.loads((directory / CONFIG).read_text())
    edited(directory, **KEPT)
    code, _, err = run(capsys, "convert", directory, tmp_path / "new", *option)
    assert code == 0, err
    after = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert {name: after[name] for name in KEPT} == KEPT
    assert after["lora_alpha"] == (5 if option else before["lora_alpha"])
    for name, value in UNMET.items():
        edited(directory, **before | {name: value})
        code, _, err = run(capsys, "convert", directory, tmp_path / name, *option)
        assert code == 2 and f"{name}: the configuration has" in err, name
        assert not (tmp_path / name).exists()


def test_combine_refuses_adapters_that_act_from_other_tokens_on(tmp_path, capsys):
    found = planned(alora_invocation_tokens=[5, 6])
    for name, tokens in (("a", [5, 6]), ("b", [5, 6]), ("c", [7])):
        save_pretrained(tmp_path / name, found, adapters_of(found))
        edited(tmp_path / name, alora_invocation_tokens=tokens)
    code, _, err = run(capsys, "combine", tmp_path / "ab", tmp_path / "a", tmp_path / "b")
    assert code == 0, err
    assert load_config(tmp_path / "ab").alora_invocation_tokens == (5, 6)
    code, _, err = run(capsys, "combine", tmp_path / "ac", tmp_path / "a", tmp_path / "c")
    assert code == 2 and "alora_invocation_tokens" in err and "(7,)" in err


def test_what_is_opened_and_written_again_keeps_every_field(saved, tmp_path):
    directory, _ = saved
    edited(directory, **KEPT | {"init_lora_weights": "mica", "alora_invocation_tokens": [6, 5]})
    write_adapter(tmp_path / "b", *open_adapter(directory))
    one, other = (json.loads((d / CONFIG).read_text()) for d in (directory, tmp_path / "b"))
    assert one == other


def test_names_that_only_we_have_for_a_draw_are_pefts_default_in_the_file(tmp_path):
    for name in ("torch", "kaiming_uniform_rank", "eva"):
        found = planned(init_lora_weights=name)
        save_pretrained(tmp_path / name, found, adapters_of(found))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert peft.LoraConfig.from_pretrained(tmp_path / name).init_lora_weights is True


def test_the_configurations_of_files_differ_in_nothing_else():
    file = config_json.decode(content({}))
    assert file.config.on_unmatched == "warn"
    assert file.config == LoraConfig(target_modules=["q"])
    assert replace(file.config, r=3) != file.config
    assert load_adapter_file.__doc__
