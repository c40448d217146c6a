"""Memory follows what is given: a table takes a small multiple, absurd options and errors nothing.

Each command runs in a process of its own, which reads its peak, less that of a command without.
"""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from lora_jax.train.reading import LONGEST_LINE, read_table
from lora_jax.train.texts import Texts, first_rows, taken
from parity_tests.cli import measured
from parity_tests.cli.measured import MIB
from parity_tests.models import tiny

WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()

# Times the size of a table with lines of 60 bytes. With a Python object for each row it was 4.
MOST = 3.0
SPARE = 4 * MIB

FINETUNE = ["finetune", "--output", "out", "--model"]


def lines(size, form):
    rng, written, row = random.Random(0), 0, 0
    while written < size:
        line = form(row, f"{row} {' '.join(rng.choices(WORDS, k=8))}", "ab"[row % 2])
        written, row = written + len(line), row + 1
        yield line


FORMS = {
    ".csv": ("text,label\n", lambda row, text, label: f"{text},{label}\n"),
    ".tsv": ("text\tlabel\n", lambda row, text, label: f"{text}\t{label}\n"),
    ".jsonl": ("", lambda row, text, label: json.dumps({"text": text, "label": label}) + "\n"),
}


def save_table(path, size):
    head, form = FORMS[path.suffix]
    with path.open("w") as file:
        file.write(head)
        file.writelines(lines(size, form))
    return path.stat().st_size


@pytest.mark.parametrize(
    ("suffix", "size"),
    [
        (".csv", 12 * MIB),
        *(pytest.param(suffix, 50 * MIB, marks=pytest.mark.slow) for suffix in FORMS),
    ],
)
def test_a_table_takes_a_small_multiple_of_its_size(suffix, size, tmp_path):
    """All that happens to it before the model is there: read, checked, made unique and split."""
    size = save_table(tmp_path / f"large{suffix}", size)
    save_table(tmp_path / f"small{suffix}", 1000)
    commands = {
        name: [*FINETUNE, "nowhere", "--data", f"{name}{suffix}"] for name in ("small", "large")
    }
    found = measured.run(commands, tmp_path)
    for one in found.values():
        assert one.code == 2 and "model: got 'nowhere'" in one.err, one.err
    assert found["large"].peak - found["small"].peak < MOST * size + SPARE


@pytest.mark.slow
def test_what_is_wrong_with_a_table_takes_no_more(tmp_path):
    size = 8 * MIB
    bad = {
        "labels.csv": ("text,label\n", "one,\n"),
        "fields.csv": ("text,label\n", "one,a,b\n"),
        "objects.jsonl": ("", "[1]\n"),
        "keys.jsonl": ("", '{"text": 1}\n'),
        "texts.jsonl": ("", '{"text": 1, "label": "a"}\n'),
    }
    for name, (head, line) in bad.items():
        (tmp_path / name).write_text(head + line * (size // len(line)))
    (tmp_path / "small.csv").write_text("text,label\none,\n")
    (tmp_path / "line.csv").write_text("text,label\n" + "x" * 20 * MIB)
    commands = {
        name: [*FINETUNE, "nowhere", "--data", name] for name in [*bad, "small.csv", "line.csv"]
    }
    found = measured.run(commands, tmp_path)
    least = found.pop("small.csv").peak
    for name, one in found.items():
        assert one.code == 2 and len(one.err) < 8000, (name, one.err[:400])
        # Of a line without an end as much is read as a line may have.
        most = 3 * LONGEST_LINE if name == "line.csv" else MOST * size + SPARE
        assert one.peak - least < most, (name, (one.peak - least) / size)
        if name != "line.csv":
            assert one.err.rstrip().endswith(" more"), (name, one.err[-400:])


OPTIONS = {
    "max_length": ["--max-length", "1000000"],
    "batch_size": ["--batch-size", "1000000"],
    "both": ["--batch-size", "1024", "--max-length", "1024"],
    "r": ["--r", "1000000000"],
    "limit": ["--limit", "5"],
    "epochs": ["--epochs", "1000000000"],
}


def test_absurd_options_are_refused_before_anything_of_their_size(tmp_path):
    tiny.save_model(tmp_path / "model", layers=1)
    tiny.save_run(tmp_path / "run", tmp_path / "model")
    tiny.save_table(tmp_path / "table.csv", n=40)
    base = [*FINETUNE, "model", "--data", "table.csv"]
    commands = {name: [*base, *more] for name, more in OPTIONS.items()}
    commands |= {"nothing": [*base, "--epochs", "0"]}
    for length in (10**6, 10**12):
        tiny.edit_json(tmp_path / "run/run.json", max_length=length)
        (tmp_path / f"run{length}").mkdir()
        for path in (tmp_path / "run").iterdir():
            (tmp_path / f"run{length}" / path.name).write_bytes(path.read_bytes())
        commands[f"run{length}"] = ["predict", f"run{length}", "win"]
    found = measured.run(commands, tmp_path)
    least = found["nothing"].peak
    for name, one in found.items():
        assert one.code == 2 and len(one.err) < 2000, (name, one.code, one.err[:400])
        assert one.peak - least < 6 * SPARE and one.seconds < 10, (name, one.peak - least)


TEXTS = ["a", "", "é", "\ud800", "a", "long " * 50, "", "b"]


def test_texts_in_one_array_are_those_that_were_given():
    texts = Texts.of(TEXTS)
    assert len(texts) == 8 and list(texts) == TEXTS == [texts[n] for n in range(8)]
    assert texts == TEXTS and texts == tuple(TEXTS) and texts != TEXTS[:-1] and texts != "a"
    assert texts[-1] == "b" and texts[1:3] == TEXTS[1:3] and isinstance(texts[1:3], Texts)
    rows = np.array([7, 0, 0])
    assert taken(texts, rows) == taken(TEXTS, rows) == ("b", "a", "a")
    assert taken(texts, rows).content is texts.content
    for given in (texts, TEXTS, texts[:0], []):
        wanted = [list(given).index(one) for one in given]
        np.testing.assert_array_equal(first_rows(given), wanted)


def test_a_table_is_read_into_one_array(tmp_path):
    tiny.save_table(tmp_path / "table.csv", n=40)
    data = read_table(tmp_path / "table.csv")
    assert isinstance(data.texts, Texts) and data.texts == [text for text, _ in tiny.texts(40)]
