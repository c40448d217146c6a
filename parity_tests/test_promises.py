"""Every line of `docs/promises.md` names tests, and they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "promises.md"


def named_in(row: str) -> list[tuple[str, str]]:
    return re.findall(r"`((?:\w+/)?test_\w+\.py)::(test_\w+)`", row)


def test_every_promise_names_tests_that_are_there():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    promises = [row for row in rows if "| promise |" not in row]
    assert len(promises) > 20
    missing = [row for row in promises if not named_in(row)]
    for name, test in (found for row in promises for found in named_in(row)):
        tree = ast.parse((HERE / name).read_text()) if (HERE / name).is_file() else ast.Module([])
        if test not in {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}:
            missing.append(f"{name}::{test}")
    assert not missing
