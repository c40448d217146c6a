"""The README and the pages of the guide say only what runs."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


COMMANDS = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]


@pytest.mark.every_case
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem
)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    if page.stem == "pytorch":
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    # users run with JAX's default promotion
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), space)
    said = "".join(blocks(page, "text"))
    assert capsys.readouterr().out.strip() == said.strip()
    if page == README:
        assert space["losses"][-1] < space["losses"][0] / 100


def test_running_code_stands_within_the_first_20_lines():
    head = README.read_text().splitlines()[:20]
    assert "```python" in head and "```" in head[head.index("```python") + 1 :]


def test_the_readme_is_read_in_one_sitting():
    assert len(README.read_text().splitlines()) <= 110


def test_the_two_commands_are_there_in_that_form():
    commands = "\n".join(blocks(README, "sh"))
    assert 'pip install ".[demo]" && lora-jax finetune' in commands
    assert 'pip install ".[test]" && pytest' in commands


@pytest.mark.parametrize("line", COMMANDS)
def test_every_option_of_a_command_exists(line, capsys):
    from lora_jax.cli.main import main

    if not (words := re.findall(r"lora-jax (\w+)", line)):
        return
    assert main([words[0], "--help"]) == 0
    help_text = capsys.readouterr().out
    for option in re.findall(r"--[\w-]+", line):
        assert option in help_text


@pytest.mark.every_case
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
