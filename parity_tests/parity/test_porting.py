"""The porting guide runs, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "porting.md").read_text()
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def alike(text: str) -> list[list[str]]:
    """Return the words of each line; whether rounding is the same depends on the machine."""
    return [line.replace("EXACT", "ORDER-ONLY").split() for line in text.strip().splitlines()]


@pytest.mark.slow
def test_the_guide_prints_what_it_says(capsys):
    space: dict = {}
    found = []
    # users run with JAX's default promotion
    with jax.numpy_dtype_promotion("standard"):
        for language, block in BLOCK.findall(GUIDE):
            if language == "python":
                exec(compile(block, "porting.md", "exec"), space)
            else:
                found.append((capsys.readouterr().out, block))
    assert len(found) == 4
    for got, said in found:
        print(got)
        assert alike(got) == alike(said)


@pytest.mark.parametrize("page", ["index.md", "mkdocs.yml"])
def test_the_guide_is_linked(page):
    assert "porting.md" in (DOCS / page).read_text()
