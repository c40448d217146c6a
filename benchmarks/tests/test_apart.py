"""Processes of their own, which benchmarks measure and compile in."""

from __future__ import annotations

import pytest

from benchmarks.case import BenchmarkError
from benchmarks.measure import apart

TELL = """
import json, os, sys
print("not this line")
print(json.dumps([sys.argv[1:], os.environ.get("SAID"), os.environ.get("ALSO")]))
"""
FAIL = """
import sys
sys.exit("\\n".join(f"line {n}" for n in range(9)))
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A package that this process finds, and a directory from which a new one would not."""
    package = tmp_path / "found" / "told"
    package.mkdir(parents=True)
    (package / "tell.py").write_text(TELL)
    (package / "fail.py").write_text(FAIL)
    monkeypatch.syspath_prepend(package.parent)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def test_a_process_finds_what_this_one_finds_and_answers_with_its_last_line(modules, monkeypatch):
    for name in ("SAID", "ALSO"):
        monkeypatch.setenv(name, "here")
    found = apart.run("told.tell", "a", "b c", about="it", environment={"ALSO": "there"})
    assert found == [["a", "b c"], "here", "there"]


def test_a_failed_process_is_told_by_its_last_lines(modules):
    with pytest.raises(BenchmarkError) as raised:
        apart.run("told.fail", about="it")
    assert str(raised.value) == "it failed:\nline 4\nline 5\nline 6\nline 7\nline 8"
