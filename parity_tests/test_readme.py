"""The README says only what runs."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    # users run with JAX's default promotion
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), space)
    (table,) = blocks("text")
    assert capsys.readouterr().out.strip() == table.strip()


def test_running_code_stands_within_the_first_20_lines():
    head = README.splitlines()[:20]
    assert "```python" in head and "```" in head[head.index("```python") + 1 :]


def test_the_two_commands_are_there_in_that_form():
    commands = "\n".join(blocks("sh"))
    assert 'pip install ".[demo]" && lora-jax finetune' in commands
    assert 'pip install ".[test]" && pytest' in commands


@pytest.mark.parametrize("line", [ln for b in blocks("sh") for ln in b.splitlines()])
def test_every_option_of_a_command_exists(line, capsys):
    from lora_jax.cli import main

    if not (words := re.findall(r"lora-jax (\w+)", line)):
        return
    assert main([words[0], "--help"]) == 0
    help_text = capsys.readouterr().out
    for option in re.findall(r"--[\w-]+", line):
        assert option in help_text


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists()
