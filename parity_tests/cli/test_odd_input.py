"""Every command over one table of odd inputs: one clear message, no traceback, at once."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import pytest

import lora_jax
from lora_jax.cli import main as cli
from lora_jax.cli.main import main
from parity_tests.cli.measured import frugal
from parity_tests.models import tiny

ROOT = Path(lora_jax.__file__).parent.parent
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
    """Hold what every refusal looks like, and what it takes; return the message."""
    with frugal(argv):
        code = main(argv)
    return is_clean_output(argv, code, *capsys.readouterr(), codes)


def is_clean_output(argv, code, out, err, codes=(1, 2)):
    assert code in codes, (argv, code, out[-300:], err[-300:])
    if code:
        # Notes about a download may stand before it.
        before, said, after = err.rpartition("lora-jax: ")
        lines = after.splitlines()
        assert said and "lora-jax: " not in before and 1 <= len(lines) <= 5, (argv, err)
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
    "parity --output": ["parity", "--levels", "0", "--only", "*", "--output", "X"],
}

PATHS = {
    "a name of 300 characters": "a" * 300,
    "a link in a circle": "circle",
    "a path below a file": "table.csv/x/y",
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
    "many values": b"[" + b"[]," * 6_000_000 + b"0]",
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
        # Of so many bytes none is on the disk.
        os.truncate(path, 1 << 40)
        for argv in commands:
            is_clean(capsys, argv)
        path.unlink() if good is None else path.write_bytes(good)
    assert not (here / "out").exists() or not any((here / "out").iterdir())


VALUES = (0, -1, 10**30, 1.5, "1e999", "x\x1b[2J\n", None, [], {}, True, ["\x1b[31m"], "a" * 10**6)


FIELDS = {
    "run/run.json": ["predict", "run", "win"],
    "model/config.json": ["plan", "model"],
    "adapter/adapter_config.json": ["inspect", "adapter"],
}


def walk_fields(here, capsys, every):
    for name, argv in FIELDS.items():
        path = here / name
        good = json.loads(path.read_bytes())
        # What a library of another name would do with it is not ours.
        for n, field in enumerate(sorted(good.keys() - {"model_type"})):
            for value in VALUES[n % every :: every]:
                text = json.dumps(good | {field: value}).replace('"1e999"', "1e999")
                path.write_text(text)
                is_clean(capsys, argv, codes=(0, 1, 2))
        path.write_text(json.dumps(good))


def test_every_field_may_hold_anything(here, capsys):
    """What is refused is refused in few words; what is taken gives a result."""
    walk_fields(here, capsys, every=6)


@pytest.mark.slow
def test_every_field_may_hold_all_of_it(here, capsys):
    walk_fields(here, capsys, every=1)


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


class Full(io.RawIOBase):
    """A disk without room."""

    def writable(self):
        return True

    def write(self, content):
        raise OSError(28, "No space left on device")


def streams():
    return {
        "full": io.TextIOWrapper(io.BufferedWriter(Full()), "utf-8"),
        "closed": None,
        "closed later": closed(),
    }


def closed():
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
    stream.close()
    return stream


SHOWING = {
    "predict": ["predict", "run", "win"],
    "predict --json": ["predict", "run", "win", "--json"],
    "inspect": ["inspect", "adapter"],
    "diff": ["diff", "adapter", "adapter"],
    "plan": ["plan", "model"],
    "--version": ["--version"],
}


def test_a_result_that_cannot_be_shown_is_said(here, capsys, monkeypatch):
    for name in ("full", "closed", "closed later"):
        for argv in SHOWING.values():
            stream = streams()[name]
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", stream)
                assert main(argv) == 2
            err = capsys.readouterr().err
            assert err.startswith("lora-jax: the result cannot be") and err.count("\n") == 1, err
            if name == "full":
                assert "No space left on device" in err
                stream.buffer.raw.write = lambda content: len(content)  # let it close


def test_a_full_disk_ends_the_process_with_one_line(here):
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-m", "lora_jax.cli", "--version"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        run = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert "No space left on device" in run.stderr


def test_an_ascii_terminal_shows_what_it_can(here, monkeypatch):
    for encoding in ("ascii", "latin-1", "utf-8"):
        for argv in (["predict", "run", "é →"], ["predict", "run", "é →", "--json"]):
            content = io.BytesIO()
            stream = io.TextIOWrapper(content, encoding)
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", stream)
                assert main(argv) == 0
            shown = content.getvalue().decode(encoding)
            if "--json" in argv:
                assert json.loads(shown)["text"] == "é →"
            else:
                wanted = {"ascii": r"\xe9 \u2192", "latin-1": r"é \u2192", "utf-8": "é →"}
                assert shown.rstrip("\n").split("\t")[2] == wanted[encoding]


def test_a_text_that_is_no_unicode_is_refused(here, capsys):
    assert "text 2: got" in is_clean(capsys, ["predict", "run", "win", "\udcff"])
    (here / "t.jsonl").write_text(
        '{"text": "a", "label": "\\ud800"}\n{"text": "b", "label": "c"}\n'
    )
    said = is_clean(capsys, [*FT, "--data", "t.jsonl", "--output", "out"])
    assert "line 1: got '\\ud800' as label" in said


ESCAPES = "\x1b[31mred\x07\x9b\u202eb\nc\td"


def test_nothing_obeys_a_control_character_of_a_name(here, capsys):
    """Labels, texts, names and configurations are shown escaped; JSON stays JSON."""
    tiny.edit_json(here / "run/run.json", classes=[ESCAPES, "\x1b]0;title\x07"])
    config = here / "adapter/adapter_config.json"
    more = {"base_model_name_or_path": ESCAPES, "task_type": ESCAPES}
    tiny.edit_json(config, **more)
    shutil.copytree(here / "adapter", here / "other")
    tiny.edit_json(here / "other/adapter_config.json", base_model_name_or_path="x" + ESCAPES)
    shown = {
        "predict": ["predict", "run", ESCAPES],
        "inspect": ["inspect", "adapter"],
        "diff": ["diff", "adapter", "other"],
        "combine": ["combine", "combined", "adapter", "other"],
        "table": ["predict", "run", "--data", ESCAPES],
    }
    for name, argv in shown.items():
        code = main(argv)
        out, err = capsys.readouterr()
        assert not CONTROL.search(out + err), (name, out, err)
        assert (code == 0) == (name != "table") and (r"\x1b" in out + err)
        if name == "predict":
            assert len(out.splitlines()) == 1 and len(out.split("\t")) == 3
            assert out.split("\t")[0] in (r"\x1b[31mred\x07\x9b\u202eb\nc\td", r"\x1b]0;title\x07")
        if name == "inspect":
            assert not [line for line in out.splitlines() if line.startswith("c")]
    assert main(["predict", "run", ESCAPES, "--json"]) == 0
    out = capsys.readouterr().out
    assert not CONTROL.search(out) and json.loads(out)["text"] == ESCAPES
    with pytest.warns(UserWarning, match=r"\\x1b|new"):
        tiny.edit_json(config, **{"\x1b[2Jnew": 1})
        main(["inspect", "adapter"])


def test_a_warning_is_a_line_of_the_command(here, capsys, monkeypatch):
    config = here / "adapter/adapter_config.json"
    tiny.edit_json(config, **{"\x1b[2Jnew": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("default")

        # As Python does where nobody records them.
        def shown(*given, **_):
            sys.stderr.write(warnings.formatwarning(*given[:4]))

        monkeypatch.setattr(warnings, "showwarning", shown)
        assert main(["inspect", "adapter"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("lora-jax: warning: ") and r"\x1b[2Jnew" in err
    assert not CONTROL.search(err)


def test_a_configuration_of_more_layers_than_the_file_is_not_traced(here, capsys, monkeypatch):
    def traced(*args):
        raise AssertionError("the model was traced")

    tiny.edit_json(here / "model/config.json", num_hidden_layers=3000)
    monkeypatch.setattr("lora_jax.models.huggingface._template", traced)
    for argv in (["plan", "model"], ["predict", "run", "win", "--model", "model"]):
        assert "num_hidden_layers: got 3,000, the file has 1" in is_clean(capsys, argv)
