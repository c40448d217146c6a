"""Adapter files as other programs leave them: names, shards, folders of the hub, odd fields."""

from __future__ import annotations

import json

import peft
import pytest
import safetensors.numpy
import torch

from lora_jax import load_config, load_pretrained, open_adapter, save_pretrained
from lora_jax.cli.checkpoint import read_checkpoint
from lora_jax.cli.main import main
from lora_jax.cli.objects import load_inputs
from lora_jax.core.errors import AdapterError, LoraError
from lora_jax.models import BertConfig, load_params
from lora_jax.train.classifier import read_record
from lora_jax.train.data import load_tokenizer
from lora_jax.train.reading import read_texts
from parity_tests.models.test_bert import tiny_config
from parity_tests.peft.test_hub import REPO, assert_same, hub, surroundings  # noqa: F401
from parity_tests.peft.test_strict_files import (
    CONFIG,
    WEIGHTS,
    planned,
    random_adapters,
    tensors_of,
    with_config,
    with_tensors,
)

PREFIX = "base_model.model."
INDEX = f"{WEIGHTS}.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def named(name):
    """PEFT's ``state_dict``: the adapter's name within each of its tensors'."""

    def rename(key):
        key = key.replace("lora_A.weight", f"lora_A.{name}.weight")
        key = key.replace("lora_B.weight", f"lora_B.{name}.weight")
        return key.replace("lora_magnitude_vector", f"lora_magnitude_vector.{name}.weight")

    return rename


# What is made of each of PEFT's names.
SPELLINGS = {
    "an adapter's name": named("default"),
    "another adapter's name": named("mine"),
    "a magnitude's weight": lambda key: key.replace("_vector", "_vector.weight"),
    "a magnitude's name": lambda key: key.replace("_vector", "_vector.default"),
    "wrapped twice": lambda key: PREFIX + key,
    "wrapped three times": lambda key: PREFIX + PREFIX + key,
    "data parallel outside": lambda key: "module." + key,
    "compiled outside": lambda key: "_orig_mod." + key,
    "compiled inside": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "fsdp everywhere": lambda key: key.replace(".q.", "._fsdp_wrapped_module.q."),
    "rematerialised": lambda key: key.replace(".q.", "._checkpoint_wrapped_module.q."),
    "all at once": lambda key: "_orig_mod.module." + PREFIX + named("x")(key),
}


def saved(tmp_path, **fields):
    found = planned(use_dora=True, **fields)
    adapters = random_adapters(found)
    return save_pretrained(tmp_path / "a", found, adapters), found, adapters


def respell(directory, rename):
    tensors = tensors_of(directory)
    safetensors.numpy.save_file({rename(k): v for k, v in tensors.items()}, directory / WEIGHTS)


def test_every_spelling_reads_as_pefts_own(tmp_path):
    directory, found, adapters = saved(tmp_path)
    content, bare = (directory / WEIGHTS).read_bytes(), open_adapter(directory)
    for name, rename in SPELLINGS.items():
        (directory / WEIGHTS).write_bytes(content)
        respell(directory, rename)
        assert (directory / WEIGHTS).read_bytes() != content, name
        assert_same(load_pretrained(directory, found), adapters)
        assert_same(open_adapter(directory), bare)


def test_data_parallel_inside_pefts_prefix_is_read_with_a_warning(tmp_path):
    directory, found, adapters = saved(tmp_path)
    respell(directory, lambda key: key.replace(PREFIX, f"{PREFIX}module."))
    with pytest.warns(UserWarning, match="DistributedDataParallel .* module as"):
        assert_same(load_pretrained(directory, found), adapters)


