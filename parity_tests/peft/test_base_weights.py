"""Base weights that PEFT writes into adapter files: compared, taken, never ignored."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch import nn

from lora_jax import (
    Full,
    LoraConfig,
    load_config,
    load_pretrained,
    lora,
    merge,
    open_adapter,
    plan,
    with_base_weights,
    write_adapter,
)
from lora_jax.cli.main import main
from lora_jax.core.errors import AdapterError
from lora_jax.peft.base_weights import base_weights
from lora_jax.torch.from_torch import from_torch

WEIGHTS = "adapter_model.safetensors"
IDS = np.arange(6).reshape(2, 3)
PREFIX = "base_model.model."
# PEFT says what it saves and what it resizes.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:Setting")


class Model(nn.Module):
    """What PEFT asks of a model of transformers to find its vocabulary."""

    def __init__(self, tied=False, size=11):
        super().__init__()
        self.embed_tokens = nn.Embedding(size, 8)
        self.up = nn.Linear(8, 8, bias=False)
        self.lm_head = nn.Linear(8, size, bias=False)
        rng = np.random.default_rng(0)
        for module in (self.up, self.embed_tokens, self.lm_head):
            rows = rng.normal(size=(20, 8)).astype(np.float32)[: len(module.weight)]
            module.weight.data = torch.from_numpy(rows)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.lm_head(torch.tanh(self.up(self.embed_tokens(ids))))


def pefts(directory, model, *, moved=False, save=True, **fields):
    """Save a random adapter of this model, its base changed before if ``moved``; return PEFT's."""
    torch.manual_seed(1)
    if moved:
        with torch.no_grad():
            for value in {model.embed_tokens.weight, model.lm_head.weight}:
                value += torch.randn_like(value)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **fields))
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = torch.randn_like(value)
    model.save_pretrained(directory, save_embedding_layers=save)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).numpy()


def ours(fn, params, adapters):
    return np.asarray(lora(fn)(params, adapters, jnp.asarray(IDS)))


def planned(directory, model):
    fn, params = from_torch(model)
    return fn, params, plan(fn, params, load_config(directory), jnp.asarray(IDS))


TARGETS = (["lm_head", "up"], ["embed_tokens"], ["embed_tokens", "lm_head", "up"])


