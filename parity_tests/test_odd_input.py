"""Every command over one table of odd inputs: one clear message, no traceback, at once."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import typing

import pytest

from lora_jax import cli
from lora_jax.cli import main
from parity_tests import tiny

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    here = tmp_path_factory.mktemp("made")
    tiny.save_model(here / "model", layers=1)
    tiny.save_run(here / "run", here / "model")
    tiny.save_adapter(here / "adapter", here / "run")
    tiny.save_table(here / "table.csv", n=40)
    (here / "modules.json").write_text('["encoder.layer.0.attention.self.query"]')
    return here


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    here = shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(here)
    monkeypatch.setenv("LORA_JAX_OFFLINE", "1")
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    return here


def is_clean(capsys, argv, codes=(1, 2)):
    """Hold what every refusal looks like; return the message."""
    code = main(argv)
    out, err = capsys.readouterr()
    assert code in codes, (argv, code, out[-300:], err[-300:])
    if code:
        lines = err.splitlines()
        assert err.startswith("lora-jax: ") and 1 <= len(lines) <= 5, (argv, err)
        assert max(map(len, lines)) < 2500, (argv, err[:300])
    assert "Traceback" not in err and "Error:" not in err, (argv, err)
    assert not CONTROL.search(out + err), (argv, out, err)
    return err


FT = ["finetune", "--model", "model", "--epochs", "1", "--max-length", "12"]

# Every place in the arguments where a path stands; X is that path.
PLACES = {
    "finetune --model": ["finetune", "--model", "X", "--data", "table.csv", "--output", "out"],
    "finetune --data": [*FT, "--output", "out", "--data", "X"],
    "finetune --output": [*FT, "--data", "table.csv", "--epochs", "0", "--output", "X"],
    "finetune --cache": ["finetune", "--output", "out", "--cache", "X"],
    "predict DIRECTORY": ["predict", "X", "win"],
    "predict --data": ["predict", "run", "--data", "X"],
    "predict --model": ["predict", "run", "win", "--model", "X"],
    "plan MODEL": ["plan", "X"],
    "plan --cache": ["plan", "minilm", "--cache", "X"],
    "inspect": ["inspect", "X"],
    "combine ADAPTER": ["combine", "out", "adapter", "X"],
    "diff ONE": ["diff", "X", "adapter"],
    "diff OTHER": ["diff", "adapter", "X"],
    "convert SOURCE": ["convert", "X", "out"],
    "convert --modules": ["convert", "adapter", "out", "--modules", "X"],
    "merge DIRECTORY": ["merge", "X", "out"],
    "merge MODEL": ["merge", "X", "adapter", "out"],
    "merge ADAPTER": ["merge", "model", "X", "out"],
    "merge --model": ["merge", "run", "out", "--model", "X"],
    "parity --against": ["parity", "--levels", "0", "--only", "nothing", "--against", "X"],
    "parity --inputs": ["parity", "--jax", "math:sqrt", "--torch", "math:sqrt", "--inputs", "X"],
}

# Places where a result goes.
TARGETS = {
    "combine OUT": ["combine", "X", "adapter", "adapter"],
    "convert OUT": ["convert", "adapter", "X"],
    "merge OUT of a run": ["merge", "run", "X"],
    "merge OUT of files": ["merge", "model", "adapter", "X"],
    "parity --output": ["parity", "--levels", "0", "--only", "layer*", "--output", "X"],
}

PATHS = {
    "a name of 300 characters": "a" * 300,
    "a link in a circle": "circle",
    "a path below a file": "table.csv/x",
    "a name that is no UTF-8": "\udcff",
    "a name with an escape": "\x1b[2J\x07\nx\u202e",
    "a pipe": "pipe",
    "a device": "device",
    "somebody who is not": "~nosuchuser/x",
    "a path of 5000 characters": "a/" * 2500,
}


def odd_paths(here):
    (here / "circle").symlink_to("circle")
    (here / "device").symlink_to("/dev/zero")
    os.mkfifo(here / "pipe")


def test_every_command_refuses_every_odd_path(here, capsys):
    odd_paths(here)
    for argv in PLACES.values():
        for path in PATHS.values():
            is_clean(capsys, [path if arg == "X" else arg for arg in argv])


UNWRITABLE = ("a name of 300 characters", "a link in a circle", "a path below a file", "a pipe")


def test_every_command_refuses_to_write_to_an_odd_path(here, capsys):
    odd_paths(here)
    before = sorted(here.iterdir())
    for argv in TARGETS.values():
        for name in (*UNWRITABLE, "a device", "a path of 5000 characters"):
            is_clean(capsys, [PATHS[name] if arg == "X" else arg for arg in argv])
    assert sorted(here.iterdir()) == before


DEEP = "[" * 100_000 + "]" * 100_000
CONTENTS = {
    "deep": DEEP,
    "a deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a deep field": '{"weight_map": %s, "classes": %s, "architectures": %s}' % ((DEEP,) * 3),
    "a list": "[]",
    "null": "null",
    "a number": "1e999",
    "a long number": "9" * 5000,
    "cut off": '{"a": 1',
    "nothing": "",
    "no UTF-8": b"\xff\xfe{}",
    "a control character": '{"\x1b[2J": "\x07',
    "zeros": b"\0" * 1000,
}

# Every file that a command reads as JSON.
JSONS = {
    "model/config.json": [["plan", "model"], [*FT, "--data", "table.csv", "--output", "out"]],
    "model/model.safetensors.index.json": [["merge", "model", "adapter", "out"]],
    "model/tokenizer.json": [["predict", "run", "win", "--model", "model"]],
    "adapter/adapter_config.json": [
        ["inspect", "adapter"],
        ["convert", "adapter", "out"],
        ["diff", "adapter", "adapter"],
        ["combine", "out", "adapter", "adapter"],
        ["merge", "model", "adapter", "out"],
    ],
    "run/run.json": [["predict", "run", "win"], ["merge", "run", "out"]],
    "modules.json": [["convert", "adapter", "out", "--modules", "modules.json"]],
    "report.json": [["parity", "--levels", "0", "--against", "report.json"]],
    "table.jsonl": [
        [*FT, "--data", "table.jsonl", "--output", "out"],
        ["predict", "run", "--data", "table.jsonl"],
    ],
}


def test_every_json_file_may_hold_anything(here, capsys):
    for name, commands in JSONS.items():
        path = here / name
        good = path.read_bytes() if path.exists() else None
        for content in CONTENTS.values():
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            for argv in commands:
                is_clean(capsys, argv)
        path.unlink() if good is None else path.write_bytes(good)
    assert not (here / "out").exists() or not any((here / "out").iterdir())


VALUES = (0, -1, 10**30, 1.5, "1e999", "x\x1b[2J\n", None, [], {}, True, ["\x1b[31m"], "a" * 10**6)


def test_every_field_may_hold_anything(here, capsys):
    """What is refused is refused in few words; what is taken gives a result."""
    files = {
        "run/run.json": ["predict", "run", "win"],
        "model/config.json": ["plan", "model"],
        "adapter/adapter_config.json": ["inspect", "adapter"],
    }
    for name, argv in files.items():
        path = here / name
        good = path.read_bytes()
        for field in json.loads(good):
            for value in VALUES:
                text = json.dumps(json.loads(good) | {field: value}).replace('"1e999"', "1e999")
                path.write_text(text)
                is_clean(capsys, argv, codes=(0, 1, 2))
        path.write_bytes(good)


# Options whose absurd values mean something: never stop early, use all texts, the other sign.
HARMLESS = {
    ("finetune", "limit"),
    ("finetune", "patience"),
    ("combine", "weights"),
    ("plan", "lora_alpha"),
    ("convert", "lora_alpha"),
}
ABSURD = ("1" + "0" * 30, "-1" + "0" * 30, "1" + "0" * 400, "nan", "-1e400", "9" * 5000, "x", "")

BASES = {
    "finetune": [*FT, "--data", "table.csv", "--output", "out"],
    "predict": ["predict", "run", "win"],
    "plan": ["plan", "model"],
    "combine": ["combine", "out", "adapter", "adapter", "--type", "dare_linear"],
    "convert": ["convert", "adapter", "out"],
    "parity": ["parity", "--only", "nothing"],
}


def numbers(options):
    """The options of a command that are numbers."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        if kinds & {int, float} and bool not in kinds:
            yield field.name


def test_every_number_has_limits(here, capsys):
    commands = {re.sub("Options$", "", kind.__name__).lower(): kind for kind in cli._COMMANDS}
    walked = 0
    for name, base in BASES.items():
        for option in numbers(commands[name]):
            for value in ABSURD:
                flag = f"--{option.replace('_', '-')}={value}"
                if (name, option) not in HARMLESS or not value[1:].isdigit():
                    said = is_clean(capsys, [*base, flag])
                    assert option in said or option.replace("_", "-") in said, (flag, said)
                    walked += 1
    assert walked > 100
    assert not (here / "out").exists() or not any((here / "out").iterdir())
