"""docs/architecture.md has a row for every module, in the module's own words."""

from __future__ import annotations

import re
from pathlib import Path

from parity_tests.modules_table import PAGE, ROOT, table


def test_every_module_has_its_row():
    assert table() in PAGE.read_text("utf-8"), "python -m parity_tests.modules_table writes them"


def test_every_module_says_what_it_holds():
    assert not re.findall(r"\| `\S+` \|  \|", table())


def test_every_file_that_the_page_names_is_there():
    named = re.findall(r"`((?:\w+/)+\w+\.\w+)`", PAGE.read_text("utf-8"))
    assert named and [name for name in named if not _exists(name)] == []


def _exists(name: str) -> bool:
    return (ROOT / name).exists() or (Path(ROOT).parent / name).exists()