@pytest.mark.parametrize("targets", TARGETS)
def test_weights_that_are_the_models_own_say_nothing_new(targets, tmp_path):
    theirs = pefts(tmp_path, Model(), save="auto", target_modules=targets)
    assert any("base_layer" in key for key in load_file(tmp_path / WEIGHTS))
    fn, params, found = planned(tmp_path, Model())
    adapters = load_pretrained(tmp_path, found)
    assert adapters.keys() == {f"{name}.weight" for name in targets}
    np.testing.assert_allclose(ours(fn, params, adapters), logits(theirs), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("targets", TARGETS)
def test_weights_of_another_base_must_be_put_in_first(targets, tmp_path):
    theirs = pefts(tmp_path, Model(), moved=True, target_modules=targets)
    fn, params, found = planned(tmp_path, Model())
    with pytest.raises(
        AdapterError, match=r"with_base_weights\(directory, plan, params\)"
    ) as caught:
        load_pretrained(tmp_path, found)
    named = {"embed_tokens", "lm_head"} & set(targets)
    assert all(f"{name}.weight of the model" in str(caught.value) for name in named)
    # What fits is loaded in part, without the pairs of another weight.
    with pytest.warns(UserWarning, match="loaded in part"):
        fit, report = load_pretrained(tmp_path, found, strict=False)
    assert fit.keys() == {f"{name}.weight" for name in set(targets) - named}
    assert set(report.left_out) == {f"{name}.weight" for name in named}
    whole = with_base_weights(tmp_path, found, params)
    again = plan(fn, whole, found.config, jnp.asarray(IDS))
    adapters = load_pretrained(tmp_path, again)
    loaded = peft.PeftModel.from_pretrained(Model(), tmp_path).eval()
    np.testing.assert_allclose(ours(fn, whole, adapters), logits(loaded), rtol=2e-5, atol=1e-5)
    if "embed_tokens" in targets and "lm_head" in targets:
        np.testing.assert_array_equal(logits(loaded), logits(theirs))
    np.testing.assert_array_equal(params["lm_head.weight"], Model().lm_head.weight.detach())


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_is_no_target_becomes_entries_in_full(tied, tmp_path):
    theirs = pefts(tmp_path, Model(tied), moved=True, target_modules=["up"])
    fn, params, found = planned(tmp_path, Model(tied))
    with pytest.warns(UserWarning, match="carries base weights .* embed_tokens.weight"):
        adapters = load_pretrained(tmp_path, found)
    full = {name for name, one in adapters.items() if isinstance(one, Full)}
    assert full == {"embed_tokens.weight"} | ({"lm_head.weight"} if not tied else set())
    np.testing.assert_allclose(ours(fn, params, adapters), logits(theirs), rtol=2e-5, atol=1e-5)
    merged = fn(merge(params, adapters), jnp.asarray(IDS))
    np.testing.assert_allclose(merged, logits(theirs), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [["up"], ["up", "lm_head", "embed_tokens"]])
def test_a_resized_vocabulary_is_said_and_taken(targets, tmp_path):
    theirs = pefts(tmp_path, Model(size=13), moved=True, target_modules=targets)

    def fn(params, ids):  # a function of JAX's knows no size of its own
        hidden = jnp.tanh(params["embed_tokens.weight"][ids] @ params["up.weight"].T)
        return hidden @ params["lm_head.weight"].T

    _, params, _ = planned(tmp_path, Model())
    found = plan(fn, params, load_config(tmp_path), jnp.asarray(IDS))
    with pytest.raises(AdapterError, match=r"got \(13, 8\), the model has \(11, 8\)"):
        load_pretrained(tmp_path, found)
    whole = with_base_weights(tmp_path, found, params)
    assert whole["embed_tokens.weight"].shape == whole["lm_head.weight"].shape == (13, 8)
    again = plan(fn, whole, found.config, jnp.asarray(IDS))
    adapters = load_pretrained(tmp_path, again)
    np.testing.assert_allclose(ours(fn, whole, adapters), logits(theirs), rtol=2e-5, atol=1e-5)


def test_a_flax_kernel_is_compared_and_put_in_the_other_way_round(tmp_path):
    theirs = pefts(tmp_path, Model(size=13), target_modules=["up", "lm_head"])

    def fn(params, ids):
        x = params["embed_tokens"]["embedding"][ids]
        return jnp.tanh(x @ params["up"]["kernel"]) @ params["lm_head"]["kernel"]

    stored = {name: jnp.asarray(v.detach().numpy()) for name, v in Model().named_parameters()}
    small = {
        "embed_tokens": {"embedding": stored["embed_tokens.weight"]},
        "up": {"kernel": stored["up.weight"].T},
        "lm_head": {"kernel": stored["lm_head.weight"].T},
    }
    found = plan(fn, small, load_config(tmp_path), jnp.asarray(IDS))
    whole = with_base_weights(tmp_path, found, small)
    assert whole["lm_head"]["kernel"].shape == (8, 13)
    again = plan(fn, whole, found.config, jnp.asarray(IDS))
    adapters = load_pretrained(tmp_path, again)
    np.testing.assert_allclose(ours(fn, whole, adapters), logits(theirs), rtol=2e-5, atol=1e-5)


def test_a_plan_of_shapes_or_of_arrays_that_are_gone_cannot_compare(tmp_path):
    pefts(tmp_path, Model(), target_modules=["lm_head"])
    fn, params, found = planned(tmp_path, Model())
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), params)
    abstract = plan(fn, shapes, found.config, jnp.asarray(IDS))
    elsewhere = pickle.loads(pickle.dumps(found.given))
    assert elsewhere.get("lm_head.weight") is None and found.given.get("lm_head.weight") is not None
    with pytest.raises(AdapterError, match="cannot be compared: the plan was made from shapes"):
        load_pretrained(tmp_path, abstract)
    del params
    del fn
    with pytest.raises(AdapterError, match="its parameters are gone"):
        load_pretrained(tmp_path, found)


