"""What makes a comparison vacuous fails the run, and the traps between PyTorch and JAX are real."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import peft
import pytest
import torch
from flax import linen as nn

from lora_jax import Adapter, lora
from lora_jax.parity import Verdict, guards, rel_l2
from lora_jax.parity.reports.checks import Check, CheckResult, run_check
from lora_jax.parity.reports.report import Report
from lora_jax.parity.suite import loss_oracle, losses
from lora_jax.parity.verdicts import TensorVerdict
from lora_jax.train.step import cross_entropy

RNG = np.random.default_rng(0)
FINE: dict[str, Any] = dict(
    factors={"a": np.ones((2, 3)), "b": np.ones((3, 5))},
    scales={"w": 16 / 6},
    shapes=[(4, 4), (3, 5)],
    outputs=(np.ones(3), np.array([1.0, 1.0, 1.5])),
    losses=[1.0, 0.9],
    truth={"y": np.full(3, 1 / 3)},
)


def test_a_comparison_that_can_fail_is_let_through():
    assert guards.vacuity(**FINE) == []
    guards.refuse([])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("factors", {"b": np.zeros((3, 5))}, "b: is zero"),
        ("scales", {"w": 2.0}, "w: bfloat16 holds the scale 2.0 exactly"),
        ("shapes", [(4, 4), (3, 3)], "all square"),
        ("outputs", (np.ones(3), np.ones(3) * 1.001), "of the output"),
        ("outputs", (np.zeros(3), np.zeros(3)), "of the output"),
        ("losses", [1.0, 0.9999], "the loss moved by 1.0e-04"),
        ("losses", [], "the loss moved by"),
        ("truth", {"y": np.ones(3, np.float32)}, "wanted float64"),
        ("truth", {"y": np.full(3, np.float32(1 / 3)).astype(np.float64)}, "those of float32"),
    ],
)
def test_each_guard_trips_and_fails_the_run(name, value, said):
    problems = guards.vacuity(**FINE | {name: value})
    assert len(problems) == 1 and said in problems[0]

    def run(seed):
        guards.refuse(problems)
        yield TensorVerdict("y", Verdict.EXACT)

    result = run_check(Check("guarded", 1, run))
    assert result.verdict is Verdict.VACUOUS and said in result.tensors[0].why
    fine = CheckResult("fine", 1, (TensorVerdict("y", Verdict.EXACT),))
    assert Report({}, [fine]).ok and not Report({}, [fine, result]).ok


# Traps: each holds the wrong way to be wrong, and ours to be right.


def test_a_label_of_minus_100_is_an_index_to_optax_and_weights_leave_it_out():
    logits, labels = losses.draw(0)
    wanted = float(loss_oracle.cross_entropy(logits, labels)["loss"])
    wrong = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    assert not abs(float(wrong) - wanted) < 1e-2 * wanted
    # With 100 tokens or more it is a token, and the loss a plausible number.
    many = np.concatenate([logits, logits, logits], axis=1)
    silent = optax.softmax_cross_entropy_with_integer_labels(many, labels)
    token = optax.softmax_cross_entropy_with_integer_labels(many, np.where(labels < 0, 11, labels))
    np.testing.assert_array_equal(silent, token)
    counts = labels != loss_oracle.IGNORED
    ours = cross_entropy(jnp.asarray(logits), labels * counts, counts.astype(np.float32))
    assert float(ours) == pytest.approx(wanted, rel=1e-6)


def test_a_loss_of_which_nothing_counts_is_nan_on_both_sides():
    logits, labels = losses.draw(0)
    nothing = np.full_like(labels, loss_oracle.IGNORED)
    theirs = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(nothing).long()
    )
    ours = cross_entropy(jnp.asarray(logits), nothing * 0, np.zeros(len(nothing), np.float32))
    oracle = loss_oracle.cross_entropy(logits, nothing)["loss"]
    assert np.isnan([float(theirs), float(ours), float(oracle)]).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_oracle_is_the_derivative_of_its_value(smoothing):
    logits, labels = losses.draw(1)
    logits, along = logits.astype(np.float64), RNG.standard_normal(logits.shape)

    def value(step):
        found = loss_oracle.cross_entropy(logits + step * along, labels, smoothing=smoothing)
        return float(found["loss"])

    slope = np.vdot(
        loss_oracle.cross_entropy(logits, labels, smoothing=smoothing)["dlogits"], along
    )
    assert (value(1e-6) - value(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_optax_halves_the_squared_error():
    got, wanted = RNG.standard_normal((2, 5, 7))
    truth = float(loss_oracle.mean_squared(got, wanted)["loss"])
    assert float(optax.l2_loss(got, wanted).mean()) == pytest.approx(truth / 2, rel=1e-6)


def test_jax_rounds_a_number_to_bf16_and_the_low_rank_path_does_not():
    x = jnp.asarray(RNG.standard_normal((64, 96)), jnp.bfloat16)
    s = 16 / 6
    once = (np.asarray(x, np.float64) * s).astype(ml_dtypes.bfloat16)
    theirs = (torch.from_numpy(np.asarray(x, np.float32)).bfloat16() * s).float().numpy()
    np.testing.assert_array_equal(theirs, once.astype(np.float32))
    assert (np.asarray(x * s) != once).mean() > 0.1
    eye = jnp.eye(96, dtype=jnp.bfloat16)
    fn = lora(lambda params, x: x @ params["w"])
    ours = fn({"w": jnp.zeros((96, 96), jnp.bfloat16)}, {"w": Adapter(eye, eye, s)}, x)
    np.testing.assert_array_equal(np.asarray(ours), once)


def test_a_square_kernel_left_untransposed_passes_every_check_of_shapes():
    x, w = RNG.standard_normal((8, 16)), RNG.standard_normal((16, 16))
    assert rel_l2(x @ w.T, x @ w) > 1
    assert guards.vacuity(shapes=[w.shape])


def test_flaxs_layer_norm_needs_pytorchs_epsilon_and_the_slow_variance():
    x = (RNG.standard_normal((4, 32)) + 1000).astype(np.float32)
    wanted = torch.nn.functional.layer_norm(torch.from_numpy(x).double(), (32,)).numpy()

    def error(**options):
        layer = nn.LayerNorm(use_bias=False, use_scale=False, **options)
        return rel_l2(np.asarray(layer.apply({}, jnp.asarray(x))), wanted)

    assert error(epsilon=1e-5, use_fast_variance=False) < 1e-4 < 1e-2 < error(epsilon=1e-5)
    small = (1e-3 * RNG.standard_normal((4, 32))).astype(np.float32)
    theirs = torch.nn.functional.layer_norm(torch.from_numpy(small), (32,)).numpy()
    ours = nn.LayerNorm(use_bias=False, use_scale=False).apply({}, jnp.asarray(small))
    assert rel_l2(np.asarray(ours), theirs.astype(np.float64)) > 0.1


def test_gelu_is_the_tanh_one_in_jax_and_the_erf_one_in_pytorch():
    x = np.linspace(-3, 3, 50, dtype=np.float32)
    theirs = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(jax.nn.gelu(x, approximate=False), theirs, atol=1e-6)
    assert np.abs(jax.nn.gelu(x) - theirs).max() > 1e-4


def test_a_row_that_is_masked_all_over_is_nan_or_uniform():
    scores = np.full((1, 4), -np.inf, np.float32)
    assert np.isnan(jax.nn.softmax(scores)).all()
    assert torch.softmax(torch.from_numpy(scores), -1).isnan().all()
    least = np.full((1, 4), np.finfo(np.float32).min)
    np.testing.assert_array_equal(jax.nn.softmax(least), 0.25)


def test_peft_drops_the_dilation_of_a_convolution():
    """So the suite holds dilated convolutions to the formula."""
    torch.manual_seed(0)
    conv = torch.nn.Sequential(torch.nn.Conv1d(4, 6, 3, dilation=2, padding=2))
    options: Any = dict(r=2, target_modules=["0"])
    model: Any = peft.get_peft_model(conv, peft.LoraConfig(**options))
    x = torch.randn(2, 4, 11)
    with pytest.raises(RuntimeError, match="size"):
        model(x)
