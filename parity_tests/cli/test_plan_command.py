"""``lora-jax plan``: what LoRA does to a model directory, whichever library wrote it."""

from __future__ import annotations

import re

import pytest
import transformers

from lora_jax.cli.main import main
from parity_tests.models.test_bert import save_tiny
from parity_tests.models.tiny import edit_json


def test_a_bert_directory_is_planned_in_flax(tmp_path, capsys):
    save_tiny(tmp_path)
    assert main(["plan", str(tmp_path), "--target-modules", "query", "value", "--r", "3"]) == 0
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if " adapted " in line]
    assert len(rows) == 4 and all("query.kernel" in r or "value.kernel" in r for r in rows)
    assert "not targeted" in table and "not a matrix" in table
    assert f"trainable {4 * 3 * (20 + 20):,} of" in table


def test_any_other_transformers_model_is_planned_through_pytorch(tmp_path, capsys):
    config = transformers.LlamaConfig(
        vocab_size=23,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path)]) == 0
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    adapted = [path for path, line in table.items() if " adapted " in line]
    assert len(adapted) == 7 and all("_proj.weight" in path for path in adapted)
    assert "output head" in table["lm_head.weight"]
    assert "an embedding" in table["model.embed_tokens.weight"]


def test_what_matches_nothing_is_said(tmp_path, capsys):
    save_tiny(tmp_path)
    assert main(["plan", str(tmp_path), "--target-modules", "quary"]) == 2
    said = capsys.readouterr().err
    assert "quary" in said and "query" in said


@pytest.mark.parametrize("argv", [[], ["plan"], ["plan", "no-such-model"]])
def test_bad_usage_is_one_message(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err


def tiny(directory, kind, config, **fields):
    """Save a random model of this kind, and then other fields in its configuration."""
    getattr(transformers, kind)(getattr(transformers, config)(**fields)).save_pretrained(directory)


LLAMA = dict(
    vocab_size=23,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=3,
    num_key_value_heads=1,
)
BART = dict(vocab_size=23, d_model=12, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8)
BART |= dict(decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2)
OTHER_FAMILIES = {
    "num_hidden_layers": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "decoder_layers": ("BartModel", "BartConfig", BART),
    "n_layer": ("GPT2Model", "GPT2Config", dict(vocab_size=23, n_embd=8, n_layer=1, n_head=2)),
    "num_local_experts": (
        "MixtralForCausalLM",
        "MixtralConfig",
        LLAMA | dict(num_local_experts=2, num_experts_per_tok=1),
    ),
}


def test_more_layers_than_the_file_has_are_not_built_in_any_family(tmp_path, capsys, monkeypatch):
    def built(*args, **more):
        raise AssertionError("the model was built")

    monkeypatch.setattr("lora_jax.models.planning._parameters", built)
    for field, (kind, config, fields) in OTHER_FAMILIES.items():
        directory = tmp_path / kind
        tiny(directory, kind, config, **fields)
        edit_json(directory / "config.json", **{field: 5000})
        assert main(["plan", str(directory)]) == 2
        assert f"{field}: got 5,000, the file has " in capsys.readouterr().err
        inside = {"text_config": {field: [1, 70_000]}, field: 1}
        edit_json(directory / "config.json", **inside)
        assert main(["plan", str(directory)]) == 2
        assert f"text_config.{field}: got 70,000, the file has " in capsys.readouterr().err


def test_a_model_far_larger_than_its_file_is_not_allocated(tmp_path, capsys, monkeypatch):
    for kind, config, fields in OTHER_FAMILIES.values():
        tiny(tmp_path / kind, kind, config, **fields)
        main(["plan", str(tmp_path / kind)])
        assert "does not fit the weights" not in capsys.readouterr().err

    def allocated(*args, **more):
        raise AssertionError("the model was allocated")

    for kind, *_ in OTHER_FAMILIES.values():
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", allocated)
        edit_json(tmp_path / kind / "config.json", vocab_size=10**10)
        assert main(["plan", str(tmp_path / kind)]) == 2
        said = capsys.readouterr().err
        assert re.search(r"describes a model of \d{2,3}(,\d{3}){3} parameters, the file has", said)
