"""Weights that an embedding and a head share: what PEFT does, and what is refused or warned of."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch

from lora_jax import LoraConfig, load_config, load_pretrained, plan, save_pretrained
from lora_jax.cli.main import main
from lora_jax.core.errors import AdapterError, PlanError
from lora_jax.parity.suite.torch_models import trainable
from parity_tests.models.test_torch_front import MODELS
from parity_tests.tiers import cases

V, D = 41, 30
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, V, (2, 11)))
CONFIG = LoraConfig(r=2, target_modules=["up"])


def model(name):
    """Return a function whose head reads the weight of its embedding, and its parameters."""
    path = f"model.{name}.weight"

    def fn(params, ids):
        return jnp.tanh(params[path][ids] @ params["model.up.weight"].T) @ params[path].T

    shapes = {path: (V, D), "model.up.weight": (D, D)}
    return path, fn, {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in shapes.items()}


def planned(name, **fields):
    path, fn, params = model(name)
    found = plan(fn, params, dataclasses.replace(CONFIG, **fields), IDS)
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), found.abstract()
    )
    return path, fn, params, found, drawn


def test_a_tied_weight_is_trained_in_full_only_when_the_configuration_says_so():
    path, fn, params = model("embed_tokens")
    config = dataclasses.replace(CONFIG, modules_to_save=["embed_tokens"])
    with pytest.raises(PlanError, match=f"ensure_weight_tying=True(.|\n)*{path}: used by dot_gen"):
        plan(fn, params, config, IDS)
    found = plan(fn, params, dataclasses.replace(config, ensure_weight_tying=True), IDS)
    assert path in found.full


@pytest.mark.parametrize(
    ("name", "targets", "flag", "warned"),
    [
        ("embed_tokens", ["embed_tokens", "up"], False, "unless ensure_weight_tying=True is set"),
        ("embed_tokens", ["embed_tokens", "up"], True, None),
        ("embed_tokens", r".*\.(up|embed_tokens)", True, "leaves the head as it was$"),
        ("embed_tokens", r"(.*\.)?(up|embed_tokens)", True, None),
        ("wte", ["up", "wte"], True, "leaves the head as it was$"),
    ],
)
def test_a_file_warns_where_peft_spares_the_head(name, targets, flag, warned, tmp_path):
    fields = dict(target_modules=targets, ensure_weight_tying=flag)
    _, fn, params, found, adapters = planned(name, **fields)

    def checked(act):
        if warned is None:
            return act()
        with pytest.warns(UserWarning, match=warned):
            return act()

    checked(lambda: save_pretrained(tmp_path / "a", found, adapters))
    again = plan(fn, params, load_config(tmp_path / "a"), IDS)
    assert again.config == found.config
    read = checked(lambda: load_pretrained(tmp_path / "a", again))
    jax.tree.map(np.testing.assert_array_equal, read, adapters)


def test_rows_are_tied_either_way(tmp_path):
    for flag in (False, True):
        fields = dict(trainable_token_indices=[3, 1], ensure_weight_tying=flag)
        _, _, _, found, adapters = planned("wte", **fields)
        save_pretrained(tmp_path / str(flag), found, adapters)
        load_pretrained(tmp_path / str(flag), found)


def test_a_weight_that_peft_would_not_tie_is_not_written_in_full(tmp_path):
    fields = dict(modules_to_save=["wte"], ensure_weight_tying=True)
    _, _, _, found, adapters = planned("wte", **fields)
    with pytest.raises(AdapterError, match="copy for the embedding alone(.|\n)*model.wte"):
        save_pretrained(tmp_path / "a", found, adapters)


@pytest.mark.parametrize(
    ("fields", "copies"),
    [
        (dict(target_modules=["up", "embed_tokens"]), ("lora_A.weight", "lora_B.weight")),
        (dict(modules_to_save=["embed_tokens"]), ("weight",)),
    ],
)
def test_the_heads_copies_must_be_the_embeddings(fields, copies, tmp_path):
    _, _, _, found, adapters = planned("embed_tokens", ensure_weight_tying=True, **fields)
    save_pretrained(tmp_path / "a", found, adapters)
    file = tmp_path / "a" / "adapter_model.safetensors"
    whole = safetensors.numpy.load_file(file)
    keys = [f"base_model.model.lm_head.{copy}" for copy in copies]
    assert set(keys) == {key for key in whole if "lm_head" in key}
    for key in keys:
        safetensors.numpy.save_file(whole | {key: whole[key] + 1}, file)
        with pytest.raises(AdapterError, match=f"{key}: unexpected"):
            load_pretrained(tmp_path / "a", found)
    rest = {key: value for key, value in whole.items() if key not in keys}
    safetensors.numpy.save_file(rest, file)
    read = load_pretrained(tmp_path / "a", found)
    jax.tree.map(np.testing.assert_array_equal, read, adapters)


# trained of the embedding, ensure_weight_tying -> what becomes of the embedding and the head, as
# PEFT has it before and after merging: W, the new weight N, or with its change twice, NN.
TABLE = {
    "qwen3": {
        ("rows", False): ("N N", "N N"),
        ("rows", True): ("N N", "N N"),
        ("pair", False): ("N W", "N N"),
        ("pair", True): ("N N", "NN NN"),
        ("full", False): ("N W", "N W"),
        ("full", True): ("N N", "N N"),
    },
    "gpt2": {
        ("rows", False): ("N N", "N N"),
        ("rows", True): ("N N", "N N"),
        ("pair", True): ("N W", "N N"),
        ("full", True): ("N W", "N W"),
    },
}
CASES = [(family, *case) for family, own in TABLE.items() for case in own]
QUICK = ("qwen3-rows-False", "qwen3-pair-True", "qwen3-full-False")
EMBEDDINGS = {"qwen3": ("q_proj", "embed_tokens"), "gpt2": ("c_attn", "wte")}


@pytest.mark.filterwarnings("ignore")  # PEFT's, of what is shown here
@pytest.mark.parametrize(
    "case", cases(CASES, quick=QUICK, name=lambda case: "-".join(map(str, case)))
)
def test_what_peft_does_with_tied_weights_is_as_the_page_says(case):
    family, kind, flag = case
    given, (other, embedding) = MODELS[family], EMBEDDINGS[family]
    fields = {
        "rows": dict(trainable_token_indices=[3, 1]),
        "pair": dict(target_modules=[other, embedding]),
        "full": dict(modules_to_save=[embedding]),
    }[kind]
    config = peft.LoraConfig(
        **{"r": 3, "target_modules": [other], **fields},
        ensure_weight_tying=flag,
        fan_in_fan_out=given.conv1d,
    )
    theirs = peft.get_peft_model(given.make(), config).eval()
    with torch.no_grad():
        for name, parameter in trainable(theirs).items():
            if embedding in name:
                parameter.add_(torch.randn_like(parameter))
    old = given.make().get_input_embeddings().weight.detach()
    new = weight(theirs, kind, old)
    batch = {"input_ids": torch.from_numpy(given.batch["input_ids"])}
    with torch.no_grad():
        unmerged = theirs(**batch).logits
        merged = theirs.merge_and_unload()(**batch).logits
    known = {"W": old, "N": new, "NN": 2 * new - old}
    wanted = TABLE[family][kind, flag]
    for logits, names in zip((unmerged, merged), wanted, strict=True):
        assert names in fitting(given, batch, known, logits), (kind, flag, names)


def weight(theirs, kind, old):
    """Return the embedding's weight with what is trained in it."""
    module = theirs.get_base_model().get_input_embeddings()
    with torch.no_grad():
        if kind == "rows":
            new = old.clone()
            new[[3, 1]] = module.token_adapter.trainable_tokens_delta["default"]
            return new
        if kind == "full":
            return module.modules_to_save["default"].weight.clone()
        pair = module.lora_embedding_B["default"] @ module.lora_embedding_A["default"]
        return old + module.scaling["default"] * pair.T


