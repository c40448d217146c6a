"""A run as rows, plots and a page, on made-up figures."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import __main__ as command
from benchmarks.commands.run import RunOptions
from benchmarks.measure import environment
from benchmarks.show import plots, rows, series
from benchmarks.show.page import to_html
from benchmarks.show.report import Report
from benchmarks.tests import reports
from parity_tests.parity import browser


def test_the_command_line_is_told_without_folders_and_defaults():
    assert environment.command("run", RunOptions()) == "python -m benchmarks run"
    options = RunOptions(cases=("layer*",), rounds=7, memory=False, json=Path("/some/where/a.json"))
    wanted = "python -m benchmarks run --cases 'layer*' --rounds 7 --no-memory --json a.json"
    assert environment.command("run", options) == wanted


# Rows, series and plots


def test_rows_put_ours_first_then_the_fastest_and_tell_who_was_skipped():
    result = reports.report().results[5]
    found = rows.rows(result, reports.PEAKS)
    names = [row.contestant for row in found]
    timed = ["lora_jax", "flax.nnx.LoRA", "PEFT compiled", "PEFT eager"]
    assert names == [*timed, "keras", "qwix"]
    assert [row.word for row in found] == ["", "slower", "faster", "faster", "skipped", "skipped"]
    assert found[4].skipped == reports.HOSTILE and found[4].ratio is None
    assert all(len(row.cells) == len(rows.HEADINGS) for row in found)
    eager = dict(zip(rows.HEADINGS, found[3].cells, strict=True))
    assert found[3].ratio == pytest.approx(1 / 1.32, rel=0.03)
    assert eager["ratio (middle half)"].startswith(f"{found[3].ratio:.3f} (")
    assert eager["compile"] == "" and eager["peak memory"] == "300 MiB"


def test_the_points_stand_where_the_work_and_the_times_say():
    found = series.points(reports.report(jitter=0.0), "bfloat16")
    (ours,) = (point for point in found if point.contestant == "lora_jax")
    assert ours.case == "decoder_step"
    assert ours.intensity == pytest.approx(2e11 / 6e8) and ours.rate == pytest.approx(2e11 / 2.4)
    assert "keras" not in {point.contestant for point in found}
    assert "merge" not in {p.case for p in series.points(reports.report(), "float32")}


def test_a_power_is_fitted_and_sizes_that_are_held_part_the_lines():
    layer, adapters = series.scalings(reports.report(jitter=0.0))
    assert adapters.name == "adapters by adapters" and adapters.lines[0].contestant == "lora_jax"
    assert all(line.exponent == pytest.approx(0.9) for line in adapters.lines)
    assert layer.lines[0].sizes == (1, 8, 64, 512, 4096)
    report = reports.report()
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
    report = reports.report()
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
    return to_html(reports.report())


@pytest.mark.slow
def test_the_page_holds_every_figure_reason_and_failure(page):
    report = reports.report()
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
    report = reports.report()
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
def test_the_report_command_writes_the_page_and_the_plots(tmp_path, capsys):
    files = reports.written(tmp_path)
    out = files / "made" / "here"
    command.main(["report", str(files / "a.json"), str(out)])
    names = {file.name for file in out.iterdir()}
    assert {"index.html", "roofline-float32.png", "ratios-ours-over-qwix.png"} <= names
    assert len(names) == 10 and "9 plots" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["report", str(files / "a.json"), str(files / "a.json")])
    assert "out: " in capsys.readouterr().err
