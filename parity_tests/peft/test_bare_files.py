"""Adapter directories read and written without their model."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lora_jax import (
    Adapter,
    Full,
    LoraConfig,
    combine,
    open_adapter,
    plan,
    rename,
    resize,
    save_pretrained,
    write_adapter,
)
from lora_jax.core.errors import AdapterError, OutputError
from lora_jax.peft import AdapterFile, fitted
from parity_tests.adapters.test_combining import Tiny

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.arange(6).reshape(2, 3)


class Model(Tiny):
    """An embedding, two linear layers of different shapes and a head."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(10, 13)
        self.head = torch.nn.Linear(10, 3)

    def forward(self, ids):
        return self.head(self.linear(torch.tanh(self.up(self.embed(ids)))))


def peft_model(seed=0, **fields):
    torch.manual_seed(seed)
    config = dict(r=4, lora_alpha=6, target_modules=["embed", "linear", "up"])
    model = peft.get_peft_model(Model(), peft.LoraConfig(**(config | fields)))
    for value in model.parameters():
        if value.requires_grad:
            value.data = torch.randn_like(value)
    return model


def saved(directory, **fields):
    model = peft_model(**fields)
    model.save_pretrained(directory, save_embedding_layers=False)
    return model


CASES = {
    "plain": {},
    "patterns": {"rank_pattern": {"up": 3}, "alpha_pattern": {"embed": 5}},
    "rslora": {"use_rslora": True},
    "head": {"modules_to_save": ["head"]},
    "biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "all biases, and a head": {"bias": "all", "modules_to_save": ["head"]},
    "regex": {"target_modules": r"embed|linear"},
}


@pytest.mark.parametrize("case", CASES)
def test_every_pair_and_scale_is_pefts(case, tmp_path):
    model = saved(tmp_path / "adapter", **CASES[case])
    file, adapters = open_adapter(tmp_path / "adapter")
    assert file.config.r == 4
    found = 0
    for name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        found += 1
        looked_up = name == "embed"
        one = adapters[name]
        assert one.scale == layer.scaling["default"] and one.axes == ("io" if looked_up else "oi")
        a = layer.lora_embedding_A if looked_up else layer.lora_A
        b = layer.lora_embedding_B if looked_up else layer.lora_B
        for half, theirs in ((one.a, a["default"]), (one.b, b["default"])):
            value = theirs if looked_up else theirs.weight
            np.testing.assert_array_equal(half, value.detach().numpy().T)
    assert found == sum(isinstance(one, Adapter) for one in adapters.values())
    full = {name for name, one in adapters.items() if isinstance(one, Full)}
    wanted = {"head": ["head.weight", "head.bias"], "biases": ["up.bias"]}
    wanted["all biases"] = ["up.bias", "head.bias"]
    wanted["all biases, and a head"] = ["up.bias", "head.weight", "head.bias"]
    assert full == set(wanted.get(case, []))


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_peft_loads_to_the_same_numbers(case, tmp_path):
    model = saved(tmp_path / "adapter", **CASES[case])
    write_adapter(tmp_path / "again", *open_adapter(tmp_path / "adapter"))
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Model(), str(tmp_path / "again"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS), model(IDS), rtol=0, atol=0)
    ours, theirs = (load_file(tmp_path / d / WEIGHTS) for d in ("again", "adapter"))
    # PEFT says a saved module's bias again, and the base's beside it.
    assert {key for key in theirs.keys() - ours.keys() if "module" not in key} == set()
    assert ours.keys() <= theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["head"]}, {"bias": "lora_only"}])
