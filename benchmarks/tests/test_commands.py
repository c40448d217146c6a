"""``python -m benchmarks run`` and ``list``, on a clock that the contestants move."""

from __future__ import annotations

import pytest

from benchmarks import __main__ as command
from benchmarks import cases
from benchmarks.case import Case
from benchmarks.commands import run as run_command
from benchmarks.measure.limits import Limits
from benchmarks.show import report
from benchmarks.tests.clock import Bench


@pytest.fixture
def fake_case(monkeypatch):
    bench = Bench()
    names = ("a", "PEFT eager", "PEFT compiled", "other")
    case = Case("fake", "", tuple(map(bench.contestant, names)), 0.0, memory=False)
    broken = Case("broken", "", (bench.contestant("a", result=lambda n: 0.5),), 0.0)
    monkeypatch.setattr(run_command, "CASES", {"fake": case, "broken": broken})
    monkeypatch.setattr(run_command, "run", bench.run_case)
    peaks = Limits("cpu", {"float32": 1e11}, 1e10)
    monkeypatch.setattr(run_command.limits, "measure", lambda: peaks)
    return bench


def test_the_command_prints_a_table_and_writes_json(fake_case, tmp_path, capsys):
    target = tmp_path / "out.json"
    options = ["--cases", "fa*", "--against", "PEFT*", "--rounds", "7", "--json", str(target)]
    command.main(["run", *options])
    (result,) = report.from_json(target.read_bytes()).results
    assert result.case == "fake" and len(result.timings[0].seconds) == 7
    assert [t.contestant for t in result.timings] == ["a", "PEFT eager", "PEFT compiled"]
    assert "median" in capsys.readouterr().out


def test_a_case_that_fails_costs_no_other_and_the_status_says_so(fake_case, tmp_path, capsys):
    target = tmp_path / "out.json"
    with pytest.raises(SystemExit) as stop:
        command.main(["run", "--json", str(target)])
    assert stop.value.code == 1
    found = report.from_json(target.read_bytes())
    assert [r.case for r in found.results] == ["fake"] and "same result" in found.failed["broken"]
    assert "broken gave no result" in capsys.readouterr().out


def test_every_bad_option_is_listed_before_anything_runs(fake_case, tmp_path, capsys):
    missing = tmp_path / "missing" / "out.json"
    options = ["--cases", "fake", "other", "--rounds", "0", "--json", str(missing)]
    with pytest.raises(SystemExit) as stop:
        command.main(["run", *options, "--seconds", "0", "--against", "nobody"])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    for part in (
        "'other' matches none of fake, broken",
        "got 0, wanted at least 1",
        "existing directory",
        "got 0.0, wanted more than 0",
        "'nobody' matches none of PEFT compiled, PEFT eager, other",
    ):
        assert part in said
    assert not fake_case.order


def test_the_list_names_every_case(capsys):
    command.main(["list"])
    said = capsys.readouterr().out
    assert all(name in said for name in cases.CASES)


def test_cases_are_named_by_their_keys():
    assert all(name == case.name for name, case in cases.CASES.items())
