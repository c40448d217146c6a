"""What a message says is what is wrong, and what it advises is there to be done."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import numpy as np
import pytest

from lora_jax.cli.main import main
from lora_jax.core.errors import DataError
from lora_jax.train import finetune
from lora_jax.train.data import TextData
from lora_jax.train.reading import read_table
from parity_tests.cli import measured
from parity_tests.cli.test_odd_input import FT, here, made

__all__ = ["here", "made"]

TRAIN = [*FT, "--output", "out", "--data"]


def said(capsys, argv, code=2):
    assert main(argv) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return " ".join((err if code else out).split())


def save(path, rows):
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))


def test_too_few_different_texts_say_how_many_there_are_and_what_to_do(here, capsys):
    save(here / "t.csv", [("win", "a"), ("home", "b")] * 20)
    message = said(capsys, [*TRAIN, "t.csv"])
    assert "got 40 rows with 2 different texts, wanted at least 10" in message
    assert message.endswith("add rows") and "fractions" not in message
    rows = [(f"win {n}", "a") for n in range(30)] + [("home", "b"), ("lunch", "b")]
    save(here / "t.csv", rows)
    message = said(capsys, [*TRAIN, "t.csv", "--balance", "yes"])
    assert "got 32 rows with 32 different texts, 4 of them in classes of one size" in message


def noted(path):
    """What is noted on the way from a table to the parts for training, validation and test."""
    notes = []
    finetune._parts(finetune.FinetuneOptions(data=path), read_table(path), notes.append)
    return notes


def test_texts_with_several_labels_are_said(here):
    rows = [(f"win {n}", "a") for n in range(8)] + [(f"home {n}", "b") for n in range(8)]
    path = here / "t.csv"
    save(path, [*rows, ("win 1", "b"), ("home 1", "a"), ("home 1", "a"), ("win 2", "a")])
    assert noted(path) == ["texts with more than one label: 2; of each the first row counts"]
    save(path, [*rows, rows[0]])
    assert noted(path) == []


def test_a_long_field_is_not_blamed_on_quotes_alone(here, capsys):
    (here / "t.csv").write_text('text,label\n"short",a\n"' + "x" * 200_000 + '",a\n')
    message = said(capsys, [*TRAIN, "t.csv"])
    assert "line 3: got a field of more than 131,072 characters; shorten it" in message
    assert ".jsonl" in message and "double quotes" not in message
    fields = '{"text": "%s", "label": "%s"}\n'
    long = "x" * 200_000
    (here / "t.jsonl").write_text("".join(fields % (f"{long}{n}", n % 2) for n in range(12)))
    assert len(read_table(here / "t.jsonl").texts) == 12


@pytest.mark.parametrize("limit", [None, 12])
def test_a_class_that_is_not_in_training_names_no_option_that_was_not_given(limit):
    rows = [f"win {n}" for n in range(20)] + ["rare"]
    labels = [*(n % 2 for n in range(20)), 2]
    texts = TextData(rows, np.array(labels, np.int32), ("a", "b", "zzz"))
    lacking = 0
    for seed in range(20):
        options = finetune.FinetuneOptions(data=Path("t"), split_seed=seed, limit=limit)
        try:
            finetune._parts(options, texts, print)
        except DataError as error:
            lacking += 1
            assert re.search(r"the training part lacks a class; .*:\n  \w+: no text", str(error))
            assert ("limit" in str(error)) == (limit is not None)
    assert lacking


def test_target_modules_without_a_name_are_refused(here, capsys):
    wanted = "target_modules: got no name, wanted some, or all-linear"
    assert wanted in said(capsys, [*TRAIN, "table.csv", "--target-modules"])
    assert wanted in said(capsys, ["plan", "model", "--target-modules"])
    assert not (here / "out").exists()


MERGES = {"files": ["merge", "model", "adapter"], "run": ["merge", "run"]}


def test_merging_into_a_folder_that_cannot_be_renamed_writes_inside_it(here, capsys, monkeypatch):
    """A mount point is one: whatever renames or removes the folder itself fails as there."""
    for name, argv in MERGES.items():
        out = here / f"out of {name}"
        out.mkdir()
        inode = out.stat().st_ino

        def busy(do, out=out):
            def renamed(source, *rest, **more):
                if out in (here / source, *(here / one for one in rest)):
                    raise OSError(errno.EBUSY, "Device or resource busy", str(out))
                return do(source, *rest, **more)

            return renamed

        with monkeypatch.context() as patch:
            for call in ("rename", "replace", "rmdir"):
                patch.setattr(f"os.{call}", busy(getattr(__import__("os"), call)))
            assert main([*argv, out.name]) == 0, capsys.readouterr().err
        assert out.stat().st_ino == inode and (out / "model.safetensors").is_file()
        assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_merging_under_a_folder_that_may_not_be_written(here):
    """An existing folder that may be written is enough; a new one needs its parent."""
    for name in MERGES:
        (here / "parent" / name).mkdir(parents=True)
    (here / "parent").chmod(0o555)
    try:
        commands = {name: [*argv, f"parent/{name}"] for name, argv in MERGES.items()}
        commands |= {f"new {name}": [*argv, f"parent/new-{name}"] for name, argv in MERGES.items()}
        found = measured.run(commands, here, bound=True)
    finally:
        (here / "parent").chmod(0o777)
    for name in MERGES:
        assert found[name].code == 0, found[name].err
        assert (here / "parent" / name / "model.safetensors").is_file()
        wanted = rf"cannot write to parent/new-{name}: Permission denied. Choose another directory"
        assert found[f"new {name}"].code == 2 and re.search(wanted, found[f"new {name}"].err)
