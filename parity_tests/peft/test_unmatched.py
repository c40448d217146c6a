"""Names of a configuration that mean nothing in this model, and heads that a task type means."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from lora_jax import (
    Full,
    LoraConfig,
    load_config,
    load_pretrained,
    lora,
    open_adapter,
    plan,
    save_pretrained,
)
from lora_jax.core.errors import AdapterError, ConfigError, PlanError
from lora_jax.torch.from_torch import from_torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 6, bias=False)
        self.v = nn.Linear(6, 6, bias=False)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.score = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer.v(torch.tanh(layer.q(x))))
        return self.score(x)


def pefts(directory, **fields):
    """Save PEFT's random adapter of q and v in both layers; return its model."""
    config = dict(r=2, lora_alpha=3, target_modules=["q", "v"]) | fields
    torch.manual_seed(1)
    model = peft.get_peft_model(Model(), peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.copy_(torch.randn_like(value))
    model.save_pretrained(directory)
    return model


def edited(directory, **fields):
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# A field of a configuration as the public writes it: for several families, half of it idle.
IDLE = {
    "target_modules": ({"target_modules": ["q", "v", "query", "c_attn"]}, ["'query'", "'c_attn'"]),
    "exclude_modules": ({"exclude_modules": ["lm_head", "vision"]}, ["'lm_head'", "'vision'"]),
    "rank_pattern": ({"rank_pattern": {"gate_proj": 4}}, ["'gate_proj'"]),
    "alpha_pattern": ({"alpha_pattern": {".*mlp.*": 4}}, ["'.*mlp.*'"]),
    "layers_to_transform": ({"layers_to_transform": [0, 1, 2, 31]}, ["'2'", "'31'"]),
    "modules_to_save": ({"modules_to_save": ["lm_head", "classifier"]}, ["lm_head, classifier"]),
    "target_parameters": (
        {"target_parameters": ["experts.gate_up_proj"]},
        ["'experts.gate_up_proj'"],
    ),
}
EVERYTHING = {
    name: value
    for fields, _ in IDLE.values()
    for name, value in fields.items()
    if name != "target_parameters"
}


@pytest.mark.parametrize("field", ["everything at once", *IDLE][:5])
def test_names_of_a_file_that_mean_nothing_here_are_one_warning(field, tmp_path):
    check_idle(field, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("field", [*IDLE][4:])
def test_other_fields_of_a_file_likewise(field, tmp_path):
    check_idle(field, tmp_path)


def check_idle(field, tmp_path):
    theirs = pefts(tmp_path)
    fields, words = IDLE.get(field, (EVERYTHING, [w for _, own in IDLE.values() for w in own[:1]]))
    edited(tmp_path, **fields)
    words = [w for w in words if field == "target_parameters" or w != "'experts.gate_up_proj'"]
    fn, params = from_torch(Model())
    config = load_config(tmp_path)
    with pytest.warns(UserWarning, match="names what this model has not") as caught:
        found = plan(fn, params, config, jnp.asarray(X))
    assert len(caught) == 1
    assert [word for word in words if word not in str(caught[0].message)] == []
    adapters = load_pretrained(tmp_path, found)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(lora(fn)(params, adapters, X), wanted, rtol=1e-5, atol=1e-5)
    # The same said by the user is an error that lists all.
    own = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["q", "v"]} | fields)
    with pytest.raises(PlanError, match="match no module") as error:
        plan(fn, params, own, jnp.asarray(X))
    assert [word for word in words if word not in str(error.value)] == []
    with pytest.warns(UserWarning, match="names what this model has not"):
        plan(fn, params, replace(own, on_unmatched="warn"), jnp.asarray(X))


def test_a_file_of_which_nothing_matches_is_an_error(tmp_path):
    pefts(tmp_path)
    fn, params = from_torch(Model())
    for targets in (["query", "value"], r".*\.(query|value)"):
        edited(tmp_path, target_modules=targets)
        with pytest.raises(PlanError, match="match no module"):
            plan(fn, params, load_config(tmp_path), jnp.asarray(X))
    with pytest.raises(ConfigError, match="on_unmatched: got 'ignore'"):
        LoraConfig(on_unmatched="ignore")


def test_tensors_that_the_configuration_does_not_cover_are_an_error(tmp_path):
    pefts(tmp_path)
    edited(tmp_path, target_modules=["q", "query"])
    fn, params = from_torch(Model())
    with pytest.warns(UserWarning, match="'query'"):
        found = plan(fn, params, load_config(tmp_path), jnp.asarray(X))
    with pytest.raises(AdapterError, match="layers.0.v.lora_A.weight: unexpected"):
        load_pretrained(tmp_path, found)
    with pytest.raises(AdapterError, match="layers.0.v: has an adapter"):
        open_adapter(tmp_path)


def test_a_file_without_its_model_says_which_targets_are_idle(tmp_path):
    pefts(tmp_path)
    edited(tmp_path, target_modules=["q", "v", "query", "c_attn"])
    with pytest.warns(UserWarning, match="'query' has no adapter, .*'c_attn' has no adapter"):
        _, adapters = open_adapter(tmp_path)
    assert len(adapters) == 4


@pytest.mark.parametrize(
    ("task", "head", "others"),
    [
        ("SEQ_CLS", "score", None),
        ("TOKEN_CLS", "score", ["pooler"]),
        ("QUESTION_ANS", "qa_outputs", None),
    ],
)
def test_older_files_mean_the_head_of_their_task_type(task, head, others, tmp_path):
    theirs = pefts(tmp_path, modules_to_save=["score"])
    stored = load_file(tmp_path / WEIGHTS)
    renamed = {key.replace("score", head): value for key, value in stored.items()}
    save_file(renamed, tmp_path / WEIGHTS)
    edited(tmp_path, task_type=task, modules_to_save=others)
    fn, params = from_torch(Model())
    params = {name.replace("score", head): value for name, value in params.items()}

    def renamed_fn(params, x):
        return fn({name.replace(head, "score"): v for name, v in params.items()}, x)

    config = load_config(tmp_path)
    assert config.modules_to_save == (*(others or ()), head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = plan(renamed_fn, params, config, jnp.asarray(X))
        adapters = load_pretrained(tmp_path, found)
        assert isinstance(open_adapter(tmp_path)[1][f"{head}.weight"], Full)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(X)).numpy()
    got = lora(renamed_fn)(params, adapters, X)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    edited(tmp_path, task_type="CAUSAL_LM")
    assert load_config(tmp_path).modules_to_save == (None if others is None else tuple(others))
    with pytest.raises(AdapterError, match=f"{head}.weight: unexpected"):
        open_adapter(tmp_path)


def test_a_head_that_the_file_does_not_hold_is_not_meant(tmp_path):
    """Ours may record a task type and leave the head as it is, with all biases trained or not."""
    fn, params = from_torch(Model())
    config = LoraConfig(r=2, target_modules=["q"])
    found = plan(fn, params, config, jnp.asarray(X))
    adapters = found.init(jax.random.key(0))
    save_pretrained(tmp_path / "a", found, adapters, task_type="SEQ_CLS")
    assert load_config(tmp_path / "a").modules_to_save is None
    again = plan(fn, params, load_config(tmp_path / "a"), jnp.asarray(X))
    assert load_pretrained(tmp_path / "a", again).keys() == adapters.keys()
