"""Two runs compared, a run as a page and as plots, and the written results: on made-up figures."""

from __future__ import annotations

import dataclasses
import fnmatch
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import attempts, compare, environment, goals, plots, results, rows, series, stats
from benchmarks.case import BenchmarkError
from benchmarks.cases import CASES
from benchmarks.commands.run import RunOptions
from benchmarks.limits import Limits
from benchmarks.page import to_html
from benchmarks.report import Report, comparisons, to_json
from parity_tests import bench_reports, browser


def words(found):
    return [change.verdict for change in found]


# Comparing


@pytest.mark.parametrize(("n", "m"), [(4, 4), (6, 6), (6, 20), (9, 30), (20, 20)])
def test_the_interval_of_two_series_holds_their_true_ratio_as_often_as_it_says(n, m):
    rng = np.random.default_rng(n)
    draws = [
        stats.compare_apart(1.5 * rng.lognormal(0, 0.03, n), rng.lognormal(0, 0.03, m)).interval
        for _ in range(1500)
    ]
    held = np.mean([low <= 1.5 <= high for low, high in draws])
    assert 0.94 <= held <= 0.995
    assert stats.compare_apart([1.0] * 3, [1.0] * 3).interval is None


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_slowdown_of_20_percent_is_detected(seed):
    before, after = bench_reports.report(seed), bench_reports.report(seed + 100, slower=1.2)
    found = compare.changes(before, after)
    ours = [change for change in found if change.contestant == "lora_jax"]
    assert len(ours) == 11 and set(words(ours)) == {"slower"}
    assert all(change.exceeds(1.05) for change in ours)
    assert not any(change.exceeds(1.05) for change in found if change.contestant != "lora_jax")
    assert all(change.found.ratio.median == pytest.approx(1.2, rel=0.05) for change in ours)
    back = [one for one in compare.changes(after, before) if one.contestant == "lora_jax"]
    assert set(words(back)) == {"faster"} and not any(one.exceeds(1.05) for one in back)


def test_equal_runs_raise_no_alarm_over_200_seeds():
    says, alarms = [], 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        pair = [rng.lognormal(0, 0.03, 20) for _ in range(2)]
        change = compare.Change("c", "ours", 1.0, 1.0, stats.compare_apart(*pair))
        says.append(change.verdict)
        alarms += change.exceeds(1.05)
    assert alarms == 0
    assert says.count("no difference shown") >= 180


def test_what_is_not_the_same_is_told():
    before = bench_reports.report()
    first, *others = before.results
    peer = first.timings[1]
    slim = dataclasses.replace(
        first,
        timings=(first.timings[0], dataclasses.replace(peer, versions={"torch": "9"})),
        skipped={"qwix": "gone"},
    )
    other_work = dataclasses.replace(others[0], title="other work")
    after = dataclasses.replace(
        before,
        environment={**before.environment, "cores": "64", "date": "later"},
        results=(slim, other_work, *others[1:-1]),
        limits=Limits("gpu", {"float32": 5e12}, 1e12),
        failed={"merge": "it broke"},
    )
    told = dict((name, (a, b)) for name, a, b in compare.differences(before, after))
    assert told["cores"] == ("2", "64") and told["device"] == ("cpu", "gpu")
    assert told["torch"] == ("1.2.3", "9, 1.2.3") and "date" not in told
    assert told["peak, bfloat16"] == ("260 GFLOP/s", "not there")
    said = "\n".join(compare.unmatched(before, after))
    for part in (
        "layer_1: qwix: only in the earlier run; skipped in the other: gone",
        "layer_8: not compared, its work is another: ",
        "merge: only in the earlier run; the other one failed: it broke",
    ):
        assert part in said
    cases = {change.case for change in compare.changes(before, after)}
    assert not cases & {"layer_8", "merge"} and "layer_1" in cases
    assert compare.differences(before, before) == [] == compare.unmatched(before, before)