def fitting(given, batch, known, logits):
    """Return which weights of the embedding and of the head give these logits."""
    found = []
    for first, embedding in known.items():
        for second, head in known.items():
            untied = given.make().eval()
            untied.get_input_embeddings().weight = torch.nn.Parameter(embedding)
            untied.get_output_embeddings().weight = torch.nn.Parameter(head)
            with torch.no_grad():
                gap = untied(**batch).logits - logits
            if gap.norm() < 1e-5 * logits.norm():
                found.append(f"{first} {second}")
    assert len(found) <= 1, "vacuous: several weights give the same"
    return found


def test_a_head_that_has_no_weight_of_its_own_is_said_to_be_tied(tmp_path, capsys):
    """Where a configuration, a file or a merge means the output head of a model that ties it."""
    path, fn, params, found, drawn = planned("embed_tokens")
    said = f"output head is tied, it shares {path}"
    warn = dataclasses.replace(CONFIG, target_modules=["up", "lm_head"], on_unmatched="warn")
    with pytest.warns(UserWarning, match=f"target_modules 'lm_head' .the {said}"):
        plan(fn, params, warn, IDS)
    for fields in (dict(target_modules=["lm_head"]), dict(modules_to_save=["lm_head"])):
        with pytest.raises(PlanError, match=f"got 'lm_head'.*{said}"):
            plan(fn, params, dataclasses.replace(CONFIG, **fields), IDS)
    directory = save_pretrained(tmp_path / "a", found, drawn)
    tensors = safetensors.numpy.load_file(directory / "adapter_model.safetensors")
    key = "base_model.model.lm_head.lora_{}.weight"
    shapes = {key.format("A"): (2, D), key.format("B"): (V, 2)}
    tensors |= {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    tied = f"unexpected, as the model's output head is tied: it shares {path}"
    with pytest.raises(AdapterError) as caught:
        load_pretrained(directory, found)
    assert [name for name in shapes if f"{name}: {tied}" not in str(caught.value)] == []
    # Merged, the model's own file says it; an adapter of another model's head is just not in it.
    config = json.loads((directory / "adapter_config.json").read_text())
    config["target_modules"] = ["up", "lm_head"]
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "model").mkdir()
    stored = {name: np.asarray(value) for name, value in params.items()}
    safetensors.numpy.save_file(stored, tmp_path / "model" / "model.safetensors")
    for tie in (True, False):
        model_config = {"architectures": ["XForCausalLM"], "tie_word_embeddings": tie}
        (tmp_path / "model" / "config.json").write_text(json.dumps(model_config))
        argv = ["merge", tmp_path / "model", directory, tmp_path / "out"]
        assert main([str(one) for one in argv]) == 2
        err = capsys.readouterr().err
        assert "lm_head.weight: not in the model" in err
        assert ("shares the embedding's weight (tie_word_embeddings)" in err) == tie
