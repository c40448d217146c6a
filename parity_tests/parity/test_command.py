"""``lora-jax parity``: the suite and a user's own pair, their reports, and the exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.cli import parity as command
from lora_jax.cli.main import main
from lora_jax.parity import mutants, suite
from lora_jax.parity.mutants import common_tests
from lora_jax.parity.mutants.gate import Mutant, gate_checks
from lora_jax.parity.reports.checks import Check
from lora_jax.parity.reports.report import from_json
from lora_jax.parity.verdicts import TensorVerdict, Verdict

FILES = ["report.html", "report.json", "report.md"]

PAIR = """
import jax.numpy as jnp
import numpy as np
import torch
from lora_jax.parity import To

number = 3
mapping = {"params.w": To("weight", axes=(1, 0))}
module = torch.nn.Linear(4, 3, bias=False)

def ours(params, x):
    return jnp.tanh(x @ params["w"])

def theirs(weight, x):
    return torch.tanh(torch.nn.functional.linear(x, weight))

def scaled(weight, x):
    return torch.tanh(1.001 * torch.nn.functional.linear(x, weight))

def linear(params, input):
    return input @ params["w"]

def broken(params, x):
    raise RuntimeError("out of cheese")

def make():
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype("float32")
    return {"params": {"w": draw(4, 3)}, "x": draw(5, 4)}

def make_list():
    return [1]
"""
NAMES = ("--jax", "mine:ours", "--torch", "mine:theirs", "--mapping", "mine:mapping")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with the user's module, in which the command runs."""
    (tmp_path / "mine.py").write_text(PAIR)
    (tmp_path / "broken_import.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    # Each test has a module of its own.
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield tmp_path
    sys.modules.pop("mine", None)


def arrays():
    rng = np.random.default_rng(0)
    shapes = {"params.w": (4, 3), "x": (5, 4)}
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def run(*argv):
    return main(["parity", *map(str, argv)])


# The user's pair


def npz(here):
    np.savez(here / "inputs.npz", **arrays())
    return "inputs.npz"


def safetensors(here):
    save_file(arrays(), here / "inputs.safetensors")
    return "inputs.safetensors"


def function(here):
    return "mine:make"


@pytest.mark.parametrize("kind", [npz, safetensors, function])
def test_a_pair_that_agrees_ends_with_0(kind, here, capsys):
    assert run(*NAMES, "--inputs", kind(here)) == 0
    table = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1] for line in table.splitlines()[2:5]}
    assert list(rows) == ["y", "dparams.w", "dx"]
    assert set(rows.values()) <= {"EXACT", "ORDER-ONLY"}
    assert not (here / "runs").exists(), "a pair writes nothing unless asked to"


def test_a_pair_that_differs_ends_with_1_and_names_the_tensors(here, capsys):
    argv = [word.replace("theirs", "scaled") for word in NAMES]
    assert run(*argv, "--inputs", npz(here)) == 1
    said = capsys.readouterr().out
    assert "The worst verdict is MISMATCH" in said
    for tensor in ("y", "dparams.w", "dx"):
        assert re.search(rf"{tensor}: MISMATCH.*in float64 jax and torch differ by", said)


def test_a_module_is_a_pair_too_and_its_report_is_written(here, capsys):
    weight, x = arrays().values()
    np.savez(here / "inputs.npz", **{"params.w": weight, "input": x})
    argv = ["--jax", "mine:linear", "--torch", "mine:module", "--mapping", "mine:mapping"]
    assert run(*argv, "--inputs", "inputs.npz", "--output", "out", "--seed", 7) == 0
    assert sorted(path.name for path in (here / "out").iterdir()) == FILES
    report = from_json((here / "out/report.json").read_text())
    assert report.environment["seed"] == 7 and len(report.checks[0].tensors) == 3
    assert "A pair of your own" in (here / "out/report.html").read_text()