def test_noise_and_a_crowd_get_no_verdict_and_no_alarm():
    quiet, loud = bench_reports.report(), bench_reports.report(slower=2.0, jitter=0.3)
    found = compare.changes(quiet, loud)
    assert set(words(found)) == {"noisy"} and not any(change.exceeds(1.05) for change in found)
    crowded = dataclasses.replace(
        quiet, results=tuple(dataclasses.replace(r, cores_elsewhere=0.9) for r in quiet.results)
    )
    assert set(words(compare.changes(quiet, crowded))) == {"noisy"}
    few = dataclasses.replace(quiet.results[0].timings[0], seconds=(1.0, 1.0, 1.01))
    short = dataclasses.replace(
        quiet, results=(dataclasses.replace(quiet.results[0], timings=(few,)),)
    )
    assert words(compare.changes(short, short)) == ["too few rounds"]


@pytest.fixture
def files(tmp_path):
    made = {
        "a": bench_reports.report(),
        "b": bench_reports.report(1),
        "slow": bench_reports.report(2, slower=1.2),
    }
    for name, one in made.items():
        (tmp_path / f"{name}.json").write_bytes(to_json(one))
    return tmp_path


def test_the_compare_command_is_a_gate(files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    a, b, slow = (str(files / f"{name}.json") for name in ("a", "b", "slow"))
    command.main(["compare", a, b])
    said = capsys.readouterr().out
    assert "not taken in turns" in said and "0 of 57 slower" in said
    assert "versions, settings and peaks are the same" in said
    with pytest.raises(SystemExit) as stop:
        command.main(["compare", a, slow])
    assert stop.value.code == 1 and "11 of 57 slower" in capsys.readouterr().out
    command.main(["compare", a, slow, "--limit", "1.5"])
    assert "0 of 57 slower than 1.5 times" in capsys.readouterr().out


def test_every_bad_file_is_named(files, capsys):
    (files / "bad.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        command.main(["compare", str(files / "bad.json"), str(files / "none.json")])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "bad.json: this is no benchmark report" in said
    assert "none.json: No such file" in said


def test_the_command_line_is_told_without_folders_and_defaults():
    assert environment.command("run", RunOptions()) == "python -m benchmarks run"
    options = RunOptions(cases=("layer*",), rounds=7, memory=False, json=Path("/some/where/a.json"))
    wanted = "python -m benchmarks run --cases 'layer*' --rounds 7 --no-memory --json a.json"
    assert environment.command("run", options) == wanted


# Rows, series and plots


def test_rows_put_ours_first_then_the_fastest_and_tell_who_was_skipped():
    result = bench_reports.report().results[5]
    found = rows.rows(result, bench_reports.PEAKS)
    names = [row.contestant for row in found]
    timed = ["lora_jax", "flax.nnx.LoRA", "PEFT compiled", "PEFT eager"]
    assert names == [*timed, "keras", "qwix"]
    assert [row.word for row in found] == ["", "slower", "faster", "faster", "skipped", "skipped"]
    assert found[4].skipped == bench_reports.HOSTILE and found[4].ratio is None
    assert all(len(row.cells) == len(rows.HEADINGS) for row in found)
    eager = dict(zip(rows.HEADINGS, found[3].cells, strict=True))
    assert found[3].ratio == pytest.approx(1 / 1.32, rel=0.03)
    assert eager["ratio (middle half)"].startswith(f"{found[3].ratio:.3f} (")
    assert eager["compile"] == "" and eager["peak memory"] == "300 MiB"


def test_the_points_stand_where_the_work_and_the_times_say():
    found = series.points(bench_reports.report(jitter=0.0), "bfloat16")
    (ours,) = (point for point in found if point.contestant == "lora_jax")
    assert ours.case == "decoder_step"
    assert ours.intensity == pytest.approx(2e11 / 6e8) and ours.rate == pytest.approx(2e11 / 2.4)
    assert "keras" not in {point.contestant for point in found}
    assert "merge" not in {p.case for p in series.points(bench_reports.report(), "float32")}


def test_a_power_is_fitted_and_sizes_that_are_held_part_the_lines():
    layer, adapters = series.scalings(bench_reports.report(jitter=0.0))
    assert adapters.name == "adapters by adapters" and adapters.lines[0].contestant == "lora_jax"
    assert all(line.exponent == pytest.approx(0.9) for line in adapters.lines)
    assert layer.lines[0].sizes == (1, 8, 64, 512, 4096)
    report = bench_reports.report()
    held = tuple(
        dataclasses.replace(one, sizes={**one.sizes, "r": r})
        for one in report.results[:5]
        for r in (4, 16)
    )
    found = series.scalings(dataclasses.replace(report, results=held))
    assert [one.name for one in found] == [
        "layer by tokens, r = 4",
        "layer by tokens, r = 16",
        *(f"layer by r, tokens = {tokens}" for tokens in (1, 8, 64, 512, 4096)),
    ]


@pytest.mark.slow
def test_every_plot_is_a_picture_of_its_own_on_the_right_paper():
    report = bench_reports.report()
    few = dataclasses.replace(report, results=report.results[5:10])
    for theme in (plots.LIGHT, plots.DARK):
        found = plots.pictures(few, theme)
        assert [one.kind for one in found] == ["ratios"] * 4 + ["roofline"] * 2 + ["scaling"]
        assert len({one.name for one in found}) == len(found)
        assert all(re.fullmatch("[a-z0-9-]+", one.name) for one in found)
        for one in found:
            picture = Image.open(io.BytesIO(one.png)).convert("RGB")
            assert picture.width == round(plots.WIDTH * plots.DPI)
            assert "#{:02x}{:02x}{:02x}".format(*picture.getpixel((0, 0))) == theme.paper
            assert len(picture.getcolors(1 << 24)) > 20
    assert plots.pictures(few) == plots.pictures(few)
    assert plots.pictures(Report({}, ())) == []


# The page

PROBE = """
const root = document.documentElement;
note("inner", innerWidth);
note("width", Math.max(root.scrollWidth, document.body.scrollWidth));
note("cases", document.querySelectorAll("details.level").length);
note("rows", document.querySelectorAll("tr.row").length);
note("bold", document.querySelectorAll("td b, span i:not(.cell i)").length);
const images = [...document.images];
note("pictures", images.length);
note("broken", images.filter((one) => !one.complete || !one.naturalWidth).length);
const loaded = performance.getEntriesByType("resource");
note("outside", loaded.filter((one) => !one.name.startsWith("data:")).length);
const links = [...document.querySelectorAll("a")];
note("dangling", links.filter((one) => !document.querySelector(one.getAttribute("href"))).length);
"""


@pytest.fixture(scope="module")
def page():
    return to_html(bench_reports.report())


@pytest.mark.slow
def test_the_page_holds_every_figure_reason_and_failure(page):
    report = bench_reports.report()
    for result in report.results:
        assert result.title in page and f'id="case-{result.case}"' in page
        for row in rows.rows(result, report.limits):
            assert all(cell in page for cell in row.cells)
    assert "&lt;b&gt;bold&lt;/b&gt;" in page and "<b>bold" not in page
    assert "&lt;i&gt;why&lt;/i&gt;" in page and "measured peaks" in page
    assert "python -m benchmarks run --json a.json" in page
    assert not re.search(r"""(src|href|srcset)=["']?(https?:)?//""", page)
    order = re.findall('id="case-([^"]+)"', page)
    worst = {r.case: rows.rows(r, None)[1].ratio for r in report.results}
    assert order == sorted(order, key=lambda case: -worst[case])


def test_a_case_alone_is_a_page():
    report = bench_reports.report()
    page = to_html(dataclasses.replace(report, results=report.results[5:6], limits=None))
    assert "&lt;b&gt;bold&lt;/b&gt;" in page and "<b>bold" not in page
    assert page.count("data:image/png") == 6 and "Roofline" not in page
    assert page.count('class="row"') == 6 and "measured peaks" not in page


def test_an_empty_report_is_a_page():
    page = to_html(Report({}, (), failed={"a": "why"}))
    assert "Cases that gave no result" in page and "Ratios at a glance" not in page


@browser.needed
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_opens_on_a_phone_and_on_a_desk(page, tmp_path, width):
    found = browser.opened(page, PROBE, tmp_path, width=width)
    assert found.console == []
    assert found.notes["inner"] == found.notes["width"] == str(width)
    assert found.notes["cases"] == "11" and found.notes["rows"] == "66"
    assert found.notes["pictures"] == "9"
    for nothing in ("bold", "broken", "outside", "dangling"):
        assert found.notes[nothing] == "0", nothing


@pytest.mark.slow
def test_the_report_command_writes_the_page_and_the_plots(files, capsys):
    out = files / "made" / "here"
    command.main(["report", str(files / "a.json"), str(out)])
    names = {file.name for file in out.iterdir()}
    assert {"index.html", "roofline-float32.png", "ratios-ours-over-qwix.png"} <= names
    assert len(names) == 10 and "9 plots" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["report", str(files / "a.json"), str(files / "a.json")])
    assert "out: " in capsys.readouterr().err


# The written results

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
    report = bench_reports.report()
    text = results.to_markdown([report, report], (), (), "python -m benchmarks results a.json")
    assert text.count("## A made-up processor, 2030-01-02 03:04 UTC") == 2
    assert text.count("    python -m benchmarks run --json a.json") == 2
    assert "Nothing is in the log yet" in text and "- torch: 1.2.3" in text
    assert r"skipped: \<b\>bold\</b\> & \[red\]text\[/red\] \| \`x\`" in text
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in tables}
    glance = len(bench_reports.CONTESTANTS)
    assert columns == {len(results.SHOWN) + 2, glance, 6}, "runs' tables, ratios, and the goals"
    for row in rows.rows(report.results[0], report.limits):
        assert all(cell in text for cell in (row.contestant, row.verdict, row.cells[0]))


