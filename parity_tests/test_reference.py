"""docs/reference.md has every public name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import lora_jax

PAGE = (Path(__file__).parents[1] / "docs" / "reference.md").read_text()


def test_every_public_name_is_there_once():
    listed = re.findall(r"members: \[([^]]*)\]", PAGE)
    names = [name.strip() for part in listed for name in part.split(",")]
    assert sorted(names) == sorted(lora_jax.__all__)


def test_every_module_is_there_once():
    modules = [name for name in re.findall(r"^::: (\S+)$", PAGE, re.M) if name != "lora_jax"]
    assert len(set(modules)) == len(modules)
    for name in modules:
        importlib.import_module(name)
