"""What strangers' directories may hold: links out of them, pipes, devices, and JSON without end."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax import load_config
from lora_jax.cli.checkpoint import copy_others, read_checkpoint
from lora_jax.cli.main import main
from lora_jax.core.errors import AdapterError
from lora_jax.core.io import intake
from lora_jax.models import load_params, save_model
from lora_jax.peft import config_json
from parity_tests.models import tiny

SECRET = "SECRET"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture
def linked(model, tmp_path):
    """A model directory with links out of it, in a circle, to nowhere and within."""
    (tmp_path / "secret").write_text(SECRET)
    directory = shutil.copytree(model, tmp_path / "model")
    (directory / "notes").mkdir()
    (directory / "notes" / "own.txt").write_text("own")
    links = {
        "README.md": tmp_path / "secret",
        "vocab.txt": "../secret",
        "nowhere": "/no/such/file",
        "self": "self",
        "folder": tmp_path,
        "device": "/dev/zero",
        "within.txt": "notes/own.txt",
    }
    for name, target in links.items():
        (directory / name).symlink_to(target)
    os.mkfifo(directory / "pipe")
    return directory


OUTSIDE = ("README.md", "device", "folder", "nowhere", "pipe", "self", "vocab.txt")


def texts_in(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_merging_files_copies_regular_files_of_the_model_alone(linked, tmp_path):
    out = tmp_path / "out"
    left_out = copy_others(read_checkpoint(linked), out)
    assert left_out.elsewhere == OUTSIDE and left_out.old == ()
    names = {"config.json", "tokenizer.json", "notes", "notes/own.txt", "within.txt"}
    assert {str(p.relative_to(out)) for p in out.rglob("*")} == names
    assert (out / "within.txt").read_text() == "own" and not (out / "within.txt").is_symlink()
    [line] = left_out.lines()
    assert all(name in line for name in OUTSIDE)


def test_merging_a_run_copies_no_tokenizer_from_elsewhere(linked, tmp_path):
    said = []
    save_model(tmp_path / "out", load_params(linked), linked, note=said.append)
    assert SECRET.encode() not in b"".join(texts_in(tmp_path / "out").values())
    assert (tmp_path / "out/tokenizer.json").exists()
    [line] = said
    assert line.endswith(": vocab.txt")


def test_a_snapshot_of_the_hubs_cache_is_links_and_is_copied(model, tmp_path):
    blobs, snapshot = tmp_path / "models--u--m/blobs", tmp_path / "models--u--m/snapshots/abc"
    blobs.mkdir(parents=True)
    (snapshot / "deeper").mkdir(parents=True)
    for n, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / str(n))
        (snapshot / path.name).symlink_to(f"../../blobs/{n}")
    (snapshot / "deeper/config.json").symlink_to("../../../blobs/0")
    (tmp_path / "secret").write_text(SECRET)
    (blobs / "bad").symlink_to(tmp_path / "secret")
    (snapshot / "README.md").symlink_to("../../blobs/bad")
    assert copy_others(read_checkpoint(snapshot), tmp_path / "out").elsewhere == ("README.md",)
    assert (tmp_path / "out/deeper/config.json").read_bytes() == (blobs / "0").read_bytes()
    save_model(tmp_path / "whole", load_params(snapshot), snapshot)
    wanted = (model / "tokenizer.json").read_bytes()
    assert (tmp_path / "whole/tokenizer.json").read_bytes() == wanted


REVISIONS = ("/abs/file", "../..", "a/../b", "", ".", "-x", "a//b", "a\x1b[2J", "a\nb", "x" * 300)


def test_a_revision_is_a_name_not_a_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    class Asked(BaseException):
        pass

    def never(*args, **kwargs):
        raise Asked

    monkeypatch.setattr("huggingface_hub.hf_hub_download", never)
    monkeypatch.setattr("lora_jax.core.io.hub_endpoint.probe", never)
    for revision in REVISIONS:
        with pytest.raises(AdapterError, match="revision: got .* wanted a branch"):
            load_config(f"u/r@{revision}")
    for revision in ("main", "v1.0", "refs/pr/3", "a" * 40):
        with pytest.raises(Asked):
            load_config(f"u/r@{revision}")


def special(path, kind):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    key = "base_model.model.encoder.layer.0.attention.self.query"
    halves = {"lora_A": np.ones((2, 24), np.float32), "lora_B": np.ones((24, 2), np.float32)}
    tensors = {f"{key}.{name}.weight": value for name, value in halves.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def test_pipes_devices_and_folders_in_the_place_of_a_file_are_refused(
    model, adapter, tmp_path, capsys
):
    """Were one read, this test would wait for ever or fill the memory."""
    commands = [
        ("a", "adapter_config.json", ["inspect", "a"]),
        ("a", "adapter_model.safetensors", ["inspect", "a"]),
        ("a", "adapter_model.safetensors", ["convert", "a", "o"]),
        ("a", "adapter_model.safetensors", ["diff", "a", "a"]),
        ("m", "config.json", ["plan", "m"]),
        ("m", "model.safetensors", ["plan", "m"]),
        ("m", "model.safetensors", ["merge", "m", "a", "o"]),
        ("m", "config.json", ["merge", "m", "a", "o"]),
        ("m", "model.safetensors.index.json", ["merge", "m", "a", "o"]),
        ("a", "run.json", ["predict", "a", "x"]),
        ("a", "run.json", ["merge", "a", "o"]),
        ("a", "t.csv", ["finetune", "--model", "m", "--data", "a/t.csv", "--output", "o"]),
        ("a", "t.json", ["convert", "a", "o", "--modules", "a/t.json"]),
        ("a", "t.json", ["parity", "--against", "a/t.json", "--levels", "0"]),
    ]
    kinds = {"pipe": "a named pipe", "device": "a device", "folder": "a directory"}
    for (where, name, argv), (kind, said) in ((c, k) for c in commands for k in kinds.items()):
        here = tmp_path / "here"
        shutil.copytree(adapter, here / "a")
        shutil.copytree(model, here / "m")
        special(here / where / name, kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(here)
            assert main(argv) == 2, argv
        captured = capsys.readouterr()
        assert f"Is {said}, wanted a regular file" in captured.err, (argv, captured.err)
        assert captured.err.count("\n") <= 2
        assert not (here / "o").exists() or not any((here / "o").iterdir())
        shutil.rmtree(here)


def test_a_file_may_only_be_so_long(tmp_path):
    (tmp_path / "long").write_bytes(b"12345")
    assert intake.read_bytes(tmp_path / "long", limit=5) == b"12345"
    with pytest.raises(OSError, match="more than the 4 bytes"):
        intake.read_bytes(tmp_path / "long", limit=4)


def test_json_of_too_many_values_is_not_parsed(monkeypatch):
    monkeypatch.setattr(intake, "MOST_VALUES", 5)
    assert intake.parse_json('[1, {"a": [2]}]') == intake.parse_json(b'[1, {"a": [2]}]')
    for parse in (intake.parse_json, config_json.parse):
        for text in (b"[1, 2, 3, 4, 5, 6]", b"[[[[[[]]]]]]"):
            with pytest.raises(ValueError, match="it holds more than 5 values"):
                parse(text)