def test_a_weight_that_the_model_holds_in_another_precision_is_its_own(tmp_path):
    pefts(tmp_path, Model().bfloat16(), target_modules=["lm_head"])
    fn, params, found = planned(tmp_path, Model())
    assert load_pretrained(tmp_path, found).keys() == {"lm_head.weight"}
    stored = load_file(tmp_path / WEIGHTS)
    key = f"{PREFIX}lm_head.base_layer.weight"
    stored[key] = np.array(stored[key])
    stored[key][3, 4] += 1
    save_file(stored, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="other values than lm_head.weight"):
        load_pretrained(tmp_path, found)


def test_a_head_that_the_model_has_not_must_be_its_embedding(tmp_path):
    pefts(tmp_path, Model(tied=True), moved=True, target_modules=["up"])
    _, _, found = planned(tmp_path, Model(tied=True))
    stored = load_file(tmp_path / WEIGHTS)
    save_file(
        stored | {f"{PREFIX}lm_head.weight": stored[f"{PREFIX}lm_head.weight"] + 1},
        tmp_path / WEIGHTS,
    )
    with pytest.raises(AdapterError, match="lm_head.weight: unexpected: base weights"):
        load_pretrained(tmp_path, found)


def test_weights_of_other_modules_are_still_refused(tmp_path):
    pefts(tmp_path, Model(), save=False, target_modules=["up"])
    _, _, found = planned(tmp_path, Model())
    stored = load_file(tmp_path / WEIGHTS)
    save_file(stored | {f"{PREFIX}up.base_layer.weight": np.ones((8, 8), "f4")}, tmp_path / WEIGHTS)
    for read in (lambda: load_pretrained(tmp_path, found), lambda: open_adapter(tmp_path)):
        with pytest.raises(AdapterError, match="up.base_layer.weight: .*base weights inside"):
            read()


def test_what_is_opened_has_them_and_they_are_written_again(tmp_path, capsys):
    pefts(tmp_path / "a", Model(), moved=True, target_modules=["up", "lm_head"])
    file, adapters = open_adapter(tmp_path / "a")
    assert isinstance(adapters["lm_head.weight"], Full) and "lm_head" in adapters
    write_adapter(tmp_path / "b", file, adapters)
    one, other = (load_file(tmp_path / d / WEIGHTS) for d in "ab")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
    # A combination keeps those that all have, and refuses those of different models.
    argv = ["combine", str(tmp_path / "ab"), str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([*argv, "--type", "cat"]) == 0
    combined = load_file(tmp_path / "ab" / WEIGHTS)
    key = f"{PREFIX}lm_head.base_layer.weight"
    np.testing.assert_array_equal(combined[key], one[key])
    save_file(other | {key: other[key] + 1}, tmp_path / "b" / WEIGHTS)
    argv[1] = str(tmp_path / "no")
    assert main([*argv, "--type", "cat"]) == 2
    assert "lm_head.weight: the adapters carry different base weights" in capsys.readouterr().err


def llama(**fields):
    config = dict(vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=1)
    config |= dict(num_attention_heads=2) | fields
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def stored_model(directory, model):
    """Write a model, and the adapter that PEFT makes of it and saves by its own choice."""
    model.save_pretrained(directory)
    return transformers.LlamaForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    ("tied", "fields"),
    [
        (False, dict(target_modules=["lm_head", "q_proj", "embed_tokens"])),
        (True, dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
        (
            True,
            dict(
                target_modules=["q_proj"],
                modules_to_save=["embed_tokens"],
                ensure_weight_tying=True,
            ),
        ),
    ],
)
def test_the_merge_command_gives_pefts_logits(tied, fields, tmp_path, capsys):
    model = stored_model(tmp_path / "model", llama(tie_word_embeddings=tied))
    if not tied:
        with torch.no_grad():
            model.lm_head.weight += 1.0  # a base that is not the stored one
    torch.manual_seed(1)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **fields)).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.copy_(0.3 * torch.randn_like(value))
    # The head's copy: PEFT trains one tensor for both.
    theirs.save_pretrained(tmp_path / "adapter")
    argv = ["merge", *(str(tmp_path / name) for name in ("model", "adapter", "out"))]
    assert main(argv) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    if not tied:
        assert "lm_head.weight: replaced in full" in out
    served = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
        assert (model(ids).logits - theirs(ids).logits).abs().max() < 1e-5  # the same object


