"""``docs/benchmarks.md`` says only what runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jax
import pytest

from benchmarks.__main__ import main

GUIDE = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_commands_run_in_order_and_write_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks("sh"):
        words = shlex.split(block)
        assert words[:3] == ["python", "-m", "benchmarks"]
        main(words[3:])
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"before.json", "after.json", "page", "RESULTS.md", "step.json"}
    said = (tmp_path / "RESULTS.md").read_text("utf-8")
    assert "What lora_jax does in a step" in said and "| product |" in said


def test_the_case_runs_and_prints_what_stands_below(capsys):
    # users run with JAX's default promotion
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks("python"):
            exec(compile(block, "benchmarks.md", "exec"), {})
    assert capsys.readouterr().out == "".join(blocks("text"))
