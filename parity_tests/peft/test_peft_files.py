"""PEFT's adapter directory: bytes, strictness, and the same logits on the other side."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import (
    Adapter,
    Full,
    LoraConfig,
    load_config,
    load_pretrained,
    lora,
    merge,
    plan,
    save_pretrained,
)
from lora_jax.core.errors import AdapterError, OutputError
from lora_jax.models import BertConfig, BertForSequenceClassification, load_params
from parity_tests.models.test_bert import tiny_config, torch_model
from parity_tests.parity.oracle import rel_l2

IDS = np.random.default_rng(0).integers(0, 61, (3, 7), dtype=np.int32)
MASK = (np.arange(7) < np.array([[7], [4], [5]])).astype(np.int32)
UNIT = 2.0**-24


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny BERT with a head: the PyTorch model, its fp64 copy, and our function of params."""
    directory = tmp_path_factory.mktemp("bert")
    model, oracle = torch_model(transformers.BertForSequenceClassification, tiny_config())
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    params = load_params(directory)
    module = BertForSequenceClassification(BertConfig.from_file(directory / "config.json"), 2)

    def fn(params, ids, mask):
        return module.apply({"params": params}, ids, mask)

    return model, oracle, fn, params


def config_of(**fields):
    return LoraConfig(
        **dict(
            r=6, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
        )
        | fields
    )


def random_adapters(found, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 3, leaf.dtype), found.abstract()
    )


def peft_logits(model, directory):
    import copy

    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), directory).eval()
    with torch.no_grad():
        ids, mask = torch.from_numpy(IDS).long(), torch.from_numpy(MASK)
        return wrapped(ids, attention_mask=mask).logits.numpy(), wrapped


CONFIGS = {
    "query and value": {},
    "regex": dict(target_modules=r".*\.layer\.1\..*(query|dense)"),
    "all-linear": dict(target_modules="all-linear"),
    "rslora": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"query": 3}, alpha_pattern={"layer.1.attention.self.value": 5}),
    "bias of adapted modules": dict(bias="lora_only"),
    "all biases": dict(bias="all"),
    "excluded": dict(exclude_modules=["layer.0.attention.self.query"]),
    "gaussian": dict(init_lora_weights="gaussian"),
    "no head": dict(modules_to_save=None),
    "dropout": dict(lora_dropout=0.25),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_our_file_and_gives_our_logits(name, pair, tmp_path, recwarn):
    model, oracle, fn, params = pair
    found = plan(fn, params, config_of(**CONFIGS[name]), IDS, MASK)
    adapters = random_adapters(found)
    # PEFT itself wants a saved head for this task type
    task = "SEQ_CLS" if found.config.modules_to_save else None
    save_pretrained(tmp_path / "ours", found, adapters, task_type=task)
    ours = np.asarray(jax.jit(lora(fn))(params, adapters, IDS, MASK))
    theirs, wrapped = peft_logits(model, tmp_path / "ours")
    truth, _ = peft_logits(oracle, tmp_path / "ours")
    assert truth.dtype == np.float64
    base = fn(params, IDS, MASK)
    assert rel_l2(np.asarray(base), truth) > 1e-2, "vacuous: the adapters change nothing"
    assert rel_l2(ours, truth) <= 2 * rel_l2(theirs, truth) + 8 * UNIT
    named = {key for key, p in wrapped.state_dict().items() if "lora_" in key}
    assert len(named) == 2 * len(found.adapted)
    assert not [w for w in recwarn if "missing" in str(w.message).lower()]


@pytest.mark.parametrize("name", ["query and value", "all biases", "patterns", "all-linear"])
def test_we_load_pefts_file_and_save_the_same_tensors(name, pair, tmp_path):
    model, oracle, fn, params = pair
    config = config_of(**CONFIGS[name])
    fields = {
        k: getattr(config, k) for k in ("r", "lora_alpha", "bias", "rank_pattern", "alpha_pattern")
    }
    names = config.target_modules
    fields |= dict(target_modules=names if isinstance(names, str) else list(names))
    import copy

    wrapped = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(
            **fields, modules_to_save=["classifier"], task_type="SEQ_CLS", init_lora_weights=False
        ),
    )
    wrapped.save_pretrained(tmp_path / "theirs")
    truth, _ = peft_logits(oracle, tmp_path / "theirs")
    theirs, _ = peft_logits(model, tmp_path / "theirs")
    found = plan(fn, params, load_config(tmp_path / "theirs"), IDS, MASK)
    adapters = load_pretrained(tmp_path / "theirs", found)
    ours = np.asarray(jax.jit(lora(fn))(params, adapters, IDS, MASK))
    assert rel_l2(ours, truth) <= 2 * rel_l2(theirs, truth) + 8 * UNIT
    save_pretrained(tmp_path / "ours", found, adapters, task_type="SEQ_CLS")
    one, two = (
        safetensors.numpy.load_file(tmp_path / d / "adapter_model.safetensors")
        for d in ("ours", "theirs")
    )
    twice = {key for key in two if ".modules_to_save." in key or ".original_module." in key}
    assert one.keys() == two.keys() - twice and bool(twice) == (config.bias == "all")
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])