GOOD = {"--jax": "mine:ours", "--torch": "mine:theirs", "--inputs": "mine:make"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--jax": "nowhere:ours"}, "--jax: module not found: nowhere"),
        ({"--jax": "mine.deeper:ours"}, "--jax: module not found: mine.deeper"),
        ({"--jax": "mine:our"}, "mine has no our; close names: ours"),
        ({"--torch": "mine:number"}, "--torch: mine:number is not callable but int"),
        ({"--torch": "mine"}, "--torch: got 'mine', wanted pkg.mod:name"),
        ({"--jax": "broken_import:f"}, "--jax: importing broken_import failed: ZeroDivisionError"),
        ({"--jax": "mine:broken"}, "RuntimeError: out of cheese"),
        ({"--inputs": None}, "--inputs: missing"),
        ({"--jax": None, "--torch": None}, "--torch: missing"),
        ({"--inputs": "gone.npz"}, "--inputs: cannot read gone.npz"),
        ({"--inputs": "gone.safetensors"}, "--inputs: cannot read gone.safetensors"),
        ({"--inputs": "mine.py"}, "wanted .npz, .safetensors or pkg.mod:make"),
        ({"--inputs": "mine:make_list"}, "mine:make_list gave list, wanted a dict of arrays"),
        ({"--mapping": "mine:mapped"}, "--mapping: mine has no mapped"),
        ({"--oracle": "mine:number"}, "--oracle: mine:number is not callable"),
        ({"--levels": "1"}, "--levels: of the suite"),
        ({"--against": "gone.json"}, "cannot read gone.json"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what(changed, said, here, capsys):
    argv = [word for pair in (GOOD | changed).items() if pair[1] is not None for word in pair]
    assert run(*argv) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "install"), [("torch", "torch"), ("jinja2", "report")])
def test_a_missing_package_is_named_with_its_command(name, install, here, capsys, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda one, *more: None if one == name else known(one, *more)
    )
    assert run("--output", "out") == 2
    assert f'{name}: pip install "lora_jax[{install}]"' in capsys.readouterr().err
    assert not (here / "out").exists()


# The suite

FINE = TensorVerdict("y", Verdict.ORDER_ONLY, 2e-8, 2e-8, 1e-6, shape=(2, 3), dtype="float32")


def gives(name, level, **fields):
    found = dataclasses.replace(FINE, **fields)
    return Check(name, level, lambda seed: [found])


@pytest.fixture
def small(monkeypatch):
    """A suite that needs no time."""

    def put(*checks):
        monkeypatch.setattr(suite, "CHECKS", checks)

    put(*(gives(f"layer{n}/float32", n % 3) for n in range(30)))
    return put


def test_one_check_of_the_real_suite_runs(here, capsys):
    assert run("--levels", "0", "--only", "rewriter/reference exact float32*") == 0
    said = capsys.readouterr().out
    assert "The worst verdict is EXACT: the 1 check that ran holds." in said
    assert f"the report is in {Path('runs/parity/report.html')}" in said
    assert sorted(path.name for path in (here / "runs/parity").iterdir()) == FILES


@pytest.mark.parametrize("verdict", Verdict)
def test_the_exit_code_is_the_worst_verdicts(verdict, here, small, capsys):
    small(gives("one", 1), gives("two", 1, verdict=verdict, why="planted"))
    wanted = 0 if verdict in (Verdict.EXACT, Verdict.ORDER_ONLY) else 1
    assert run() == wanted
    assert ("two: y: " in capsys.readouterr().out) == bool(wanted)


def test_a_check_that_raises_or_a_suite_that_is_skipped_is_no_success(here, small, capsys):
    small(Check("raises", 1, lambda seed: [1 / 0]))
    assert run() == 1
    assert "raises: ZeroDivisionError" in capsys.readouterr().out
    small(Check("skipped", 1, lambda seed: [], needs=("no_such_package",)))
    assert run("--overwrite") == 1
    assert "No check ran" in capsys.readouterr().out


def test_levels_and_names_choose_the_checks(here, small, capsys):
    assert run("--levels", "0,2", "--only", "layer1*") == 0
    names = [check.name for check in from_json(Path("runs/parity/report.json").read_text()).checks]
    assert names == [f"layer{n}/float32" for n in (11, 12, 14, 15, 17, 18)]
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"\d of 6 checks  \d+:\d\d left", line) for line in lines)