def test_the_state_dict_of_a_peft_model_is_an_adapter_file(tmp_path):
    """All of what PEFT trains in one raw state dict, against PEFT's own file of it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3))
    model.add_module("head", torch.nn.Linear(3, 2))
    config = peft.LoraConfig(target_modules=["0", "1"], use_dora=True, modules_to_save=["head"])
    wrapped = peft.get_peft_model(model, config)
    for value in wrapped.parameters():
        value.data = torch.randn_like(value)
    wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    wanted = open_adapter(tmp_path / "a")
    raw = {
        key: value.detach().numpy()
        for key, value in wrapped.state_dict().items()
        if "lora_" in key or "modules_to_save" in key
    }
    assert f"{PREFIX}0.lora_embedding_A.default" in raw
    assert f"{PREFIX}1.lora_magnitude_vector.default.weight" in raw
    safetensors.numpy.save_file(raw, tmp_path / "a" / WEIGHTS)
    assert len(wanted[1]) == 4
    assert_same(open_adapter(tmp_path / "a"), wanted)


def test_two_adapters_in_one_file_are_refused_with_both_names(tmp_path):
    directory, found, _ = saved(tmp_path)
    key = f"{PREFIX}0.q.lora_A.{{}}.weight"
    tensors = tensors_of(directory)
    both = {key.format(name): tensors[f"{PREFIX}0.q.lora_A.weight"] for name in ("one", "two")}
    with_tensors(lambda t: t.update(both))(directory)
    for read in (lambda d: load_pretrained(d, found), open_adapter):
        with pytest.raises(AdapterError) as caught:
            read(directory)
        assert [name for name in both if name not in str(caught.value)] == []
        assert "says the same more than once" in str(caught.value)


def test_a_saved_module_with_children_keeps_their_names(tmp_path):
    found = planned(modules_to_save=["1"], target_modules=["0.q"])
    adapters = random_adapters(found)
    directory = save_pretrained(tmp_path / "a", found, adapters)
    respell(directory, lambda key: key.replace(".1.q.", ".1.modules_to_save.default.q."))
    assert_same(load_pretrained(directory, found), adapters)
    # Without the adapter's name "q" is a child, and PEFT has no such file.
    respell(directory, lambda key: key.replace(".default.", "."))
    with pytest.raises(AdapterError, match=r"1\.modules_to_save\.q\.weight: unexpected"):
        load_pretrained(directory, found)


def shard(directory):
    tensors = tensors_of(directory)
    (directory / WEIGHTS).unlink()
    where = {}
    for n, keys in enumerate((sorted(tensors)[:4], sorted(tensors)[4:])):
        name = f"adapter_model-0000{n + 1}-of-00002.safetensors"
        safetensors.numpy.save_file({key: tensors[key] for key in keys}, directory / name)
        where |= dict.fromkeys(keys, name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def test_shards_with_an_index_are_one_adapter(tmp_path, capsys):
    directory, found, adapters = saved(tmp_path)
    bare = open_adapter(directory)
    where = shard(directory)
    assert_same(load_pretrained(directory, found), adapters)
    assert_same(open_adapter(directory), bare)
    first = sorted(where)[0]
    for changed, words in (
        (where | {first: sorted(where.values())[-1]}, f"{first}: in "),
        (where | {"lost": where[first]}, "lost: in the index, in no shard"),
        (where | {first: "../x.safetensors"}, "names files elsewhere"),
        (where | {first: "absent.safetensors"}, "absent.safetensors is missing"),
        ({}, "names no tensors"),
    ):
        (directory / INDEX).write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(AdapterError, match=words):
            load_pretrained(directory, found)


def test_a_folder_of_a_repository_is_an_adapter_too(hub, tmp_path):  # noqa: F811
    directory, found, adapters = saved(tmp_path)
    plain = {name: (directory / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    shard(directory)
    sharded = {path.name: path.read_bytes() for path in directory.iterdir()}
    commit, newer = "a" * 40, "b" * 40
    hub.commits[commit] = {f"x/y/{name}": content for name, content in sharded.items()}
    hub.commits[commit] |= {f"z/{name}": content for name, content in plain.items()}
    hub.commits[newer] = {"README.md": b"nothing else"}
    for name, folder in (
        (f"{REPO}/x/y@{commit}", None),
        (f"{REPO}@{commit}", "x/y"),
        (f"{REPO}/x@{commit}", "y"),
        (f"{REPO}/z@{commit}", None),
    ):
        assert load_config(name, subfolder=folder) == found.config
        assert_same(load_pretrained(name, found, subfolder=folder), adapters)
    assert_same(open_adapter(f"{REPO}/x/y@{commit}"), open_adapter(directory))
    with pytest.raises(AdapterError, match="no directory 'me/ours/z' was found"):
        load_pretrained(f"{REPO}/z", found)
    for bad in ("../x", "/x", "x//y", "x/..", "x\n"):
        with pytest.raises(AdapterError, match="subfolder: got"):
            load_config(REPO, subfolder=bad)
    assert_same(load_pretrained(tmp_path, found, subfolder="a"), adapters)


EMPTY = ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying", "init_lora_weights")
EMPTY += ("rank_pattern", "alpha_pattern", "loftq_config", "fan_in_fan_out", "inference_mode")


def test_null_is_what_peft_has_by_default(tmp_path):
    found = planned()
    adapters = random_adapters(found)
    directory = save_pretrained(tmp_path / "a", found, adapters)
    with_config(**dict.fromkeys(EMPTY), trainable_token_indices={})(directory)
    assert load_config(directory) == found.config
    assert_same(load_pretrained(directory, found), adapters)
    with_config(r=None)(directory)
    with pytest.raises(AdapterError, match="r: got None"):
        load_config(directory)


def test_targets_that_are_null_are_the_files_modules(tmp_path):
    directory, found, adapters = saved(tmp_path, rank_pattern={"0.q": 1})
    with_config(target_modules=None, layers_to_transform=None)(directory)
    config = load_config(directory)
    # An expression, as the name "q" would mean every module whose name ends with it.
    assert config.target_modules == r"0\.q|0\.v|1\.q"
    again = planned(
        **{k: getattr(config, k) for k in ("target_modules", "rank_pattern")}, use_dora=True
    )
    assert {leaf.path for leaf in again.adapted} == {leaf.path for leaf in found.adapted}
    assert_same(load_pretrained(directory, again), adapters)


def test_a_git_lfs_pointer_says_so(tmp_path, capsys):
    directory, found, _ = saved(tmp_path)
    for name in (CONFIG, WEIGHTS):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(POINTER)
        for read in (lambda d: load_pretrained(d, found), open_adapter):
            with pytest.raises(AdapterError, match=f"{name}: .*git lfs pull"):
                read(directory)
        assert main(["inspect", str(directory)]) == 2
        assert "git lfs pull" in capsys.readouterr().err
        (directory / name).write_bytes(content)
    shard(directory)
    (directory / INDEX).write_bytes(POINTER)
    with pytest.raises(AdapterError, match="git lfs pull"):
        load_pretrained(directory, found)


# What reads a file of that name in a directory.
READERS = {
    "config.json": BertConfig.from_file,
    "tokenizer.json": lambda path: load_tokenizer(path.parent),
    "run.json": lambda path: read_record(path.parent),
    "texts.csv": read_texts,
    "model.safetensors": lambda path: read_checkpoint(path.parent),
    "model.safetensors.index.json": lambda path: read_checkpoint(path.parent),
    "inputs.npz": lambda path: load_inputs(str(path)),
}


def test_a_pointer_in_the_place_of_any_file_says_so(tmp_path):
    for name, read in READERS.items():
        path = tmp_path / name.partition(".")[0] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(POINTER)
        with pytest.raises(LoraError, match=f"cannot read .*{name}: it is a Git LFS pointer"):
            read(path)
    # The weights, where the configuration is whole.
    tiny_config().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    with pytest.raises(LoraError, match="model.safetensors: it is a Git LFS pointer"):
        load_params(tmp_path / "model")