def test_equal_inputs_give_equal_bytes_and_round_trip(pair, tmp_path):
    _, _, fn, params = pair
    found = plan(fn, params, config_of(bias="all"), IDS, MASK)
    adapters = random_adapters(found)
    reordered = dict(reversed(adapters.items()))
    save_pretrained(tmp_path / "one", found, adapters, base_model="x", task_type="SEQ_CLS")
    save_pretrained(tmp_path / "two", found, reordered, base_model="x", task_type="SEQ_CLS")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    loaded = load_pretrained(tmp_path / "one", found)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    assert load_config(tmp_path / "one") == found.config
    mode = (tmp_path / "one" / "adapter_config.json").stat().st_mode & 0o777
    assert mode == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# axes of the adapted weight, its shape, the names in the file
LAYOUTS = {
    "kernel": ("td,df->tf", (7, 5), "w"),
    "torch weight": ("td,fd->tf", (5, 7), "w"),
    "heads out": ("td,dhk->thk", (7, 3, 2), "w"),
    "heads in": ("td,hdk->thk", (3, 7, 2), "w"),
    "experts": ("td,edf->etf", (3, 7, 5), "experts.{}.up"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_layout_round_trips_as_plain_matrices(name, dtype, tmp_path):
    equation, shape, file_name = LAYOUTS[name]
    if name == "experts":
        equation, x = "etd,edf->etf", jnp.ones((3, 4, 7))
    else:
        x = jnp.ones((4, 7))
    fn = lambda p, x: jnp.einsum(equation, x, p["w"])  # noqa: E731
    params = {"w": jnp.zeros(shape)}
    found = plan(fn, params, LoraConfig(r=2, target_modules=["w"]), x)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), found.abstract()
    )
    names = lambda path: file_name  # noqa: E731
    save_pretrained(tmp_path / "a", found, adapters, names=names)
    loaded = load_pretrained(tmp_path / "a", found, names=names)
    assert loaded["w"].a.dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    with safetensors.safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        one = file_name.format(0)
        a = file.get_tensor(f"base_model.model.{one}.lora_A.weight").float().numpy()
        b = file.get_tensor(f"base_model.model.{one}.lora_B.weight").float().numpy()
    (leaf,) = found.adapted
    delta = np.asarray(merge(params, adapters)["w"], np.float64)
    order = [n for letter in "soi" for n, axis in enumerate(leaf.axes) if axis == letter]
    matrix = delta.transpose(order)[0] if "s" in leaf.axes else delta.transpose(order)
    wanted = matrix.reshape(b.shape[0], a.shape[1]) / leaf.scale
    np.testing.assert_allclose(b @ a, wanted, atol=1e-5)


def test_a_stacked_weight_without_a_place_for_its_index_is_an_error(tmp_path):
    params = {"w": jnp.ones((3, 7, 5))}
    fn = lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"])  # noqa: E731
    found = plan(fn, params, LoraConfig(target_modules=["w"]), jnp.ones((3, 4, 7)))
    with pytest.raises(AdapterError, match="stacked"):
        save_pretrained(tmp_path / "a", found, random_adapters(found))


SMALL = {"w": np.ones((7, 5), np.float32), "v": np.ones((5, 4), np.float32)}


def small_plan(**fields):
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    config = LoraConfig(**dict(r=2, target_modules=["w", "v"]) | fields)
    return plan(fn, SMALL, config, jnp.ones((3, 7)))


@pytest.fixture
def saved(tmp_path):
    found = small_plan()
    save_pretrained(tmp_path / "a", found, random_adapters(found))
    return tmp_path / "a", found


