"""The noise of reordered sums, trajectories beside it, and frozen weights; and planted bugs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from lora_jax import Adapter
from lora_jax.core.errors import ParityError
from lora_jax.parity import To
from lora_jax.parity.assert_frozen import assert_frozen, moved
from lora_jax.parity.sides import jax_side, torch_side
from lora_jax.parity.sides.torch_order import Reordered
from lora_jax.parity.suite import steps
from lora_jax.parity.training.jax_runs import jax_run, nudged
from lora_jax.parity.training.noise import noise_floor
from lora_jax.parity.training.torch_runs import torch_run
from lora_jax.parity.training.trajectories import Step, trajectory
from lora_jax.parity.verdicts import Verdict, rel_l2
from parity_tests.tiers import cases

# The order of sums


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"x": (257, 300), "w": (300, 70), "a": (300, 6), "b": (6, 70)}
    return {n: (rng.standard_normal(s) / s[0] ** 0.5).astype("f4") for n, s in shapes.items()}


def layer(x, w, a, b):
    return x @ w + (16 / 6) * (x @ a @ b)


def test_jax_and_torch_are_apart_by_their_own_noise():
    given = inputs()
    floors = [noise_floor(layer, given, side=side, seeds=(0, 1)) for side in ("jax", "torch")]
    rng = np.random.default_rng(0)
    outputs = jax_side.run(layer, given)
    cotangents = {n: rng.integers(-2, 3, y.shape).astype("f4") for n, y in outputs.items()}
    ours, theirs = (
        side.run(layer, given, list(given), cotangents) for side in (jax_side, torch_side)
    )
    ratios = {
        name: [rel_l2(ours[name], theirs[name].astype("f8")) / floor[name] for floor in floors]
        for name in ours
    }
    print(ratios)
    assert set(ratios) == {"y", "dx", "dw", "da", "db"}
    # Where both happen to sum in the same order they are equal, as for dw here.
    apart = {name: both for name, both in ratios.items() if any(both)}
    assert {"y", "dx", "da", "db"} <= set(apart)
    assert all(0.5 < ratio < 2 for both in apart.values() for ratio in both), ratios


def test_every_product_is_reordered_and_stays_the_same_mathematics():
    rng = np.random.default_rng(0)

    def tensor(*shape):
        return torch.tensor(rng.standard_normal(shape), requires_grad=True)

    x, stack, w, v = tensor(5, 9), tensor(3, 5, 9), tensor(9, 4), tensor(9)
    bias, stacked = tensor(4), tensor(3, 9, 4)
    products = {
        "mm": lambda: x @ w,
        "addmm": lambda: torch.addmm(bias, x, w),
        "bmm": lambda: stack @ stacked,
        "baddbmm": lambda: torch.baddbmm(bias, stack, stacked),
        "mv": lambda: x @ v,
        "dot": lambda: v @ v,
    }
    for name, product in products.items():
        with Reordered(1) as mode:
            y = product()
            assert mode.products == 1, name
            if name in ("mm", "bmm"):
                y.sum().backward()
                assert mode.products == 3, name
        torch.testing.assert_close(y, product(), rtol=1e-13, atol=1e-13)


def test_integers_have_no_noise():
    given = {n: np.round(3 * v) for n, v in inputs().items() if n in "xw"}
    for side in ("jax", "torch"):
        floor = noise_floor(lambda x, w: x @ w, given, side=side, seeds=(0,))
        assert set(floor.values()) == {0.0}
    with pytest.raises(ParityError, match="numpy"):
        noise_floor(layer, given, side="numpy")


# Trajectories


WRONG = {
    "decay": lambda: optax.adamw(1e-3, weight_decay=0.02),
    "rate": lambda: optax.adamw(1.0001e-3, weight_decay=0.01),
}


def test_a_short_trajectory_stays_in_the_band_and_says_who_is_further():
    found = steps.lora_trajectory(0, 12, seeds=(1, 2))
    print(found)
    assert found.verdict is Verdict.ORDER_ONLY and found.horizon is None, str(found)
    assert found.jax_to_truth[-1] < found.torch_to_truth[-1]
    said = found.to_dict()
    assert said["horizon"] is None and all(type(v) is float for v in said["distance"])
    assert {len(said[n]) for n in ("distance", "band", "length", "jax_losses")} == {12}


@pytest.mark.parametrize("bug", cases(WRONG, slow=["decay"]))
def test_a_wrong_optimiser_leaves_the_band(bug):
    found = steps.lora_trajectory(0, 12, seeds=(1, 2), tx=WRONG[bug]())
    print(found)
    assert found.verdict is Verdict.MISMATCH and found.horizon is not None
    assert found.jax_to_truth[-1] > found.torch_to_truth[-1]


@pytest.mark.parametrize(("x64", "verdict"), [(False, "MISMATCH"), (True, "ORDER-ONLY")])
def test_the_bias_correction_of_optax_leaves_the_band_without_x64(x64, verdict):
    with jax.enable_x64(x64):
        tx = optax.adamw(1e-2, weight_decay=0.01)
        found = steps.lora_trajectory(0, 12, lr=1e-2, tx=tx, seeds=(1, 2))
    print(found)
    assert found.verdict == verdict
    assert (found.jax_to_truth[-1] > found.torch_to_truth[-1]) is not x64


@pytest.mark.slow
def test_150_steps_stay_in_the_band():
    for seed in range(3):
        found = steps.lora_trajectory(seed)
        print(found)
        assert found.verdict is Verdict.ORDER_ONLY and found.widest < 1, str(found)


def wanders(rate, *, ends=None, frozen=None):
    """A run in numpy that decays from 1 at this rate."""

    def run(order):
        w = nudged({"w": np.ones(4, np.float32)}, order)["w"]
        held = {} if frozen is None else {"f": np.zeros(2)}
        yield Step({"w": w}, frozen=held)
        for n in range(ends or 1000):
            loss, w = float((w**2).sum()), w * np.float32(1 - rate)
            if frozen == n:
                held = {"f": np.array([0.0, -0.0])}
            yield Step({"w": w}, loss, held)

    return run


def test_verdicts_of_trajectories():
    healthy = trajectory(wanders(0.1), wanders(0.1), steps=20)
    assert healthy.verdict is Verdict.EXACT and "stays in it" in str(healthy)
    off = trajectory(wanders(0.1001), wanders(0.1), steps=20)
    assert (off.verdict, off.horizon) == (Verdict.MISMATCH, 1) and "at step 1 of 20" in off.why
    still = trajectory(wanders(0.0), wanders(0.0), steps=20)
    assert still.verdict is Verdict.VACUOUS and still.why == "nothing moved"
    slow = trajectory(wanders(1e-5), wanders(1e-5), steps=20)
    assert slow.verdict is Verdict.VACUOUS and "the loss moved" in slow.why
    thawed = trajectory(wanders(0.1, frozen=7), wanders(0.1, frozen=1000), steps=20)
    assert thawed.verdict is Verdict.MISMATCH and thawed.moved == [
        "jax f: 1 of 2 elements, the largest by 0.0e+00"
    ]
    with pytest.raises(ParityError, match="after 5 steps"):
        trajectory(wanders(0.1), wanders(0.1, ends=5), steps=20)
    with pytest.raises(ParityError, match="seeds"):
        trajectory(wanders(0.1), wanders(0.1), seeds=())


def test_adapters_train_in_both_layouts():
    rng = np.random.default_rng(0)
    adapter = Adapter(
        jnp.asarray(rng.standard_normal((7, 3)), jnp.float32),
        jnp.asarray(rng.standard_normal((3, 5)), jnp.float32),
        scale=16 / 3,
    )
    x = rng.standard_normal((4, 7)).astype(np.float32)

    def ours(trained, frozen, x):
        return ((x @ trained["w"].a @ trained["w"].b - x @ frozen["k"]) ** 2).mean()

    def theirs(trained, frozen, x):
        low_rank = x @ trained["lora_A"].T @ trained["lora_B"].T
        return ((low_rank - x @ frozen["base"].T) ** 2).mean()

    mapping = {"w.a": To("lora_A", (1, 0)), "w.b": To("lora_B", (1, 0)), "k": To("base", (1, 0))}
    trained, frozen = {"w": adapter}, {"k": rng.standard_normal((7, 5)).astype(np.float32)}
    found = trajectory(
        jax_run(ours, optax.sgd(1e-2), trained, [x], frozen=frozen),
        torch_run(
            theirs,
            lambda p: torch.optim.SGD(p, lr=1e-2),
            trained,
            [x],
            frozen=frozen,
            mapping=mapping,
        ),
        steps=5,
        noise="jax",
        seeds=(1,),
    )
    assert found.verdict.ok, str(found)


# Frozen weights


def test_frozen_lists_every_leaf_that_moved():
    before = {"a": jnp.arange(3.0), "b": [np.zeros(2), np.ones(2)], "c": jnp.ones(2, jnp.bfloat16)}
    assert_frozen(before, jax.tree.map(lambda leaf: leaf.copy(), before))
    after = {"a": jnp.arange(3.0), "b": [-np.zeros(2), np.float32([1, 1])], "d": np.ones(1)}
    with pytest.raises(AssertionError) as raised:
        assert_frozen(before, after)
    lines = str(raised.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["c", "b.0", "b.1", "d"]


def test_frozen_sees_one_bit_of_a_torch_module_and_holds_nan():
    linear = torch.nn.Linear(3, 2).bfloat16().requires_grad_(False)
    linear.bias[0] = torch.nan
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    assert_frozen(before, linear.state_dict())
    linear.weight[1, 2] *= 1.01
    assert [line.partition(":")[0] for line in moved(before, linear.state_dict())] == ["weight"]