@pytest.mark.parametrize(("levels", "drawn"), [("4", ["AdamW"]), ("1", [])])
def test_trajectories_are_drawn_beside_level_4(levels, drawn, here, small, monkeypatch):
    found = SimpleNamespace(to_dict=lambda: {"distance": [1e-7], "band": [2e-7], "horizon": None})
    monkeypatch.setattr(suite, "TRAJECTORIES", {"AdamW": lambda seed: found})
    small(gives("layer", 1), gives("AdamW/trajectory", 4))
    assert run("--levels", levels) == 0
    report = from_json(Path("runs/parity/report.json").read_text())
    assert list(report.trajectories) == drawn
    assert ("<svg" in Path("runs/parity/report.html").read_text()) == bool(drawn)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--levels", "1,7,x"], "levels are 0, 1, 2, 3, 4, 5, 6:\n  got '7'\n  got 'x'"),
        (["--only", "layer1/flaot32"], "no check is left; there are for example layer"),
        (["--against", "mine.py"], "not a parity report"),
    ],
)
def test_wrong_choices_end_with_2(argv, said, here, small, capsys):
    assert run(*argv) == 2
    assert said in capsys.readouterr().err
    assert not (here / "runs").exists()


@pytest.mark.parametrize("found", [True, False])
def test_planted_bugs_are_in_the_report_and_in_the_exit_code(
    found, here, small, capsys, monkeypatch
):
    real = next(one for one in mutants.MUTANTS if one.name == "scale squared")
    none = Mutant("nothing", "does nothing", contextlib.nullcontext)
    same = dataclasses.replace(none, name="the same", equivalent="it changes nothing")
    planted = (real, same) if found else (real, same, none)
    monkeypatch.setattr(mutants, "MUTANTS", planted)
    monkeypatch.setattr(command, "gate_checks", lambda: gate_checks()[:1])
    monkeypatch.setattr(common_tests, "common_tests", lambda: lambda: {"loss curve": False})
    assert run("--mutants") == (0 if found else 1)
    said = capsys.readouterr()
    assert f"Of {len(planted) - 1} planted bugs 1 are found." in said.out
    assert ("nothing: planted and not found" in said.out) == (not found)
    assert "scale squared: LoRADense/reference exact float32" in said.err
    kills = from_json(Path("runs/parity/report.json").read_text()).kills
    assert kills["scale squared"] == {"loss curve": False, "this suite": True}
    assert "the same" not in kills and ("nothing" in kills) == (not found)
    assert "scale squared" in Path("runs/parity/report.html").read_text()


def test_a_directory_of_the_users_is_never_cleared(here, small, capsys):
    out = here / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "report.md").write_text("mine")
    assert run("--output", out) == 2
    assert (out / "report.md").read_text() == "mine" and "--overwrite" in capsys.readouterr().err
    assert run("--output", out, "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", *FILES]


def test_an_earlier_report_is_compared_with(here, small, capsys):
    small(gives("stays", 1), gives("grows", 1), gives("worsens", 1), gives("goes", 1))
    assert run() == 0
    earlier = "runs/parity/report.json"
    assert run("--output", "same", "--against", earlier) == 0
    assert "since the earlier report:\nnothing changed" in capsys.readouterr().out
    changed = gives("grows", 1, jax=4e-8), gives("worsens", 1, verdict=Verdict.BIASED)
    small(gives("stays", 1), *changed, gives("comes", 1))
    assert run("--output", "runs/parity", "--overwrite", "--against", earlier) == 1
    _, _, found = capsys.readouterr().out.partition("since the earlier report:\n")
    assert found.splitlines()[:4] == [
        "worse: worsens, y: ORDER-ONLY -> BIASED",
        "grew: grows, y: 1.00 -> 2.00",
        "gone: goes: ORDER-ONLY -> not there",
        "new: comes: not there -> ORDER-ONLY",
    ]
    for name in ("report.html", "report.md"):
        assert "worsens" in (text := Path("runs/parity", name).read_text())
        assert "ince the earlier report" in text
    assert json.loads(Path(earlier).read_text())["format"] == 1