def rewrite_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def rewrite_config(directory, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


W_A = "base_model.model.w.lora_A.weight"
V_B = "base_model.model.v.lora_B.weight"


def break_tensors(tensors):
    del tensors[V_B]
    tensors[W_A] = np.ones((2, 6), np.float32)
    tensors["base_model.model.w.base_layer.weight"] = np.ones((5, 7), np.float32)


BROKEN = {
    "missing, unexpected and misshapen": (
        lambda d: rewrite_tensors(d, break_tensors),
        [f"{V_B}: missing", f"{W_A}: got (2, 6), wanted (2, 7)", "base_layer.weight: unexpected"],
    ),
    "not finite": (
        lambda d: rewrite_tensors(d, lambda t: t[W_A].__setitem__((0, 0), np.nan)),
        [W_A, "NaN"],
    ),
    "integers": (
        lambda d: rewrite_tensors(d, lambda t: t.update({W_A: np.ones((2, 7), np.int32)})),
        [W_A, "int32"],
    ),
    "truncated": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(
            (d / "adapter_model.safetensors").read_bytes()[:-9]
        ),
        ["adapter_model.safetensors", "not a whole safetensors file"],
    ),
    "a header that claims terabytes": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(b"\xff" * 8 + b"{}"),
        ["not a whole safetensors file"],
    ),
    "empty": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(b""),
        ["not a whole safetensors file"],
    ),
    "only a pickle": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        ["missing", "pickle"],
    ),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), ["adapter_config.json"]),
    "config not JSON": (lambda d: (d / "adapter_config.json").write_bytes(b"{\xff"), ["not JSON"]),
    "config a list": (lambda d: (d / "adapter_config.json").write_text("[]"), ["object"]),
    "another method": (lambda d: rewrite_config(d, peft_type="IA3"), ["peft_type", "IA3"]),
    "unsupported fields": (
        lambda d: rewrite_config(d, kasa_config={"x": 1}, use_qalora=True),
        ["kasa_config", "use_qalora"],
    ),
    "a field of a wrong type": (lambda d: rewrite_config(d, r="8"), ["r: got '8'"]),
    "r = 0": (lambda d: rewrite_config(d, r=0), ["r: got 0"]),
    "another alpha": (lambda d: rewrite_config(d, lora_alpha=3), ["lora_alpha", "3"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_everything_listed(name, saved):
    directory, found = saved
    change, words = BROKEN[name]
    change(directory)
    with pytest.raises(AdapterError) as error:
        load_pretrained(directory, found)
    for word in words:
        assert word in str(error.value)


def test_config_fields_known_to_peft_at_defaults_load(tmp_path):
    peft.LoraConfig(r=4, target_modules=["w", "v"]).save_pretrained(tmp_path)
    assert load_config(tmp_path).r == 4


def test_saving_refuses_what_is_not_the_plan_or_not_finite(tmp_path):
    found = small_plan()
    adapters = random_adapters(found)
    with pytest.raises(AdapterError) as error:
        save_pretrained(tmp_path / "a", found, {"w": adapters["w"], "u": Full(jnp.ones(3))})
    assert "v: planned" in str(error.value) and "u: an adapter" in str(error.value)
    nan = Adapter(adapters["w"].a * jnp.nan, adapters["w"].b, adapters["w"].scale)
    with pytest.raises(AdapterError, match="lora_A.weight: NaN"):
        save_pretrained(tmp_path / "a", found, adapters | {"w": nan})
    assert not (tmp_path / "a").exists()


def test_an_occupied_directory_is_refused_and_never_cleared(saved):
    directory, found = saved
    (directory / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    other = random_adapters(found, seed=1)
    with pytest.raises(OutputError, match="already holds"):
        save_pretrained(directory, found, other)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    save_pretrained(directory, found, other, overwrite=True)
    assert (directory / "notes.txt").read_text() == "mine"
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(directory, found), other)


def test_a_full_disk_leaves_the_old_adapter_whole(saved, monkeypatch):
    directory, found = saved
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    real, calls = os.fsync, []

    def full_at_the_second_file(handle):
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full_at_the_second_file)
    with pytest.raises(OutputError, match="No space left"):
        save_pretrained(directory, found, random_adapters(found, seed=1), overwrite=True)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_byte_is_refused_or_loads_what_the_file_says(saved_bytes, data):
    directory, found, content = saved_bytes
    place = data.draw(st.integers(0, len(content) - 1))
    value = data.draw(st.integers(0, 255))
    path = directory / "adapter_model.safetensors"
    path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
    try:
        adapters = load_pretrained(directory, found)
    except AdapterError:
        return
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(adapters))
    assert {leaf.path for leaf in found.adapted} == adapters.keys()


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("flipped") / "a"
    found = small_plan()
    save_pretrained(directory, found, random_adapters(found))
    return directory, found, (directory / "adapter_model.safetensors").read_bytes()