def test_the_merge_command_says_that_a_vocabulary_was_resized(tmp_path, capsys):
    model = stored_model(tmp_path / "model", llama())
    model.resize_token_embeddings(27, mean_resizing=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    argv = ["merge", *(str(tmp_path / name) for name in ("model", "adapter", "out"))]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("the vocabulary was resized, resize the model's first") == 2
    assert not (tmp_path / "out").exists()


def test_own_configurations_do_not_change():
    assert LoraConfig(target_modules=["q"]).on_unmatched == "error"


@pytest.mark.parametrize(("bias", "base"), [("none", True), ("all", False), ("lora_only", False)])
def test_a_bias_of_the_head_is_the_bases_unless_biases_are_trained(bias, base):
    adapters = {name: Full(jnp.ones(3)) for name in ("lm_head.weight", "lm_head.bias", "up.bias")}
    found = base_weights(LoraConfig(bias=bias, target_modules=["up"]), adapters)
    assert found.keys() == {"lm_head.weight", *(["lm_head.bias"] if base else [])}


def test_base_weights_in_a_subfolder_are_put_in(tmp_path):
    pefts(tmp_path / "in/here", Model(), moved=True, target_modules=["lm_head"])
    fn, params, found = planned(tmp_path / "in/here", Model())
    for where, inner in ((tmp_path, "in/here"), (tmp_path / "in", "here")):
        whole = with_base_weights(where, found, params, subfolder=inner)
        again = plan(fn, whole, found.config, jnp.asarray(IDS))
        assert load_pretrained(where, again, subfolder=inner).keys() == {"lm_head.weight"}
    with pytest.raises(AdapterError, match="subfolder: got '../here'"):
        with_base_weights(tmp_path, found, params, subfolder="../here")


def renamed_weights(path, rename):
    stored = load_file(path / WEIGHTS)
    save_file(
        {PREFIX + rename(key.removeprefix(PREFIX)): value for key, value in stored.items()},
        path / WEIGHTS,
    )


def test_base_weights_in_names_of_a_known_family_are_put_in(tmp_path):
    """As ``load_pretrained`` reads them: here, those of a language model inside a LLaVA."""
    pefts(tmp_path, Model(), moved=True, target_modules=["lm_head", "up"])
    fn, params, found = planned(tmp_path, Model())
    wanted = with_base_weights(tmp_path, found, params)
    renamed_weights(tmp_path, "language_model.model.{}".format)
    prefix = "model.language_model."

    def outer(params, ids):
        return fn({name.removeprefix(prefix): value for name, value in params.items()}, ids)

    inside = {f"{prefix}{name}": value for name, value in params.items()}
    config = dataclasses.replace(found.config, target_modules=["up"])
    there = plan(outer, inside, config, jnp.asarray(IDS))
    with pytest.warns(UserWarning, match="language_model.model as model.language_model"):
        whole = with_base_weights(tmp_path, there, inside)
    for name, value in wanted.items():
        np.testing.assert_array_equal(whole[f"{prefix}{name}"], value)


def test_base_weights_without_a_place_say_which_places_there_are(tmp_path):
    pefts(tmp_path, Model(), moved=True, target_modules=["lm_head"])
    _, params, found = planned(tmp_path, Model())
    renamed_weights(tmp_path, lambda name: name.replace("lm_head", "elsewhere.lm_head"))
    with pytest.raises(AdapterError, match="no such module, .* are embed_tokens, lm_head; give"):
        with_base_weights(tmp_path, found, params)
