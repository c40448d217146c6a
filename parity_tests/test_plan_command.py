"""``lora-jax plan``: what LoRA does to a model directory, whichever library wrote it."""

from __future__ import annotations

import pytest
import transformers

from lora_jax.cli import main
from parity_tests.test_bert import save_tiny


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
