"""``docs/parity.md`` says only what runs."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import jax
import pytest

from lora_jax.cli.main import main
from lora_jax.parity.reports.checks import LEVELS
from lora_jax.parity.verdicts import Verdict

GUIDE = (Path(__file__).parents[2] / "docs" / "parity.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield tmp_path
    sys.modules.pop("mine", None)


def test_python_blocks_run_in_order_and_print_what_stands_below(here, capsys):
    space: dict = {}
    # users run with JAX's default promotion
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks("python"):
            exec(compile(block, "parity.md", "exec"), space)
    assert capsys.readouterr().out == "".join(blocks("text"))


def test_commands_run_in_order(here, capsys):
    (here / "mine.py").write_text(blocks("python")[0])
    for block in blocks("sh"):
        name, *argv = shlex.split(block)
        assert name == "lora-jax" and main(argv) == 0, capsys.readouterr()
    assert "nothing changed" in capsys.readouterr().out
    for folder in ("runs/parity", "pair", "later"):
        assert sorted(path.suffix for path in (here / folder).iterdir()) == [
            ".html",
            ".json",
            ".md",
        ]


def test_every_verdict_and_level_has_its_row():
    for verdict in Verdict:
        (row,) = re.findall(rf"^\| `{verdict}` \|.*\| (yes|no) \|$", GUIDE, re.MULTILINE)
        assert (row == "yes") == verdict.ok
    assert re.findall(r"^\| (\d) \| (.*) \|$", GUIDE, re.MULTILINE) == [
        (str(level), said) for level, said in LEVELS.items()
    ]
