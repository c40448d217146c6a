"""Reports: nothing is lost on the way through JSON, and the page shows all of it, alone."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lora_jax.core.errors import ParityError
from lora_jax.parity.reports.charts import chart
from lora_jax.parity.reports.checks import CheckResult
from lora_jax.parity.reports.differences import Kind, differences
from lora_jax.parity.reports.markdown import to_markdown
from lora_jax.parity.reports.page import to_html
from lora_jax.parity.reports.report import Report, environment, from_json, to_json
from lora_jax.parity.reports.summary import (
    MOST_COLUMNS,
    OTHERS,
    cells,
    columns,
    ratio_text,
    sentences,
)
from lora_jax.parity.verdicts import TensorVerdict, Verdict
from parity_tests.parity import browser

HOSTILE = "</script><script>document.title='taken'</script> | <b>&amp;\n"
FINE = TensorVerdict(
    "y 3×5", Verdict.ORDER_ONLY, 3e-8, 2e-8, 1e-6, 1e-9, 1e-8, shape=(3, 5), dtype="float32"
)
WRONG = dataclasses.replace(FINE, name="dA 3×5", verdict=Verdict.MISMATCH, jax=1.0, why=HOSTILE)
STEPS = list(range(1, 41))
NOISE = [1e-8 * step for step in STEPS]


def report() -> Report:
    """Return a report with everything that one can hold."""
    exact = dataclasses.replace(FINE, verdict=Verdict.EXACT, jax=0.0, torch=0.0)
    vacuous = TensorVerdict("dA", Verdict.VACUOUS, why="the truth is zero")
    biased = dataclasses.replace(FINE, name="mu", verdict=Verdict.BIASED, torch=0.0)
    line = dict(steps=STEPS, distance=[2e-9 * 1.2**s for s in STEPS], band=NOISE, horizon=25)
    same = dict(steps=STEPS, distance=[0.0] * 40, band=[math.nan] * 40, horizon=None)
    return Report(
        environment(seed=3),
        (
            CheckResult("layer/reference exact", 0, (exact,), 0.25),
            CheckResult("layer/peft float32", 1, (FINE, WRONG), 0.5),
            CheckResult("AdamW/torch", 3, (vacuous, biased), 1.5),
            CheckResult(f"merge {HOSTILE}", 5, error=f"ValueError: {HOSTILE}"),
            CheckResult("files/peft", 6, skipped="needs peft: pip install peft"),
        ),
        {"AdamW, 40 steps": line, "SGD on integers": same},
        {
            "scale squared": {"outputs": "ORDER-ONLY", "oracle": "MISMATCH", "loss": None},
            "tied delta doubled": {"outputs": False, "oracle": "EXACT"},
        },
    )


# Plain data, since jaxtyping's dataclasses draw random numbers, which hypothesis forbids inside.
floats = st.floats(allow_nan=True, allow_infinity=True, width=64)
texts = st.text(max_size=8)
shapes = st.lists(st.integers(0, 99), max_size=3).map(tuple)
verdicts = st.sampled_from(Verdict)
errors = st.floats(min_value=0, allow_nan=False) | st.just(math.nan)
tensors = st.tuples(texts, verdicts, errors, errors, floats, floats, floats, texts, shapes, texts)
checks = st.tuples(
    texts, st.integers(0, 6), st.lists(tensors, max_size=3), st.floats(0, 1e6), texts, texts
)
three = st.lists(floats, min_size=3, max_size=3)
trajectories = st.builds(
    dict,
    steps=st.just([1, 2, 3]),
    distance=three,
    band=three,
    horizon=st.none() | st.integers(1, 3),
)
reports = st.tuples(
    st.just({"seed": 0, "versions": {"jax": "0.10"}}),
    st.lists(checks, max_size=3),
    st.dictionaries(texts, trajectories, max_size=2),
    st.dictionaries(texts, st.dictionaries(texts, verdicts.map(str)), max_size=2),
)


def built(drawn) -> Report:
    made, found, *rest = drawn
    return Report(
        made,
        tuple(
            CheckResult(name, level, tuple(TensorVerdict(*one) for one in each), *more)
            for name, level, each, *more in found
        ),
        *rest,
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(reports)
def test_a_report_survives_json(drawn):
    found = built(drawn)
    text = to_json(found)
    json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
    # repr, since NaN is not equal to itself
    assert repr(from_json(text)) == repr(found)


# Not shrunk, since a page takes long to make under the type checks of the tests.
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(reports)
def test_any_report_can_be_shown(drawn):
    found = built(drawn)
    assert_alone(to_html(found, found))
    assert to_markdown(found, found)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', "null"])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ParityError, match="report"):
        from_json(text)


def test_markdown_has_a_row_for_each_check_and_a_line_for_what_is_wrong():
    lines = to_markdown(report()).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 1 + len(report().checks)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)
    assert [line for line in lines if "dA 3×5: MISMATCH" in line]
    assert [line for line in lines if line.startswith("- merge") and "ValueError" in line]


def test_the_summary_names_the_worst_verdict_and_who_is_further_from_the_truth():
    first, second, third = sentences(report())
    assert "MISMATCH: 3 of 4 checks fail (layer/peft float32, AdamW/torch" in first
    assert second.startswith("In 3 of 5 tensors JAX is further from the truth, in 0 PyTorch, in 2")
    assert third == "1 check was skipped: needs peft: pip install peft."
    assert sentences(Report({}, ())) == ["No check ran, so this report says nothing."]


def test_rare_quantities_share_a_column():
    rare = tuple(dataclasses.replace(FINE, name=f"q{n}") for n in range(20))
    both = [CheckResult("one", 1, rare), CheckResult("two", 1, (FINE,)), CheckResult("x", 1, rare)]
    names = columns(both)
    assert len(names) == MOST_COLUMNS and names[-1] == OTHERS and "q0" in names
    found = cells(both[0], names)
    assert sorted(place for cell in found.values() for place in cell.tensors) == list(range(20))


class Page(HTMLParser):
    """Every tag is closed in order; what the page would load is noted."""

    VOID = {"meta", "link", "input", "br", "wbr", "hr", "img"}
    DRAWN = {"line", "polygon", "polyline"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.loads += [given[name] for name in ("src", "href", "srcset") if given.get(name)]
        self.ids += [given["id"]] if "id" in given else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.DRAWN, tag

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes {self.open[-3:]}"


def assert_alone(text: str) -> None:
    page = Page(text)
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert page.loads == ["data:,"]
    styles = re.search("<style>(.*?)</style>", text, re.DOTALL)
    assert styles and not re.search(r"url\(|@import", styles[1])


def test_the_page_is_well_formed_and_loads_nothing():
    text = to_html(report(), report())
    assert_alone(text)
    assert "http:" not in text and "https:" not in text
    for planted in ("</b>", "<img src='x.png'>", "<div>"):
        with pytest.raises(AssertionError):
            assert_alone(text.replace("<header>", f"{planted}<header>"))


def test_texts_of_others_stay_texts():
    assert "<script>document.title" not in to_html(report())


def test_the_page_without_jinja2_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ParityError, match=re.escape('pip install "lora_jax[report]"')):
        to_html(report())


# A comparison with an earlier report


def changed(**fields):
    """Return the report whose second check has a first tensor with these fields."""
    first = dataclasses.replace(FINE, **fields)
    checks = list(report().checks)
    checks[1] = dataclasses.replace(checks[1], tensors=(first, WRONG))
    return dataclasses.replace(report(), checks=tuple(checks))


@pytest.mark.parametrize(
    ("now", "earlier", "wanted"),
    [
        (report(), report(), []),
        (changed(jax=4.4e-8), report(), []),
        (changed(jax=4.6e-8), report(), [(Kind.GREW, "y 3×5")]),
        (changed(jax=math.inf), report(), [(Kind.GREW, "y 3×5")]),
        (changed(jax=1e-9), report(), []),
        (changed(verdict=Verdict.BIASED), report(), [(Kind.WORSE, "y 3×5")]),
        (changed(verdict=Verdict.VACUOUS), report(), [(Kind.WORSE, "y 3×5")]),
        (report(), changed(verdict=Verdict.BIASED), []),
        (changed(name="z"), report(), [(Kind.GONE, "y 3×5"), (Kind.NEW, "z")]),
        (
            dataclasses.replace(report(), checks=report().checks[1:]),
            dataclasses.replace(report(), checks=report().checks[:-1]),
            [(Kind.GONE, ""), (Kind.NEW, "")],
        ),
    ],
)
def test_what_changed_for_the_worse_is_listed(now, earlier, wanted):
    found = differences(now, earlier)
    assert [(one.kind, one.tensor) for one in found] == wanted
    page, markdown = to_html(now, earlier), to_markdown(now, earlier)
    for one in found:
        assert one.tensor in page and f"- {one.kind}: {one.check}" in markdown
    assert ("No check came or went" in page) == (not wanted)
    assert ("nothing changed" in markdown) == (not wanted)


@pytest.mark.parametrize(
    ("now", "kind"),
    [
        (CheckResult("layer/peft float32", 1, error="ValueError"), Kind.WORSE),
        (CheckResult("layer/peft float32", 1, skipped="needs peft"), Kind.GONE),
        (CheckResult("layer/peft float32", 1), Kind.GONE),
    ],
)
def test_a_check_that_no_longer_compares_is_a_difference(now, kind):
    before = Report({}, (CheckResult(now.name, 1, (FINE,)),))
    assert [one.kind for one in differences(Report({}, (now,)), before)] == [kind]


# Trajectories


def test_the_chart_keeps_to_its_frame():
    found = chart(report().trajectories["AdamW, 40 steps"])
    assert found is not None
    for points in (found.line, found.band):
        for point in points.split():
            x, y = map(float, point.split(","))
            assert found.left <= x <= found.right and found.top <= y <= found.bottom
    assert found.horizon is not None and found.horizon[1] == "25"
    heights = [float(point.split(",")[1]) for point in found.line.split()]
    assert heights == sorted(heights, reverse=True), "what grows goes up"
    assert [label for _, label in found.x_ticks] == ["10", "20", "30", "40"]


def test_the_band_is_drawn_with_the_factor_that_the_horizon_is_measured_with():
    line = {"distance": [1e-8] * 3, "band": [1e-8] * 3}
    plain, wide = chart(line), chart({**line, "factor": 4.0})
    assert plain is not None and wide is not None and plain.band != wide.band
    page = to_html(
        Report({}, (), {"demo": {**line, "factor": 4.0, "verdict": "VACUOUS", "why": "no"}})
    )
    assert "noise of one framework, times 4" in page and "○ VACUOUS" in page


@settings(max_examples=60, deadline=None, derandomize=True)
@given(trajectories)
def test_the_chart_takes_any_numbers(trajectory):
    found = chart(trajectory)
    positive = [value for value in trajectory["distance"] if 0 < value < math.inf]
    assert (found is None) == (not positive)


@pytest.mark.parametrize("ratio", [0.0, 1e-9, 0.994, 9.999, 99.96, 999.9, 1e300])
def test_a_ratio_fits_its_cell(ratio):
    assert len(ratio_text(ratio)) <= 6


# In a browser

WIDTH = """
const root = document.documentElement;
note("inner", innerWidth);
note("width", Math.max(root.scrollWidth, document.body.scrollWidth));
"""
PROBE = f"""{WIDTH}
note("ready", root.dataset.ready);
note("title", document.title);
const rows = () => [...document.querySelectorAll("tr.check")].filter((row) => !row.hidden).length;
document.querySelector(".cell.MISMATCH").click();
note("dialog", document.getElementById("figures").open);
const cells = [...document.querySelectorAll("#figures-body td")];
note("details", cells.map((one) => one.textContent).join(";"));
document.getElementById("close").click();
note("closed", !document.getElementById("figures").open);
document.getElementById("failing").click();
note("failing", rows());
document.getElementById("search").value = "adamw";
document.getElementById("search").dispatchEvent(new Event("input"));
note("found", rows());
"""


@pytest.fixture(scope="module")
def phone(tmp_path_factory):
    """The page on a phone, with a script that uses it and notes what happens."""
    folder = tmp_path_factory.mktemp("page")
    return browser.opened(to_html(report(), report()), PROBE, folder, width=390)


@browser.needed
def test_the_page_runs_without_a_word_on_the_console(phone):
    assert phone.console == []
    assert phone.notes["ready"] == "5" and phone.notes["title"] == "Parity: MISMATCH"


@browser.needed
def test_a_phone_scrolls_only_inside_the_tables(phone):
    assert phone.notes["inner"] == phone.notes["width"] == "390"


@browser.needed
def test_a_cell_opens_the_figures_of_its_tensors(phone):
    assert phone.notes["dialog"] == phone.notes["closed"] == "true"
    said = phone.notes["details"].split(";")
    assert said[:4] == ["dA 3×5", "✕ MISMATCH", "1.00e+00", "2.00e-08"]
    assert said[9:11] == ["3 × 5", "float32"]
    assert ";".join(said[11:]) == HOSTILE


@browser.needed
def test_checks_can_be_filtered(phone):
    assert (phone.notes["failing"], phone.notes["found"]) == ("3", "1")


@browser.needed
def test_a_broken_page_would_be_seen(tmp_path):
    planted = '<div style="width:900px">wide</div><script>missing()</script><header>'
    page = to_html(report()).replace("<header>", planted)
    found = browser.opened(page, WIDTH, tmp_path, width=390)
    assert len(found.console) == 1 and "missing is not defined" in found.console[0]
    assert int(found.notes["width"]) > 390
