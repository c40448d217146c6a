"""The mutation gate finds every planted bug, says so of one that it does not find, and is quiet."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from lora_jax.parity.mutants import MUTANTS
from lora_jax.parity.mutants import gate as mutants
from lora_jax.parity.mutants.common_tests import common_tests
from lora_jax.parity.mutants.gate import Mutant, clean_runs, fate, gate, gate_checks, to_markdown
from lora_jax.parity.reports.checks import Check
from lora_jax.parity.verdicts import TensorVerdict, Verdict
from parity_tests import tiers
from parity_tests.tiers import cases

CHECKS = gate_checks()
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}

# Found by checks that compile little, and of all kinds.
QUICK = (
    "alpha for alpha/r",
    "rank pattern ignored",
    "clipped after Adam",
    "eps inside the root",
    "label mask ignored",
    "merged in bfloat16",
    "A and B swapped in the file",
    "B not zero",
)


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    mutants.reset()


# All in the default run: each planted bug is found by one of them. Few tests, as of a long table
# the default run takes a part alone.
GROUPS = {
    "layers": ("LoRADense/", "dropout/", "DoRA/", "experts/"),
    "start": ("patterns/", "start/"),
    "training": ("loss/", "optimiser/"),
    "keeping": ("merging/", "files/", "files of experts/"),
    "model": ("small model/",),
}


@pytest.mark.parametrize("group", GROUPS)
def test_the_code_as_it_is_raises_no_alarm(group):
    alarms = {
        str(check): mutants.alarm(check, seed=0)
        for check in CHECKS
        if str(check).startswith(GROUPS[group])
    }
    assert alarms and not any(alarms.values()), alarms


def test_every_check_of_the_gate_is_in_a_group():
    found = [sum(str(check).startswith(words) for words in GROUPS.values()) for check in CHECKS]
    assert found == [1] * len(CHECKS) and len(GROUPS) <= tiers.LONG


@pytest.mark.parametrize("mutant", cases(MUTANTS, quick=QUICK))
def test_every_bug_is_found(mutant):
    # The small model is the dearest check, which the quick ones do without.
    checks = [one for one in CHECKS if mutant.name not in QUICK or one.level != 2]
    kill = fate(mutant, checks)
    print(kill.check, kill.why)
    assert kill.ok, f"{mutant} survives" if not kill.check else f"found by {kill.check}: {kill.why}"


def test_the_table_is_large_and_says_what_each_does():
    real = [mutant for mutant in MUTANTS if not mutant.equivalent]
    assert len(real) >= 40 and len(BY_NAME) == len(MUTANTS) and set(QUICK) <= BY_NAME.keys()
    assert all(mutant.what for mutant in MUTANTS)


def verdicts(*kinds):
    return lambda seed: [TensorVerdict(str(n), kind) for n, kind in enumerate(kinds)]


def broken(seed):
    raise ValueError("seen\nin full")


def test_the_gate_can_fail():
    none = Mutant("none", "does nothing", nullcontext)
    excused = Mutant("excused", "does nothing", nullcontext, equivalent="it does nothing")
    fine = Check("fine", 1, verdicts(Verdict.EXACT, Verdict.ORDER_ONLY))
    matrix = gate([none, excused], [fine])
    assert not matrix.ok and matrix.surviving == ("none",) and not matrix.alarms
    assert gate([excused], [fine]).ok
    assert not gate([], [fine]).ok, "a gate without mutants proves nothing"
    for bad in (Verdict.MISMATCH, Verdict.BIASED, Verdict.VACUOUS):
        matrix = gate([none, excused], [fine, Check("bad", 2, verdicts(Verdict.EXACT, bad))])
        assert matrix.alarms == (f"bad: 1: {bad}",) and not matrix.ok
        assert [kill.check for kill in matrix.kills] == ["bad", "bad"]
        assert not matrix.kills[1].ok, "an equivalent mutant that is found is not equivalent"
    assert gate([none], [Check("raises", 1, broken)]).kills[0].why == "ValueError: seen"
    assert gate([none], [Check("empty", 1, lambda seed: [])]).kills[0].why == "no verdict at all"
    with pytest.raises(ImportError, match="cannot do without x, which needs no_such_package"):
        gate([none], [Check("x", 1, broken, needs=("no_such_package",))])


def test_the_page_tells_what_each_test_finds():
    common = iter([{"old": False}, {"old": True}, {"old": False}])
    right = Check("right", 1, verdicts(Verdict.EXACT))
    wrong = iter([Verdict.EXACT, Verdict.MISMATCH, Verdict.EXACT])
    turning = Check("turning", 3, lambda seed: [TensorVerdict("y", next(wrong))])
    two = [Mutant("one", "first", nullcontext), Mutant("two", "second", nullcontext)]
    matrix = gate(two, [right, turning], common=lambda: next(common))
    assert matrix.caught == {"old": 1, "this suite": 1}
    page = to_markdown(matrix, "A note.")
    assert "| one | first | turning | yes |" in page and "A note." in page
    assert "| two | second | **survives** | – |" in page


def test_a_clean_run_counts_its_alarms():
    right, bad = Check("right", 1, verdicts(Verdict.EXACT)), Check("bad", 1, broken)
    assert clean_runs([right], range(3)) == (3, [])
    count, found = clean_runs([right, bad], range(2))
    assert count == 4 and found[1] == "bad, seed 1: ValueError: seen"


@pytest.mark.slow
def test_common_tests_are_quiet_and_miss_what_the_suite_finds():
    run = common_tests()
    mutants.reset()
    assert not any(run().values())
    mutants.reset()
    with BY_NAME["no gradient of A"].plant():
        seen = run()
    assert not any(found for name, found in seen.items() if "loss" not in name)


@pytest.mark.slow
def test_200_clean_runs_raise_no_alarm():
    mutants.reset()
    count, found = clean_runs([one for one in CHECKS if not one.slow], range(1000, 1200))
    assert found == [] and count == 200 * len(CHECKS)