def test_our_own_files_come_back_byte_for_byte(fields, dtype, tmp_path):
    def fn(params, ids):
        h = params["embed"]["embedding"][ids]
        h = h @ params["up"]["kernel"] + params["up"]["bias"]
        return h @ params["head"]["kernel"] + params["head"]["bias"]

    def module(*shape):
        return {"kernel": jnp.ones(shape), "bias": jnp.ones(shape[-1:])}

    params = {"embed": {"embedding": jnp.ones((9, 5))}, "up": module(5, 7), "head": module(7, 3)}
    config = LoraConfig(
        r=4, target_modules=["up", "embed"], lora_dropout=0.1, rank_pattern={"up": 2}, **fields
    )
    found = plan(fn, params, config, jnp.ones((2,), int))
    drawn = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape, dtype),
        found.init(jax.random.key(0), dtype),
    )
    save_pretrained(tmp_path / "one", found, drawn, base_model="base", task_type="SEQ_CLS")
    file, adapters = open_adapter(tmp_path / "one")
    assert (file.base_model, file.task_type, len(adapters)) == ("base", "SEQ_CLS", len(drawn))
    assert adapters["up"].dropout == 0.1 and adapters["up"].a.dtype == dtype
    write_adapter(tmp_path / "two", file, adapters)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def edit(directory, *, config=None, tensors=None):
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    stored = load_file(directory / WEIGHTS)
    if tensors is not None:
        stored = tensors(stored)
    save_file(
        {key: np.ascontiguousarray(value) for key, value in stored.items()}, directory / WEIGHTS
    )


PREFIX = "base_model.model."
UP = f"{PREFIX}up.lora_A.weight"


def put(name, change=lambda up: up):
    """Return an edit that stores a changed A of ``up`` under this name."""
    return dict(tensors=lambda stored: stored | {f"{PREFIX}{name}": change(stored[UP])})


def put_up(change):
    return put("up.lora_A.weight", change)


def targets(*names):
    return dict(config={"target_modules": names})


