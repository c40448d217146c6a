"""The default tests find every planted bug; all are planted with ``-m slow``, a few by default."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from lora_jax.parity.mutants import MUTANTS
from parity_tests.mutants.planted import Planted, Server, clean, distinct
from parity_tests.mutants.planted_table import PLANTED

BY_NAME = {bug.name: bug for bug in PLANTED}
AREAS = tuple(dict.fromkeys(bug.area for bug in PLANTED))

# Of different areas, with tests that compile nothing.
QUICK = (
    "the first group of layers_pattern is the layer",
    "the first invocation token is not active",
    "NaN of one side of a trajectory is order",
    "patience is an epoch longer",
    "the split does not hear of its seed",
)


def functions(path):
    """Return the tests of a file by name, and whether each is marked as slow."""
    tree = ast.parse(path.read_text("utf-8"))
    return {
        node.name: any("mark.slow" in ast.unparse(one) for one in node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def test_bugs_can_be_planted_and_have_a_test_of_the_default_run():
    """A line that has changed takes its bug along: a tenth may be out of date, but no more."""
    stale = {bug.name: bug.problem for bug in PLANTED if bug.problem}
    assert len(stale) <= len(PLANTED) / 10, stale
    assert len(BY_NAME) == len(PLANTED) and not {name for name in QUICK if name in stale}
    here = Path(__file__).parents[1]
    known = {name: functions(here / name) for name in {b.test.split("::")[0] for b in PLANTED}}
    for bug in PLANTED:
        name, _, test = bug.test.partition("::")
        assert known[name].get(test) is False, f"{bug}: {bug.test} is no test, or slow"


def test_there_are_many_and_of_every_area():
    real = [mutant for mutant in MUTANTS if not mutant.equivalent]
    assert sum(not bug.problem for bug in PLANTED) + len(real) >= 120
    for area in AREAS:
        assert sum(bug.area == area for bug in PLANTED) >= 2, area
    assert len(AREAS) >= 12


@pytest.fixture(scope="module")
def server():
    """One for all areas: what it imports takes as long as the tests of three bugs."""
    with Server() as one:
        yield one


def test_a_sample_is_found_and_a_bug_that_is_none_is_not(server):
    sample = [BY_NAME[name] for name in QUICK]
    none = replace(sample[0], name="nothing", new=f"({sample[0].old})")
    nowhere = replace(sample[0], name="nowhere", old="no such text")
    untested = replace(sample[0], name="untested", test="mutants/test_planted.py::test_nothing")
    fates = server.plant([*sample, none, nowhere, untested])
    said = {fate.name: fate.said for fate in fates}
    assert said.pop("nothing") == "survives", fates[-3].output
    assert "holds 'no such text' 0 times" in said.pop("nowhere")
    assert said.pop("untested") == "no verdict: pytest ended with 4"
    assert said == dict.fromkeys(QUICK, "found")


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_every_planted_bug_is_found(area, server):
    bugs = [bug for bug in PLANTED if bug.area == area and not bug.problem]
    tests = " ".join(dict.fromkeys(bug.test for bug in bugs))
    clean = Planted("the code as it is", area, "", "", "", tests)
    alarm, *fates = server.plant([clean, *bugs])
    assert alarm.said == "survives", alarm.output
    for fate in fates:
        print(f"{fate.name}: {fate.said} in {fate.seconds} s")
    lost = {fate.name: (fate.said, fate.output) for fate in fates if not fate.found}
    assert not lost, lost


@pytest.mark.slow
def test_no_test_raises_a_false_alarm():
    """A share of the first round of ``python -m parity_tests.mutants.planted --clean 200``."""
    share = PLANTED[::12]
    fates = clean(share, len(distinct(share)))
    assert {f"seed {seed}" for seed in range(1)} == {f.name.rpartition(", ")[2] for f in fates}
    assert not {fate.name: fate.output for fate in fates if fate.said != "survives"}
