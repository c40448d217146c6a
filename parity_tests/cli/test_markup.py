"""What strangers call things reaches cards and reports as text: no markup, no control character."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from markdown_it import MarkdownIt

from lora_jax import LoraConfig, model_card
from lora_jax.parity import Verdict
from lora_jax.parity.reports.checks import CheckResult
from lora_jax.parity.reports.markdown import to_markdown
from lora_jax.parity.reports.page import to_html
from lora_jax.parity.reports.report import Report
from lora_jax.parity.verdicts import TensorVerdict
from parity_tests.cli.test_odd_input import CONTROL

HOSTILE = (
    "<script>alert(1)</script>",
    "a|b|c",
    "`x` ```y",
    "one\n\n# two\n```\n| three |",
    "\x1b[2J\x07\x9b\u202e",
    "[a](javascript:alert(1)) ![b](http://x/y.png) <img src=x onerror=alert(1)>",
    "</td></table><b>&lt;",
    '" onmouseover="alert(1)" x=\'',
)
EVERYTHING = "".join(HOSTILE)

RENDER = MarkdownIt("commonmark", {"html": True}).enable("table")
SAID = {"h1", "h2", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"}


class Seen(HTMLParser):
    """The elements of a page, its attributes, and the cells of each row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.rows, self.text = [], set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.rows += [0] if tag == "tr" else []
        if tag in ("td", "th"):
            self.rows[-1] += 1

    def handle_data(self, data):
        self.text += data


def seen(markdown):
    """What a reader of Markdown makes of a text, the lines before it left out."""
    assert not CONTROL.search(markdown)
    return Seen(RENDER.render(re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)))


def card_of(text):
    return model_card(
        LoraConfig(
            target_modules=["q", text], modules_to_save=[text], rank_pattern={"x": 3}, use_dora=True
        ),
        "me/ours",
        base_model=text,
        task_type=text,
    )


def test_a_card_shows_names_as_they_are():
    plain = seen(card_of("plain"))
    for text in (*HOSTILE, EVERYTHING):
        page = seen(card_of(text))
        assert page.tags == plain.tags and page.rows == plain.rows, text
        assert page.attributes <= {"class"} and set(page.tags) <= SAID


def report_of(text):
    tensors = (
        TensorVerdict(text, Verdict.EXACT),
        TensorVerdict(text, Verdict.MISMATCH, 1.0, 0.5, 0.1, why=text, shape=(2,), dtype=text),
    )
    checks = (
        CheckResult(text, 0, tensors, 1.0),
        CheckResult(f"{text} again", 1, error=text),
        CheckResult(f"{text} not", 1, skipped=text),
    )
    return Report({"seed": 0, "cpu": text, text: text, "packages": {"jax": text}}, checks)


def test_a_report_in_markdown_shows_names_as_they_are():
    earlier = report_of("earlier")
    plain = seen(to_markdown(report_of("plain"), earlier))
    for text in (*HOSTILE, EVERYTHING):
        page = seen(to_markdown(report_of(text), earlier))
        assert page.tags == plain.tags and page.rows == plain.rows, text
        assert not page.attributes


def test_a_report_in_html_shows_names_as_they_are():
    earlier = report_of("earlier")
    plain = Seen(to_html(report_of("plain"), earlier))
    for text in (*HOSTILE, EVERYTHING):
        page = to_html(report_of(text), earlier)
        assert not CONTROL.search(page), (text, CONTROL.search(page))
        found = Seen(page)
        # Long names may break at a slash.
        assert [t for t in found.tags if t != "wbr"] == [t for t in plain.tags if t != "wbr"], text
        assert found.attributes == plain.attributes and found.rows == plain.rows
