"""The SmolLM2-shaped cases, at tiny sizes: equal to transformers and PEFT, or refused."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.case import BenchmarkError
from benchmarks.cases import CASES, decoder, smollm, smollm_jax, smollm_model
from benchmarks.cases.decoder import Sizes
from benchmarks.cases.smollm_model import SMOLLM2, Task
from benchmarks.measure import harness
from lora_jax import lora
from lora_jax.rewrite.frugality import count

TINY = Sizes(
    layers=2,
    width=24,
    hidden=40,
    heads=6,
    vocabulary=60,
    rows=2,
    tokens=8,
    kv_heads=2,
    theta=100_000.0,
    eps=1e-5,
    tied=True,
)
SCAN, UNROLLED, EAGER = "lora_jax scan", "lora_jax unrolled", "PEFT eager"


def run(case, *names, **fields):
    chosen = tuple(one for one in case.contestants if not names or one.name in names)
    return harness.run(replace(case, contestants=chosen, warm_up=0, rounds=1, **fields))


planned = functools.cache(smollm_model.planned)


def abstract(task, *, scan):
    return smollm_model.shapes(task, scan=scan), planned(task, scan=scan).abstract()


@pytest.mark.slow
def test_three_steps_in_float32_are_those_of_peft():
    names = (SCAN, UNROLLED, EAGER)
    result = run(smollm.step_case(TINY), *names, tolerance=1e-5)
    assert [one.contestant for one in result.timings] == list(names)
    assert result.steps_checked == 3 and not result.skipped


@pytest.mark.slow
def test_a_head_of_its_own_gives_the_logits_of_peft():
    run(smollm.forward_case(replace(TINY, tied=False)), SCAN, EAGER, tolerance=1e-5)


@pytest.mark.slow
def test_in_bfloat16_both_sides_are_as_far_from_float32_as_from_each_other():
    def gradients(contestant, dtype):
        (one,) = (c for c in smollm.step_case(TINY, dtype).contestants if c.name == contestant)
        work = one.setup()
        read = work.read(work.step())
        return np.concatenate([read[key].ravel() for key in sorted(read) if "gradient" in key])

    exact = gradients(SCAN, "float32")
    ours, theirs = gradients(SCAN, "bfloat16"), gradients(EAGER, "bfloat16")
    size, apart = np.linalg.norm(exact), np.linalg.norm(ours - theirs)
    far = [np.linalg.norm(one - exact) for one in (ours, theirs)]
    assert 0 < far[0] <= 1.25 * far[1]
    assert apart <= 1.5 * max(far) and apart <= smollm.TOLERANCES["bfloat16"] * size


@pytest.mark.slow
def test_the_first_losses_beside_full_fine_tuning_are_equal():
    result = run(smollm.full_case(TINY))
    assert len(result.timings) == 3 and result.difference < 1e-5


@pytest.mark.slow
def test_heads_that_read_another_heads_keys_are_refused(monkeypatch):
    sdpa = pytest.importorskip("transformers.integrations.sdpa_attention")
    monkeypatch.setattr(sdpa, "use_gqa_in_sdpa", lambda *args: False)
    run(smollm.forward_case(TINY), SCAN, EAGER)
    monkeypatch.setattr(sdpa, "repeat_kv", lambda states, n: states.repeat(1, n, 1, 1))
    with pytest.raises(BenchmarkError, match="PEFT eager: result of step 1"):
        run(smollm.forward_case(TINY), SCAN, EAGER)


@pytest.mark.slow
def test_another_scale_is_refused(monkeypatch):
    original = smollm_jax._adapters

    def doubled(task, *, scan):
        return {
            path: replace(a, scale=2 * a.scale) for path, a in original(task, scan=scan).items()
        }

    monkeypatch.setattr(smollm_jax, "_adapters", doubled)
    with pytest.raises(BenchmarkError, match="PEFT eager: result of step 1"):
        run(smollm.forward_case(TINY), SCAN, EAGER)


def test_adapters_are_on_the_seven_linears_of_every_layer():
    task = Task(TINY)
    stacked = {f"layers.{name}" for name in decoder.TARGETS}
    each = {f"layers.{n}.{name}" for n in range(TINY.layers) for name in decoder.TARGETS}
    assert {leaf.path for leaf in planned(task, scan=True).adapted} == stacked
    assert {leaf.path for leaf in planned(task, scan=False).adapted} == each


def test_scan_and_unrolled_start_from_the_same_weights_and_adapters():
    task = Task(TINY)
    found = [
        smollm_model.by_linear(smollm_model.adapters(task, planned(task, scan=scan)))
        for scan in (True, False)
    ]
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][key], found[1][key]) for key in found[0])
    params = smollm_model.weights(TINY)
    for scan, given in ((True, params), (False, smollm_model.unrolled(params))):
        shapes = smollm_model.shapes(task, scan=scan)
        assert jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, shapes)
    assert smollm_model.unrolled(params)["layers"][1]["q"].tolist() == (
        params["layers"]["q"][1].tolist()
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_needed_is_what_the_program_of_the_real_size_counts(dtype):
    task = Task(SMOLLM2, dtype)
    params, adapters = abstract(task, scan=True)
    ids = decoder.tokens(SMOLLM2)
    steps = jax.eval_shape(smollm_jax.start, adapters)
    forward = count(lora(decoder.decoder(SMOLLM2)), params, adapters, ids)
    step = count(smollm_jax.lora_step(SMOLLM2), *steps, params, ids)
    needed = CASES["smollm_forward"].needed.flops
    assert needed <= forward <= 1.1 * needed
    needed = CASES[f"smollm_step_{dtype}"].needed.flops
    assert 0.98 * needed <= step <= 1.1 * needed


def test_the_loss_is_an_argument_and_gets_states_parameters_and_labels():
    seen = []

    def loss(states, params, labels):
        seen.append((states.shape, params["embedding"].shape, labels.shape))
        return smollm_jax.all_logits(states, params, labels)

    params, adapters = abstract(Task(TINY), scan=True)
    steps = jax.eval_shape(smollm_jax.start, adapters)
    step = smollm_jax.lora_step(TINY, loss)
    trained, _, value = jax.eval_shape(step, *steps, params, decoder.tokens(TINY))
    assert seen[0] == ((2, 7, 24), (60, 24), (2, 7)) and value.shape == ()
    assert trained.keys() == adapters.keys()


def test_smollm2_has_the_size_that_it_should():
    shapes = decoder.shapes(SMOLLM2)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 134_515_008
    trained = planned(Task(), scan=True).trainable
    assert trained == 4_884_480
    assert {f"smollm_{name}" for name in ("forward", "step_float32", "compile")} <= CASES.keys()
