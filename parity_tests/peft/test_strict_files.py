"""What no reader of an adapter may let through, and what ``strict=False`` makes of it."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import tracemalloc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy

from lora_jax import LoraConfig, load_config, load_pretrained, open_adapter, plan, save_pretrained
from lora_jax.core.config import peft_fields
from lora_jax.core.errors import AdapterError, ConfigError
from lora_jax.peft import AdapterFile, LoadReport, config_json, load_adapter_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHAPES = {"0.q": (7, 5), "0.v": (5, 4), "1.q": (4, 6)}
HALF = "base_model.model.{}.lora_{}.weight"


def model(params, x):
    for weight in params.values():
        x = jnp.tanh(x @ weight["weight"])
    return x


def planned(**fields):
    params = {name: {"weight": jnp.ones(shape)} for name, shape in SHAPES.items()}
    config = dict(r=2, lora_alpha=3, target_modules=["q", "v"]) | fields
    return plan(model, params, LoraConfig(**config), jnp.ones((3, 7)))


def random_adapters(found, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), found.abstract()
    )


@pytest.fixture
def saved(tmp_path):
    found = planned()
    adapters = random_adapters(found)
    save_pretrained(tmp_path / "a", found, adapters, base_model="some/base")
    return tmp_path / "a", found, adapters


def tensors_of(directory):
    return safetensors.numpy.load_file(directory / WEIGHTS)


def with_tensors(change):
    def apply(directory):
        tensors = tensors_of(directory)
        change(tensors)
        safetensors.numpy.save_file(tensors, directory / WEIGHTS)

    return apply


def with_config(**fields):
    def apply(directory):
        old = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(old | fields))

    return apply


def with_header(change):
    """Edit the header's text; the tensors' bytes stay."""

    def apply(directory):
        content = (directory / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = change(content[8 : 8 + length])
        new = struct.pack("<Q", len(header)) + header + content[8 + length :]
        (directory / WEIGHTS).write_bytes(new)

    return apply


def say_twice(header):
    fields = json.loads(header)
    name = HALF.format("0.q", "A")
    return (json.dumps(fields)[:-1] + f', "{name}": {json.dumps(fields[name])}}}').encode()


def claim_length(length):
    def apply(directory):
        content = (directory / WEIGHTS).read_bytes()
        (directory / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])

    return apply


def claim_shape(header):
    fields = json.loads(header)
    fields[HALF.format("0.q", "A")] |= {"shape": [2**40, 7], "data_offsets": [0, 28 * 2**40]}
    return json.dumps(fields).encode()


Q_A, V_B = HALF.format("0.q", "A"), HALF.format("0.v", "B")


def several(tensors):
    del tensors[V_B]
    tensors[Q_A][0, 0] = np.inf
    tensors["base_model.model.0.q.base_layer.weight"] = np.ones((5, 7), np.float32)
    tensors["base_model.model.0.q.lora_C.weight"] = np.ones((5, 7), np.float32)


# The change, and what the message of every reader names.
BROKEN = {
    "several at once": (
        with_tensors(several),
        [f"{V_B}: missing", f"{Q_A}: holds NaN or infinite", "base weights inside", "lora_C"],
    ),
    "no prefix": (
        with_tensors(lambda t: t.update({"0.q.lora_A.weight": t.pop(Q_A)})),
        ["0.q.lora_A.weight: unexpected, wanted a name that begins with base_model.model."],
    ),
    "a rank that is not the configuration's": (
        with_tensors(lambda t: t.update({Q_A: np.ones((3, 7), np.float32)})),
        [f"{Q_A}: got (3, 7)"],
    ),
    "float64": (
        with_tensors(lambda t: t.update({Q_A: np.ones((2, 7))})),
        [Q_A, "float64", "jax_enable_x64"],
    ),
    "the configuration targets less": (
        with_config(target_modules=["q"]),
        ["0.v", "target_modules=('q',) leaves it out"],
    ),
    "the configuration excludes one": (
        with_config(exclude_modules=["0.v"]),
        ["0.v", "leaves it out"],
    ),
    "a tensor said twice": (with_header(say_twice), [f"says these names twice: {Q_A}"]),
    "a header of terabytes": (claim_length(2**43), ["the header claims 8796093022208 bytes"]),
    "a header of all bytes": (claim_length(2**64 - 1), ["the header claims"]),
    "a tensor of terabytes": (with_header(claim_shape), ["not a whole safetensors file"]),
    "a header nested too deeply": (
        with_header(lambda header: b"[" * 200_000),
        ["not a whole safetensors file"],
    ),
    "a pickle": (
        lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"),
        ["is a pickle, which is never read"],
    ),
}

CONFIGS = {
    "a field said twice": (b'{"peft_type": "LORA", "r": 8, "r": 4}', ["r: said twice"]),
    "a pattern said twice": (
        b'{"peft_type": "LORA", "rank_pattern": {"q": 8, "q": 4}}',
        ["q: said twice"],
    ),
    "NaN": (b'{"peft_type": "LORA", "lora_alpha": NaN}', ["NaN is no number"]),
    "a number that is infinite": (b'{"peft_type": "LORA", "qalora_group_size": 1e999}', ["1e999"]),
    "nested too deeply": (b"[" * 200_000, ["nested too deeply"]),
    "an endless number": (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", ["not JSON"]),
    "an alpha beyond floats": (
        b'{"peft_type": "LORA", "lora_alpha": ' + b"9" * 400 + b"}",
        ["wanted a finite number"],
    ),
    "many unsupported": (
        b'{"peft_type": "LORA", "use_qalora": true, "layer_replication": [1],'
        b' "kasa_config": {"x": 2}, "r": "8"}',
        ["use_qalora", "layer_replication", "kasa_config", "r:"],
    ),
    "elements of other kinds": (
        b'{"peft_type": "LORA", "target_modules": ["q", 1], "layers_to_transform": [true],'
        b' "target_parameters": [1]}',
        ["target_modules", "layers_to_transform", "target_parameters"],
    ),
    "expressions that end in others": (
        b'{"peft_type": "LORA", "rank_pattern": {"(?i)q": 2}, "target_modules": "q{99999999999}"}',
        ["(?i)q", "q{99999999999}"],
    ),
}


def read_with_the_plan(directory, found):
    return load_pretrained(directory, found)


def read_bare(directory, found):
    return open_adapter(directory)


@pytest.mark.parametrize("read", [read_with_the_plan, read_bare])
@pytest.mark.parametrize("name", BROKEN)
def test_every_reader_refuses_and_lists_everything(name, read, saved):
    directory, found, _ = saved
    change, words = BROKEN[name]
    change(directory)
    with pytest.raises(AdapterError) as caught:
        read(directory, found)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_a_broken_configuration_is_refused_and_lists_everything(name, tmp_path):
    content, words = CONFIGS[name]
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        load_config(tmp_path)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("name", ["a header of terabytes", "a tensor of terabytes"])
def test_a_claim_of_terabytes_allocates_nothing(name, saved):
    directory, found, _ = saved
    BROKEN[name][0](directory)
    tracemalloc.start()
    with pytest.raises(AdapterError):
        load_pretrained(directory, found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_configuration_and_tensors_are_complained_of_together(saved):
    directory, found, _ = saved
    with_config(r=4, target_modules=["q"])(directory)
    with_tensors(several)(directory)
    with pytest.raises(AdapterError) as caught:
        load_pretrained(directory, found)
    for word in ("r: the file has 4, the plan 2", "0.v", f"{V_B}: missing", "lora_C"):
        assert word in str(caught.value)


def test_the_order_of_patterns_is_kept_and_counts(tmp_path):
    patterns = {"q": 3, "0.q": 5}
    found = planned(alpha_pattern=patterns)
    save_pretrained(tmp_path / "a", found, random_adapters(found))
    config = load_config(tmp_path / "a")
    assert list(config.alpha_pattern) == ["q", "0.q"]
    again = {leaf.path: leaf.scale for leaf in planned(alpha_pattern=config.alpha_pattern).adapted}
    assert again == {leaf.path: leaf.scale for leaf in found.adapted}
    with pytest.raises(AdapterError, match="alpha_pattern: the file has .*, the plan "):
        load_pretrained(tmp_path / "a", planned(alpha_pattern=dict(reversed(patterns.items()))))


def test_not_strict_warns_once_and_returns_what_fits(saved):
    directory, found, adapters = saved
    with_tensors(several)(directory)
    with pytest.warns(UserWarning) as caught:
        loaded, report = load_pretrained(directory, found, strict=False)
    assert len(caught) == 1
    assert loaded.keys() == {"1.q.weight"} and report.left_out == ("0.q.weight", "0.v.weight")
    jax.tree.map(np.testing.assert_array_equal, loaded["1.q.weight"], adapters["1.q.weight"])
    with pytest.raises(AdapterError) as strict:
        load_pretrained(directory, found)
    assert len(report.problems) == 4
    for problem in report.problems:
        assert problem in str(caught[0].message) and problem in str(strict.value)


def test_not_strict_leaves_out_what_would_get_another_scale(saved):
    directory, found, _ = saved
    with_config(alpha_pattern={"v": 1})(directory)
    with pytest.warns(UserWarning, match="alpha_pattern"):
        loaded, report = load_pretrained(directory, found, strict=False)
    assert loaded.keys() == {"0.q.weight", "1.q.weight"} and report.left_out == ("0.v.weight",)


def test_not_strict_says_nothing_of_a_whole_file_and_refuses_a_broken_one(saved):
    directory, found, adapters = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, report = load_pretrained(directory, found, strict=False)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    assert report == LoadReport((), ())
    with_header(say_twice)(directory)
    with pytest.raises(AdapterError, match="twice"):
        load_pretrained(directory, found, strict=False)


def test_every_field_of_peft_is_known_by_name():
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == config_json.KNOWN
    assert len(config_json.KNOWN) == 42
    theirs = peft.LoraConfig(target_modules=["q"]).to_dict()
    for name, default in peft_fields.DEFAULTS.items():
        if name != "inference_mode":
            assert theirs[name] == default, name


NOT_DEFAULT = {
    "arrow_config": {"top_k": 1},
    "corda_config": {"x": 1},
    "eva_config": {"rho": 2},
    "kasa_config": {"x": 1},
    "layer_replication": [[0, 1]],
    "loftq_config": {"bits": 4},
    "lora_ga_config": {"x": 1},
    "megatron_config": {"x": 1},
    "monteclora_config": {"x": 1},
    "use_bdlora": {"x": 1},
    "use_qalora": True,
    "velora_config": {"x": 1},
}


# What decides how adapters start says nothing about those in a file.
STARTS = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}


def named(error: Exception) -> set[str]:
    return {line.split(":")[0].strip() for line in str(error).splitlines()[1:]}


def test_all_that_is_not_supported_is_named_in_one_message(saved):
    directory, _, _ = saved
    with_config(**NOT_DEFAULT)(directory)
    with pytest.raises(AdapterError) as caught:
        load_config(directory)
    assert named(caught.value) == NOT_DEFAULT.keys() - STARTS
    with pytest.raises(ConfigError, match="target_module: .* target_modules") as caught:
        LoraConfig(**NOT_DEFAULT, target_module=["q"], r=0)
    assert named(caught.value) == {*NOT_DEFAULT, "target_module", "r"}


def test_every_field_may_be_given_at_its_default():
    theirs = peft.LoraConfig(r=4, target_modules=["q"]).to_dict()
    assert LoraConfig(**theirs) == LoraConfig(r=4, target_modules=["q"])
    assert dataclasses.replace(LoraConfig(r=4), lora_alpha=2) == LoraConfig(r=4, lora_alpha=2)


def test_a_file_keeps_how_its_adapters_started(saved):
    directory, _, _ = saved
    with_config(eva_config={"rho": 2.0}, loftq_config={"bits": 4})(directory)
    assert load_adapter_file(directory).other["eva_config"] == {"rho": 2.0}


def test_newer_fields_are_kept_with_a_warning_and_come_back(saved):
    directory, _, _ = saved
    fields = dict(from_the_future={"b": 1, "a": [None]}, revision="v2", peft_version="9.0")
    with_config(**fields, qalora_group_size=8)(directory)
    with pytest.warns(UserWarning, match=re.escape("ignored: from_the_future")):
        file = load_adapter_file(directory)
    assert (file.peft_version, file.base_model) == ("9.0", "some/base")
    content = config_json.encode(file)
    written = json.loads(content)
    assert {name: written[name] for name in fields} == fields
    assert written["qalora_group_size"] == 8
    with pytest.warns(UserWarning):
        assert config_json.encode(config_json.decode(content)) == content


def test_a_configuration_comes_back_byte_for_byte():
    config = LoraConfig(r=3, target_modules=["v", "q"], rank_pattern={"z": 1, "a": 2}, bias="all")
    content = config_json.encode(
        AdapterFile(config, "base", "CAUSAL_LM", "0.13.0", {"revision": "x"})
    )
    assert config_json.encode(config_json.decode(content)) == content
