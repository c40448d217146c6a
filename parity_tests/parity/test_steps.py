"""optax against PyTorch's optimisers and schedulers, step by step, and planted bugs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.core.errors import ParityError
from lora_jax.parity.reports.checks import run_check
from lora_jax.parity.suite import steps
from lora_jax.parity.training import update_rules
from lora_jax.parity.training.like_torch import (
    accumulate_like_torch,
    clip_like_torch,
    optax_like_torch,
    optax_schedule_like_torch,
)
from lora_jax.parity.training.stepping import optimizer_step
from lora_jax.parity.verdicts import Verdict, worst
from parity_tests.tiers import cases

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"

QUICK = [check for check in steps.CHECKS if not check.slow]
X64 = """
import sys
import jax
jax.config.update("jax_numpy_dtype_promotion", "strict")
from lora_jax.parity.reports.checks import run_check
from lora_jax.parity.suite.steps import CHECKS
assert jax.config.jax_enable_x64
for check in CHECKS:
    if check.name.startswith(sys.argv[1]) and not check.slow:
        result = run_check(check)
        if result.verdict is None or not result.verdict.ok:
            print(check.name, result.error, *result.tensors, sep="\\n")
"""


def parameter():
    return torch.nn.Parameter(torch.ones(3))


# The suite's checks


# Ten steps begin with one.
TWINS = {check.name for check in QUICK if check.name.endswith("/one step")} - {"AdamW/one step"}


@pytest.mark.parametrize("check", cases(QUICK, slow=TWINS))
def test_checks_hold(check):
    result = run_check(check, seed=1)
    assert result.verdict is not None and result.verdict.ok, (result.error, *result.tensors)


@pytest.mark.slow
@pytest.mark.parametrize("only", ["AdamW/", ""])
def test_checks_hold_with_x64(only):
    env = os.environ | {"JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-c", X64, only]
    out = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (0, ""), out.stdout + out.stderr


# What optax does in the place of PyTorch's, and the first tensor that must show it.
BUGS = {
    "eps inside the root": ("AdamW", lambda: optax.adamw(1e-2, eps=0, eps_root=1e-8), "w"),
    "decay of optax's default": ("AdamW", lambda: optax.adamw(1e-2), "w"),
    "L2 for decay": ("Adam with L2", lambda: optax.adamw(1e-2, weight_decay=0.1), "exp_avg"),
    "b2 of 0.99": ("AdamW", lambda: optax.adamw(1e-2, b2=0.99, weight_decay=0.1), "exp_avg_sq"),
    "clip without 1e-6": (
        "clipping",
        lambda: optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(100.0, 0.9)),
        "momentum_buffer",
    ),
    "rmsprop's eps in the root": (
        "RMSprop",
        lambda: optax.rmsprop(1e-2, decay=0.99, eps=1e-8),
        "w",
    ),
    "rmsprop's decay of optax": (
        "RMSprop",
        lambda: optax.rmsprop(1e-2, eps=1e-8, eps_in_sqrt=False),
        "square_avg",
    ),
    "Nesterov forgotten": ("Nesterov", lambda: optax.sgd(0.1, 0.9), "w"),
    "momentum of 0.9001": ("momentum", lambda: optax.sgd(0.1, 0.9001), "momentum_buffer"),
    "the mean of accumulated gradients": (
        "accumulation of 4",
        lambda: optax.MultiSteps(steps.RECIPES["AdamW"].optax(), 4).gradient_transformation(),
        "exp_avg",
    ),
    "a schedule one step early": (
        "AdamW, clipped, warm-up",
        lambda: optax.chain(
            clip_like_torch(1.0),
            optax.adamw(lambda n: 1e-2 * jnp.minimum((n + 1) / 3, (9 - n) / 7), weight_decay=0.1),
        ),
        "w",
    ),
}
FEW = ("eps inside the root", "clip without 1e-6", "L2 for decay", "momentum of 0.9001")


@pytest.mark.parametrize("bug", cases(BUGS, quick=FEW))
def test_planted_bugs_are_seen(bug):
    name, tx, shown = BUGS[bug]
    found = steps.step_check(steps.RECIPES[name], steps.STEPS, 0, tx=tx())
    bad = [one for one in found if not one.verdict.ok]
    assert shown in {one.name.split()[2] if one.name.count(" ") > 2 else "w" for one in bad}
    assert all(one.further == "jax" for one in bad), list(map(str, bad))


def test_who_is_further_is_said_when_pytorch_is_the_wrong_one():
    values, gradients = steps.draw(3, 0)
    found = optimizer_step(
        optax.sgd(0.1),
        lambda p: torch.optim.SGD(p, lr=0.1001),
        values,
        gradients,
        rule=update_rules.Sgd(0.1),
    )
    assert {(one.verdict, one.further) for one in found} == {(Verdict.MISMATCH, "torch")}


def test_nothing_learned_is_vacuous_and_misfits_are_listed():
    values, gradients = steps.draw(2, 0)
    found = optimizer_step(optax.sgd(0.0), lambda p: torch.optim.SGD(p, lr=0.0), values, gradients)
    assert worst(found) is Verdict.VACUOUS
    wrong = [{"a": gradients[0]["a"].T, "c": gradients[0]["b"]}]
    with pytest.raises(ParityError) as raised:
        optimizer_step(optax.sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1), values, wrong)
    assert len(raised.value.problems) == 3


# The settings that make them equal


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["SGD", "Adam", "AdamW", "RMSprop"]),
    lr=st.sampled_from([1e-3, 3e-2]),
    weight_decay=st.sampled_from([0, 0.1]),
    eps=st.sampled_from([1e-8, 1e-3]),
    average=st.sampled_from([0.0, 0.5, 0.95]),
    flag=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_settings_carry_over(name, lr, weight_decay, eps, average, flag, seed):
    options = {
        "SGD": dict(momentum=average, nesterov=flag and average > 0),
        "Adam": dict(eps=eps, betas=(average, 0.99)),
        "AdamW": dict(eps=eps, betas=(average, 0.99)),
        "RMSprop": dict(eps=eps, momentum=average, centered=flag),
    }[name]
    recipe = steps.Recipe(name, dict(lr=lr, weight_decay=weight_decay, **options))
    found = steps.step_check(recipe, 3, seed)
    assert worst(found).ok, [str(one) for one in found if not one.verdict.ok]


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading of the page, as code."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [re.findall("`([^`]+)`", line) for line in section.splitlines() if line[:3] == "| `"]


OPTIMISERS, SCHEDULES = rows("Optimisers"), rows("Schedules")


@pytest.mark.parametrize(("theirs", "ours"), OPTIMISERS)
def test_the_optimisers_of_the_page_are_equal(theirs, ours):
    values, gradients = steps.draw(3, 0)
    names = {"torch": torch, "optax": optax}
    found = optimizer_step(
        eval(ours, names), lambda p: eval(theirs, names, {"p": p}), values, gradients
    )
    assert worst(found).ok, [str(one) for one in found if not one.verdict.ok]


@pytest.mark.parametrize(("theirs", "ours"), SCHEDULES)
def test_the_schedules_of_the_page_are_equal(theirs, ours):
    names = {"torch": torch, "optax": optax, "transformers": transformers}
    sgd = torch.optim.SGD([parameter()], lr=0.1)
    scheduler = eval(theirs, names, {"o": sgd})
    like = optax_schedule_like_torch(scheduler)
    with jax.numpy_dtype_promotion("standard"):
        schedule = eval(ours, names)
        for step in range(10):
            rate = sgd.param_groups[0]["lr"]
            assert float(schedule(step)) == pytest.approx(rate, rel=2e-6, abs=1e-9)
            assert float(like(step)) == pytest.approx(rate, rel=2e-6, abs=1e-9)
            sgd.step()
            scheduler.step()


def test_the_page_has_rows():
    assert (len(OPTIMISERS), len(SCHEDULES)) == (9, 7)


def two_groups():
    return [{"params": [parameter()], "lr": 0.1}, {"params": [parameter()], "lr": 0.2}]


REFUSED = {
    "amsgrad": lambda: torch.optim.AdamW([parameter()], amsgrad=True),
    "maximize": lambda: torch.optim.SGD([parameter()], maximize=True),
    "dampening": lambda: torch.optim.SGD([parameter()], lr=0.1, momentum=0.9, dampening=0.1),
    "Adagrad": lambda: torch.optim.Adagrad([parameter()]),
    "group 1 has 0.2": lambda: torch.optim.SGD(two_groups()),
    "SGD, Adam": lambda: type("Mine", (torch.optim.SGD,), {})([parameter()], lr=0.1),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_has_no_equal_is_refused_by_name(said):
    with pytest.raises(ParityError, match=said):
        optax_like_torch(REFUSED[said]())


def test_a_scheduled_optimiser_wants_its_schedule_and_groups_are_chosen():
    sgd = torch.optim.SGD(two_groups())
    lambdas = torch.optim.lr_scheduler.LambdaLR(sgd, lambda t: 1.0)
    with pytest.raises(ParityError, match="a scheduler changes it"):
        optax_like_torch(sgd, group=1)
    with pytest.raises(ParityError, match="no schedule for <lambda>"):
        optax_schedule_like_torch(lambdas)
    tx = optax_like_torch(torch.optim.SGD(two_groups()), group=1)
    updates, _ = tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))
    assert updates["w"].tolist() == [jnp.float32(-0.2)] * 2
    stepped = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(two_groups()), 2)
    rate = optax_schedule_like_torch(stepped, group=1)
    assert [float(rate(n)) for n in (0, 2)] == pytest.approx([0.2, 0.02])


def test_accumulating_four_is_one_step_of_their_sum():
    tx, four = optax.sgd(0.5), [{"w": jnp.full(3, float(n))} for n in range(4)]
    both = accumulate_like_torch(tx, 4)
    state = both.init(four[0])
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        for one in four:
            updates, state = both.update(one, state, four[0])
    assert updates["w"].tolist() == [-3.0] * 3