BROKEN = {
    "half": (dict(tensors=lambda t: {k: t[k] for k in t if k != UP}), "up.lora_A.weight: missing"),
    "rank": (put_up(lambda up: up[:2]), r"up.lora_A.weight: got \(2, 10\), wanted rank 4"),
    "config": (dict(config={"r": 8}), "linear.lora_B.weight: .* wanted rank 8 on axis 1"),
    "pattern": (dict(config={"rank_pattern": {"up": 3}}), "up.lora_A.weight: .* wanted rank 3"),
    "NaN": (put_up(lambda up: up * np.nan), "up.lora_A.weight: holds NaN"),
    "ints": (put_up(lambda up: up.astype("int8")), "up.lora_A.weight: got int8"),
    "double": (put_up(np.float64), "jax_enable_x64"),
    "vector": (put_up(lambda up: up[0]), "wanted a matrix"),
    "unexpected": (put("x.weight"), "x.weight: unexpected"),
    "prefix": (dict(tensors=lambda t: t | {"up.x": t[UP]}), "wanted a name that begins"),
    "base weights": (put("embed.base_layer.weight"), "weight: base weights inside the file"),
    "twice": (put("up.lora_embedding_A"), "another kind"),
    "fewer targets": (targets("embed", "up"), "linear: has an adapter, but"),
    "DoRA": (dict(config={"use_dora": True}), "up.lora_magnitude_vector: missing"),
    "layers": (dict(config={"layers_to_transform": [7]}), "linear: has an adapter, but"),
    "bias": (put("up.lora_B.bias", lambda up: up[0]), "lora_B.bias: unexpected"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_refused_by_name(case, tmp_path):
    saved(tmp_path)
    change, said = BROKEN[case]
    edit(tmp_path, **change)
    with pytest.raises(AdapterError, match=said):
        open_adapter(tmp_path)


def test_every_problem_is_listed_at_once(tmp_path):
    saved(tmp_path)
    edit(tmp_path, config={"r": 2})
    with pytest.raises(AdapterError) as raised:
        open_adapter(tmp_path)
    assert str(raised.value).count("wanted rank 2") == 6


def test_the_writer_refuses_what_the_file_cannot_say(tmp_path):
    good = Adapter(jnp.ones((3, 4)), jnp.ones((4, 2)), 0.5, "oi")
    file = AdapterFile(LoraConfig(r=4, lora_alpha=2, target_modules=["q", "v"]))
    tree = {
        "q": Adapter(jnp.ones((3, 4)), jnp.ones((4, 2)), 1.0, "oi"),
        "a.kernel": good,
        "v": Adapter(jnp.ones((6, 3, 4)), jnp.ones((6, 4, 2)), 0.5, "sio"),
        "d.q": Adapter(jnp.ones((3, 4)), jnp.ones((4, 2)), 0.5, "oi", magnitude=jnp.ones(2)),
        "b.v": Adapter(jnp.ones((3, 2)), jnp.ones((2, 2)), 0.5, "oi"),
    }
    with pytest.raises(AdapterError) as raised:
        write_adapter(tmp_path / "out", file, tree)
    for said in (
        "q: scale got 1.0",
        "a.kernel: a parameter's path",
        "v: got axes 'sio'",
        "b.v: rank",
        "d.q: got DoRA's magnitude",
    ):
        assert said in str(raised.value)
    with pytest.raises(AdapterError, match="NaN"):
        write_adapter(
            tmp_path / "out", file, {n: Adapter(good.a * jnp.nan, good.b, 0.5, "oi") for n in "qv"}
        )
    assert not (tmp_path / "out").exists()
    write_adapter(tmp_path / "out", file, {"q": good, "v": good})
    with pytest.raises(OutputError, match="already holds files"):
        write_adapter(tmp_path / "out", file, {"q": good, "v": good})


def test_a_kernel_is_not_written_as_an_embedding(tmp_path):
    kernel = Adapter(jnp.ones((3, 4)), jnp.ones((4, 2)), 0.5, "io")
    file = AdapterFile(LoraConfig(r=4, lora_alpha=2, target_modules=["0.q"]))
    with pytest.raises(AdapterError, match="0.q: got axes 'io', those of an embedding"):
        write_adapter(tmp_path / "out", file, {"0.q": kernel})
    write_adapter(tmp_path / "out", file, {"0.q": kernel}, embeddings=["0.q"])
    assert "base_model.model.0.q.lora_embedding_A" in load_file(tmp_path / "out" / WEIGHTS)
    named = AdapterFile(LoraConfig(r=4, lora_alpha=2, target_modules="all-linear"))
    names = ("a.embed_tokens", "bert.embeddings.word_embeddings", "transformer.wte", "shared")
    write_adapter(tmp_path / "named", named, dict.fromkeys(names, kernel))
    assert open_adapter(tmp_path / "named")[1].keys() == set(names)


def test_a_changed_adapter_is_written_with_a_configuration_of_its_own(tmp_path):
    """Combine and resize without a model; PEFT then computes what was meant."""
    models = [saved(tmp_path / str(n), seed=n, rank_pattern={"up": 3}) for n in range(2)]
    opened = [open_adapter(tmp_path / str(n)) for n in range(2)]
    mixed = combine([adapters for _, adapters in opened], [0.7, -0.3], "cat")
    mixed, _ = resize(mixed, {"linear": 9})
    file = fitted(opened[0][0], mixed)
    assert {file.config.r, *file.config.rank_pattern.values()} == {6, 8, 9}
    write_adapter(tmp_path / "mixed", file, mixed)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Model(), str(tmp_path / "mixed"))
    for name in ("embed", "linear", "up"):
        got = loaded.base_model.model.get_submodule(name).get_delta_weight("default")
        parts = [m.base_model.model.get_submodule(name).get_delta_weight("default") for m in models]
        torch.testing.assert_close(got, 0.7 * parts[0] - 0.3 * parts[1], rtol=1e-5, atol=1e-5)


def test_targets_are_named_in_full_where_the_old_ones_do_not_fit():
    pair = Adapter(jnp.ones((3, 4)), jnp.ones((4, 2)), scale=0.5, axes="oi")
    file = AdapterFile(LoraConfig(r=4, lora_alpha=2, target_modules=["q", "v"]))
    assert fitted(file, {"0.q": pair, "0.v": pair}).config == file.config
    config = fitted(file, rename({"0.q": pair, "0.v": pair}, {"0.v": "0.k"})).config
    assert config.target_modules == ("0.k", "0.q")
