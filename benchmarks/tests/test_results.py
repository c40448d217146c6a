"""The written results, their goals and the log of what was tried, on made-up figures."""

from __future__ import annotations

import dataclasses
import fnmatch
import re

import pytest

from benchmarks import __main__ as command
from benchmarks.case import BenchmarkError
from benchmarks.cases import CASES
from benchmarks.show import attempts, goals, results, rows
from benchmarks.show.report import comparisons
from benchmarks.tests import reports

ENTRY = """
[[attempt]]
date = 2030-01-31
case = "merge"
tried = "one | two"
before = 2.0
after = 1
unit = "s"
kept = true
why = "half the time"
"""


def test_results_are_tables_with_machine_command_and_versions():
    report = reports.report()
    text = results.to_markdown([report, report], (), (), "python -m benchmarks results a.json")
    assert text.count("## A made-up processor, 2030-01-02 03:04 UTC") == 2
    assert text.count("    python -m benchmarks run --json a.json") == 2
    assert "Nothing is in the log yet" in text and "- torch: 1.2.3" in text
    assert r"skipped: \<b\>bold\</b\> & \[red\]text\[/red\] \| \`x\`" in text
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in tables}
    glance = len(reports.CONTESTANTS)
    assert columns == {len(results.SHOWN) + 2, glance, 6}, "runs' tables, ratios, and the goals"
    for row in rows.rows(report.results[0], report.limits):
        assert all(cell in text for cell in (row.contestant, row.verdict, row.cells[0]))


def test_ratios_are_told_at_a_glance_with_a_mark_where_there_is_no_verdict():
    report = reports.report()
    text = results.to_markdown([report], (), (), "c")
    rows_ = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    for result in report.results:
        row = rows_[f"| {result.case}"].strip("| ").split(" | ")[1:]
        assert [cell for cell in row if cell] == [
            f"{'~' if found.noise else ''}{found.ratio.median:.2f}"
            for found in comparisons(result).values()
        ]
    assert "~" in rows_["| merge"] and "~" not in rows_["| layer_512"]
    alone = dataclasses.replace(report, results=report.results[:1])
    assert "at a glance" not in results.to_markdown([alone], (), (), "c")


def test_what_was_tried_is_told_by_date():
    earlier = (
        ENTRY.replace("2030", "2029")
        .replace("after = 1", "after = 2.5")
        .replace("kept = true", "kept = false")
    )
    found = attempts.parse(ENTRY + earlier)
    assert [one.kept for one in found] == [False, True]
    text = results.to_markdown([], found, (), "c")
    assert "| 2029-01-31 | merge | one \\| two | 2 s | 2.5 s | +25.0% | no |" in text
    assert text.index("2029") < text.index("| 2030-01-31")
    assert "2 s | 1 s | -50.0% | yes | half the time |" in text


def test_every_bad_attempt_is_named():
    bad = ENTRY.replace("before = 2.0", "before = 0").replace("kept = true", 'kept = "yes"')
    with pytest.raises(BenchmarkError) as error:
        attempts.parse(bad.replace('unit = "s"\n', "other = 1\n") + ENTRY.replace('"s"', '""'))
    for part in (
        "attempt 1: before: got 0, wanted more than 0",
        "attempt 1: kept: got 'yes', wanted a bool",
        "attempt 1: unit: missing",
        "attempt 1: other: not known",
        "attempt 2: unit: is empty",
    ):
        assert part in str(error.value)
    for text in ("attempt = 1", "x = 1", "=", "attempt = [1]"):
        with pytest.raises(BenchmarkError):
            attempts.parse(text)


def test_the_log_that_is_here_can_be_read():
    attempts.parse(attempts.FILE.read_text("utf-8"))


GOAL = """
[[goal]]
what = "a layer over PEFT"
cases = ["layer_*"]
against = ["PEFT*"]
most = 0.8
"""


def outcome(report, text=GOAL):
    (found,) = goals.outcomes(goals.parse(text), [report])
    return found


