"""The constants of the verdicts: each pinned from both sides by a case that does not read it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lora_jax.parity.compare import compare
from lora_jax.parity.mutants import holding
from lora_jax.parity.suite import losses, models
from lora_jax.parity.training.trajectories import Step, trajectory
from lora_jax.parity.verdicts import Verdict, judge

U = 2.0**-24
SIGNS = np.where(np.arange(4096) % 2, 1.0, -1.0)
ONES = np.ones(4096)


def off(by, slope=0.0):
    """Values that are off by this much each way, and by a common factor beside it."""
    return ONES * (1 + slope) + by * SIGNS


def judged(ours, theirs, **more):
    options = dict(unit_roundoff=1e-6, independent=10_000) | more
    return judge("y", ours, theirs, ONES, **options).verdict


def test_jax_may_be_twice_as_far_as_torch_and_one_rounding_more():
    for t, cond in ((0.0, 1.0), (2e-6, 1.0), (2e-6, 3.0)):
        for times, wanted in ((0.98, Verdict.ORDER_ONLY), (1.02, Verdict.MISMATCH)):
            ours = off(times * (2 * t + 1e-6 * cond))
            assert judged(ours, off(t), cond=cond) is wanted, (t, cond, times)


def test_torch_may_be_four_roundings_away():
    for times, wanted in ((0.98, Verdict.ORDER_ONLY), (1.02, Verdict.MISMATCH)):
        assert judged(ONES, off(times * 4e-6)) is wanted
        assert judged(ONES, off(times * 12e-6), cond=3.0) is wanted


def test_a_common_factor_may_be_eight_deviations_of_what_rounding_leaves():
    for times, wanted in ((0.95, Verdict.ORDER_ONLY), (1.05, Verdict.BIASED)):
        # of 10,000 roundings a hundredth is left
        assert judged(off(9e-7, times * 8 * 9e-9), ONES) is wanted
        # and twice what torch has of it
        assert judged(off(9e-7, times * (8 * 9e-9 + 2e-8)), off(0.0, 1e-8)) is wanted


def test_one_side_that_is_not_finite_is_a_mismatch():
    for bad in (np.nan, np.inf):
        broken = ONES.copy()
        broken[7] = bad
        assert judged(broken, ONES) is judged(ONES, broken) is Verdict.MISMATCH
        assert judged(broken, broken) is Verdict.MISMATCH
    zero = judge("y", ONES, ONES, 0 * ONES, unit_roundoff=1e-6)
    assert zero.verdict is Verdict.VACUOUS


def test_the_suites_hold_a_tensor_to_32_roundings_too():
    for times, ok in ((30, True), (34, False)):
        [found] = holding.held({"y": off(times * U)}, {"y": ONES}, {"y": ONES})
        assert found.verdict.ok is ok
    assert models.CHAIN == losses.CHAIN == holding.CHAIN


# compare


def held(ours, theirs, **more):
    inputs = {"x": np.ones((64, 64), np.float32)}
    return compare(ours, theirs, inputs, **more).tensors[0]


def signs():
    return SIGNS.reshape(64, 64)


def noisy_in_float32(roundings):
    """The identity in float64; in float32 off by so many roundings."""

    def run(x):
        if x.dtype != jnp.float32:
            return x
        return x * jnp.asarray(1 + roundings * U * signs(), x.dtype)

    return run


def same(x):
    return x * 1.0


def test_a_tensor_of_a_port_may_be_behind_32_roundings():
    # 1 plus an even number of roundings is a number of float32; 1 minus any is.
    for roundings, wanted in ((30, Verdict.ORDER_ONLY), (34, Verdict.MISMATCH)):
        found = held(noisy_in_float32(roundings), same)
        assert found.verdict is wanted, found


def torch_off(by):
    def run(x):
        return x * torch.tensor(1 + by * signs(), dtype=x.dtype)

    return run


def test_float64_runs_that_agree_to_1e_10_are_one_function():
    for by, wanted in ((0.9e-10, True), (1.1e-10, False)):
        found = held(same, torch_off(by))
        assert ("different functions" not in found.why) is wanted, found


def through_float32(x):
    return x.astype(jnp.float32).astype(x.dtype) + 0


def test_an_island_of_float32_explains_a_difference_of_1e_5_and_no_more():
    for by, wanted in ((0.9e-5, Verdict.VACUOUS), (1.1e-5, Verdict.MISMATCH)):
        assert held(through_float32, torch_off(by)).verdict is wanted
    # without an island nothing explains it
    assert held(same, torch_off(0.9e-5)).verdict is Verdict.MISMATCH


@pytest.mark.parametrize(("small", "ok"), [(0.4e-12, True), (1.6e-12, False)])
def test_what_is_1e_12_of_the_largest_is_zero(small, ok):
    def ours(x):
        return {"large": x, "small": x * jnp.asarray(small * signs(), x.dtype)}

    def theirs(x):
        return {"large": x * 1.0, "small": x * torch.tensor(-small * signs(), dtype=x.dtype)}

    found = compare(ours, theirs, {"x": np.ones((64, 64), np.float32)})
    [one] = [one for one in found.tensors if "small" in one.name]
    assert one.verdict.ok is ok, one


# Trajectories


def walks(offset=0.0, *, broken_at=None, noise=0.0, loss=0.9):
    """A run that goes one to the right at each step, beside the line by ``offset``."""

    def run(seed):
        beside = offset + (0.0 if seed is None else noise)
        yield Step({"w": np.zeros(2)})
        for n in range(1, 100):
            value = np.array([float(n), beside])
            if broken_at == n:
                value[0] = np.nan
            yield Step({"w": value}, 1.0 - (1 - loss) * (n - 1) / 9)

    return run


def test_jax_may_be_twice_the_noise_away():
    for times, wanted in ((1.98, Verdict.ORDER_ONLY), (2.02, Verdict.MISMATCH)):
        found = trajectory(walks(times * 1e-6), walks(noise=1e-6), steps=10, seeds=(1, 2))
        assert found.verdict is wanted, found
    found = trajectory(walks(2.9e-6), walks(noise=1e-6), steps=10, factor=3.0)
    assert found.verdict is Verdict.ORDER_ONLY
    assert found.widest == pytest.approx(2.9) and found.horizon is None


def test_the_band_is_the_noise_of_the_side_that_is_asked_for():
    for noise, wanted in (("jax", Verdict.ORDER_ONLY), ("torch", Verdict.MISMATCH)):
        ours, theirs = walks(3e-6, noise=2e-6), walks(noise=1e-6)
        assert trajectory(ours, theirs, steps=10, noise=noise).verdict is wanted


def test_the_band_is_the_widest_of_the_seeds():
    def theirs(seed):
        yield from walks(noise=1e-6 * (seed or 0))(seed)

    for seeds, wanted in (((1, 4), Verdict.ORDER_ONLY), ((1, 2), Verdict.MISMATCH)):
        assert trajectory(walks(6e-6), theirs, steps=10, seeds=seeds).verdict is wanted


def test_a_side_that_is_not_finite_leaves_the_band_there():
    plain, noisy = walks(), walks(noise=1e-6)
    for ours, theirs in ((walks(broken_at=4), noisy), (plain, walks(broken_at=4, noise=1e-6))):
        found = trajectory(ours, theirs, steps=10)
        assert (found.verdict, found.horizon) == (Verdict.MISMATCH, 4), found
        assert not found.as_verdict().verdict.ok
        assert found.to_dict()["horizon"] == 4 and found.to_dict()["verdict"] == "MISMATCH"


def test_a_loss_has_to_move_by_a_hundredth():
    # from 1 to this in ten steps
    for loss, wanted in ((0.989, Verdict.EXACT), (0.991, Verdict.VACUOUS)):
        assert trajectory(walks(loss=loss), walks(loss=loss), steps=10).verdict is wanted


def test_distances_are_shares_of_the_path():
    found = trajectory(walks(1e-3), walks(noise=1e-3), steps=10, truth=walks(3e-3))
    np.testing.assert_allclose(found.length, np.arange(1.0, 11.0))
    np.testing.assert_allclose(found.distance, 1e-3 / np.arange(1.0, 11.0))
    np.testing.assert_allclose(found.jax_to_truth, 2e-3 / np.arange(1.0, 11.0))
    np.testing.assert_allclose(found.torch_to_truth, 3e-3 / np.arange(1.0, 11.0))