def test_ratios_are_told_at_a_glance_with_a_mark_where_there_is_no_verdict():
    report = bench_reports.report()
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
    found = outcome(bench_reports.report())
    assert len(found.figures) == 10 and found.verdict == "missed in 5 of 10"
    assert {one.contestant for one in found.missed} == {"PEFT compiled"} == {found.worst.contestant}
    assert found.middle == pytest.approx((1 / 1.32 + 1 / 1.21) / 2, rel=0.02)
    assert outcome(bench_reports.report(), GOAL + "middle = true").verdict == "reached"
    slower = bench_reports.report(slower=1.2)
    assert outcome(slower, GOAL + "middle = true").verdict == "missed"
    assert outcome(slower).verdict == "missed in 10 of 10"
    assert outcome(bench_reports.report(), GOAL.replace("layer_", "no_")).verdict == "not measured"
    noisy = outcome(bench_reports.report(jitter=0.3))
    assert any(one.noisy for one in noisy.figures)


@pytest.mark.parametrize("measure", ["memory", "limit", "compile"])
def test_other_measures_than_time(measure):
    report = bench_reports.report()
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
    report = bench_reports.report()
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


def test_the_results_command_writes_the_file(files, capsys):
    log, out = files / "attempts.toml", files / "RESULTS.md"
    log.write_text(ENTRY)
    names = [str(files / f"{name}.json") for name in ("a", "b")]
    command.main(["results", *names, "--out", str(out), "--attempts", str(log)])
    said = out.read_text("utf-8")
    assert "`python -m benchmarks results a.json b.json`" in said and "half the time" in said
    with pytest.raises(SystemExit):
        command.main(["results", *names, "--out", str(out), "--attempts", str(files / "no.toml")])
    assert "no.toml" in capsys.readouterr().err and out.read_text("utf-8") == said