def test_a_goal_is_missed_by_what_is_too_large():
    """Ours takes 1/1.32 and 1/1.21 of the two, in each of five layers."""
    found = outcome(reports.report())
    assert len(found.figures) == 10 and found.verdict == "missed in 5 of 10"
    assert {one.contestant for one in found.missed} == {"PEFT compiled"} == {found.worst.contestant}
    assert found.middle == pytest.approx((1 / 1.32 + 1 / 1.21) / 2, rel=0.02)
    assert outcome(reports.report(), GOAL + "middle = true").verdict == "reached"
    slower = reports.report(slower=1.2)
    assert outcome(slower, GOAL + "middle = true").verdict == "missed"
    assert outcome(slower).verdict == "missed in 10 of 10"
    assert outcome(reports.report(), GOAL.replace("layer_", "no_")).verdict == "not measured"
    noisy = outcome(reports.report(jitter=0.3))
    assert any(one.noisy for one in noisy.figures)


@pytest.mark.parametrize("measure", ["memory", "limit", "compile"])
def test_other_measures_than_time(measure):
    report = reports.report()
    first = report.results[0]
    sizes = {"lora_jax": 300, "PEFT eager": 600}
    timings = [
        dataclasses.replace(one, peak_bytes=sizes.get(one.contestant), compile_seconds=2.5)
        for one in first.timings
    ]
    report = dataclasses.replace(report, results=(dataclasses.replace(first, timings=timings),))
    name = "PEFT*" if measure == "memory" else "lora_jax"
    text = GOAL.replace("PEFT*", name) + f'measure = "{measure}"'
    (figure,) = outcome(report, text).figures
    share = rows.share(report.results[0], timings[0], report.limits)
    assert figure.value == {"memory": 0.5, "limit": 1 / share, "compile": 2.5}[measure]


def test_goals_are_told_first():
    report = reports.report()
    text = results.to_markdown([report], (), [outcome(report)], "c")
    assert re.search(
        r"\| a layer over PEFT \| 0.8 \| 0.7\d\d \| 0.8\d\d \| .* \| missed in 5 of 10 \|", text
    )
    assert text.index("## Goals") < text.index("### ")
    why = GOAL + 'why = "the sun"\n'
    for most, told in (("0.8", 1), ("9.0", 0)):
        found = outcome(report, why.replace("0.8", most))
        said = results.to_markdown([report], (), [found], "c")
        assert said.count("- a layer over PEFT: the sun") == told
    with pytest.raises(BenchmarkError, match="measure: got .*joy"):
        goals.parse(GOAL + 'measure = "joy"')
    with pytest.raises(BenchmarkError, match=r"goal 1: cases: got \[1\], wanted strings"):
        goals.parse(GOAL.replace('["layer_*"]', "[1]"))


def test_the_goals_that_are_here_name_cases_that_there_are():
    known = {case.name: {one.name for one in case.contestants} for case in CASES.values()}
    for goal in goals.parse(goals.FILE.read_text("utf-8")):
        for pattern in goal.cases:
            named = fnmatch.filter(known, pattern)
            assert named, f"{goal.what}: no case is named {pattern}"
            for one in goal.against:
                assert fnmatch.filter(set().union(*(known[case] for case in named)), one), one


def test_what_misses_a_goal_is_explained_and_was_tried_three_times():
    log = attempts.parse(attempts.FILE.read_text("utf-8"))
    for goal in goals.parse(goals.FILE.read_text("utf-8")):
        tried = [one for one in log if any(fnmatch.fnmatchcase(one.case, p) for p in goal.cases)]
        assert not goal.why or len(tried) >= 3, f"{goal.what}: {len(tried)} attempts"


def test_the_results_command_writes_the_file(tmp_path, capsys):
    files = reports.written(tmp_path)
    log, out = files / "attempts.toml", files / "RESULTS.md"
    log.write_text(ENTRY)
    names = [str(files / f"{name}.json") for name in ("a", "b")]
    command.main(["results", *names, "--out", str(out), "--attempts", str(log)])
    said = out.read_text("utf-8")
    assert "`python -m benchmarks results a.json b.json`" in said and "half the time" in said
    with pytest.raises(SystemExit):
        command.main(["results", *names, "--out", str(out), "--attempts", str(files / "no.toml")])
    assert "no.toml" in capsys.readouterr().err and out.read_text("utf-8") == said
