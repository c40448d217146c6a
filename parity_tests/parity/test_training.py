"""Ten AdamW steps equal PyTorch's: losses, gradients, moments and what was learned."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers

from lora_jax import Adapter, Full, LoraConfig, lora, save_pretrained
from lora_jax.models import from_pretrained
from lora_jax.train import data, reading
from lora_jax.train.classifier import load_classifier
from lora_jax.train.data import Batch
from lora_jax.train.step import schedule
from parity_tests.models.test_bert import tiny_config, torch_model
from parity_tests.parity import training
from parity_tests.parity.oracle import UNIT_ROUNDOFF, assert_within_rule
from parity_tests.parity.training import AdamW, Problem, Run
from parity_tests.tiers import cases

UNIT = UNIT_ROUNDOFF["float32"]

# Roundings in the chain of products behind one gradient or loss; PyTorch's own errors are 1 to 65.
CHAIN = 32.0

# optax forms 1 − 0.999ᵗ in float32, where the rounding of 0.999ᵗ counts a thousandfold, and takes
# the root. PyTorch forms it in float64.
CORRECTION = 0.5 / (1 - training.B2)


@dataclass(frozen=True)
class Runs:
    """One problem, and the runs of PyTorch and in float64 to judge ours by."""

    given: Problem
    theirs: Run
    truth: Run


def judged(given: Problem) -> Runs:
    runs = Runs(given, training.theirs(given), training.truth(given))
    refuse_vacuous(runs)
    return runs


def refuse_vacuous(runs: Runs) -> None:
    given, truth = runs.given, runs.truth
    assert all(np.any(e.b) for e in given.adapters.values() if isinstance(e, Adapter))
    norms = [np.sqrt(sum(np.vdot(g, g) for g in step.values())) for step in truth.gradients]
    # An ignored clip shows in the first moments, and in Adam's steps only where norms differ.
    assert norms[0] > 1.05 * training.CLIP and min(norms) < training.CLIP, norms
    assert max(truth.losses) > 1.01 * min(truth.losses)


def problems(runs: Runs, ours: Run) -> list[str]:
    """Return every way in which our run is not PyTorch's, each beginning with the check's name."""
    theirs, truth = runs.theirs, runs.truth
    if ours.gradients[0].keys() != truth.gradients[0].keys():
        differing = sorted(ours.gradients[0].keys() ^ truth.gradients[0].keys())
        return [f"names: {name}" for name in differing]
    steps = zip(ours.losses, theirs.losses, truth.losses, truth.moved, strict=True)
    found = [
        misfit(f"loss: step {n}", a, b, c, CHAIN + CORRECTION * abs(moved / c))
        for n, (a, b, c, moved) in enumerate(steps)
    ]
    sensitivity = training.sensitivity(runs.given, truth, CHAIN * UNIT)
    before = training.tensors(runs.given.plan, runs.given.adapters)
    for name, change in truth.change.items():
        stored = np.linalg.norm(before[name]) / np.linalg.norm(change)
        conditions = {
            "gradient": (lambda run, name=name: run.gradients[0][name], CHAIN),
            "first moment": (lambda run, name=name: run.first[name], CHAIN),
            "second moment": (lambda run, name=name: run.second[name], 2 * CHAIN),
            # each step rounds the stored value; noise in the gradients; the bias correction
            "change": (
                lambda run, name=name: run.change[name],
                stored + sensitivity[name] / UNIT + CORRECTION,
            ),
        }
        for check, (value, condition) in conditions.items():
            values = (value(run) for run in (ours, theirs, truth))
            found.append(misfit(f"{check}: {name}", *values, condition))
    return [problem for problem in found if problem]


def misfit(name, ours, theirs, truth, condition):
    ours, theirs, truth = (np.atleast_1d(np.asarray(v)) for v in (ours, theirs, truth))
    try:
        assert_within_rule(ours, theirs, truth.astype(np.float64), condition, UNIT, name)
    except AssertionError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Runs:
    directory = tmp_path_factory.mktemp("tiny")
    base, _ = torch_model(transformers.BertForSequenceClassification, tiny_config(num_labels=3))
    base.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    model, params = from_pretrained(directory, 3)
    rng = np.random.default_rng(0)

    def batch():
        mask = (np.arange(11) < rng.integers(2, 12, (6, 1))).astype(np.int32)
        ids, labels = rng.integers(0, 61, (6, 11)), rng.integers(0, 3, 6)
        return Batch(ids.astype(np.int32), mask, labels.astype(np.int32), np.ones(6, np.float32))

    return judged(
        training.problem(
            lambda p, ids, mask: model.apply({"params": p}, ids, mask),
            params,
            config(6),
            base,
            [batch() for _ in range(training.STEPS)],
            directory,
            deviations=(0.3, 0.065),
        )
    )


@pytest.fixture(scope="module")
def minilm(minilm_dir, sms_path, tmp_path_factory) -> Runs:
    """The run of ``lora-jax finetune``: 16 texts of 64 tokens, r = 8 on query and value."""
    corpus = data.balance(data.drop_duplicates(reading.read_sms(sms_path)), seed=123)
    train, _, _ = data.split(corpus)
    classifier = load_classifier(minilm_dir, train.classes, 64)
    rows = data.batches(classifier.encode(train.texts), train.labels, 16, shuffle=True)
    return judged(
        training.problem(
            classifier.apply,
            classifier.params,
            config(8),
            pretrained(minilm_dir),
            list(itertools.islice(rows, training.STEPS)),
            tmp_path_factory.mktemp("minilm"),
            deviations=(0.1, 0.38),
        )
    )


def config(r: int) -> LoraConfig:
    return LoraConfig(
        r=r, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
    )


def pretrained(directory):
    return transformers.BertForSequenceClassification.from_pretrained(directory, num_labels=2)


def check_ten_steps(runs: Runs) -> Run:
    given = runs.given
    before = [np.array(leaf) for leaf in jax.tree.leaves(given.params)]
    ours = training.ours(given)
    assert problems(runs, ours) == []
    trained = sum(value.size for value in ours.gradients[0].values())
    assert trained == given.plan.trainable == sum(v.size for v in ours.first.values())
    for leaf, old in zip(jax.tree.leaves(given.params), before, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf).view(np.uint32), old.view(np.uint32))
    return ours


def test_ten_steps_of_a_tiny_bert_equal_pytorchs(tiny):
    check_ten_steps(tiny)


def with_entries(given: Problem, change) -> dict:
    return {path: change(entry) for path, entry in given.adapters.items()}


def scaled(given):
    def change(entry):
        return entry if isinstance(entry, Full) else replace(entry, scale=entry.scale * 1.0001)

    return dict(adapters=with_entries(given, change))


def chain(*, clip=training.CLIP, shift=0, **adamw):
    rate = schedule(training.RATE, training.WARMUP / training.STEPS, total_steps=training.STEPS)
    settings = dict(b1=training.B1, b2=training.B2, weight_decay=training.DECAY)
    return dict(
        tx=optax.chain(
            optax.clip_by_global_norm(clip),
            optax.adamw(lambda n: rate(n + shift), **settings | adamw),
        )
    )


def l2_decay(given):
    rate = schedule(training.RATE, training.WARMUP / training.STEPS, total_steps=training.STEPS)
    decay = optax.add_decayed_weights(training.DECAY)
    return dict(tx=optax.chain(optax.clip_by_global_norm(training.CLIP), decay, optax.adam(rate)))


def dropped(given):
    return dict(adapters=dict(itertools.islice(given.adapters.items(), 1, None)))


def frozen_a(given):
    def apply(params, adapters, *args):
        def change(entry):
            if isinstance(entry, Full):
                return entry
            return replace(entry, a=jax.lax.stop_gradient(entry.a))

        return lora(given.fn)(params, {k: change(v) for k, v in adapters.items()}, *args)

    return dict(apply=apply)


def without_mask(given):
    return dict(apply=lambda p, a, ids, mask: lora(given.fn)(p, a, ids, jnp.ones_like(mask)))


# how it is planted, and the first check that must see it
BUGS = {
    "scale off by 1e-4": (scaled, "gradient"),
    "padding attended": (without_mask, "loss"),
    "A does not learn": (frozen_a, "gradient"),
    "one path dropped": (dropped, "names"),
    "clip ignored": (lambda given: chain(clip=1e9), "first moment"),
    "clip at 1.001": (lambda given: chain(clip=1.001), "first moment"),
    "eps inside the root": (lambda given: chain(eps=0.0, eps_root=1e-8), "change"),
    "weight decay of optax": (lambda given: chain(weight_decay=1e-4), "change"),
    "L2 instead of decay": (l2_decay, "first moment"),
    "schedule one step early": (lambda given: chain(shift=1), "change"),
    "second moment forgets in 100 steps": (lambda given: chain(b2=0.99), "second moment"),
}


# One for each check that finds them first but the gradient; the others are slow.
QUICK = ("one path dropped", "schedule one step early", "clip at 1.001", "weight decay of optax")


@pytest.mark.parametrize("bug", cases(BUGS, quick=QUICK))
def test_planted_bugs_are_caught(bug, tiny):
    plant, check = BUGS[bug]
    found = problems(tiny, training.ours(tiny.given, **plant(tiny.given)))
    assert check in {problem.partition(":")[0] for problem in found}, found


def test_the_chain_that_bugs_are_planted_in_is_right_itself(tiny):
    assert problems(tiny, training.ours(tiny.given, **chain())) == []


@pytest.mark.parametrize("norm", [0.5, 30.0])
def test_the_oracles_adamw_is_pytorchs(norm):
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=shape) for name, shape in {"a": (5, 3), "b": (7,)}.items()}
    tensors = {name: torch.nn.Parameter(torch.tensor(v)) for name, v in values.items()}
    theirs = torch.optim.AdamW(tensors.values(), lr=1.0, weight_decay=training.DECAY)
    ours = AdamW(values)
    for rate in training.rates():
        gradients = {name: rng.normal(size=v.shape) for name, v in values.items()}
        whole = np.sqrt(sum(np.vdot(g, g) for g in gradients.values()))
        gradients = {name: g * norm / whole for name, g in gradients.items()}
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(tensors.values(), training.CLIP)
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        got = ours.step(gradients, rate)
    # torch divides by the norm + 1e-6, which scales every gradient alike
    known = 1e-6 / norm if norm > training.CLIP else 0.0
    for name, tensor in tensors.items():
        np.testing.assert_allclose(got[name], tensor.detach().numpy(), rtol=1e-13 + known)
        first = theirs.state[tensor]["exp_avg"].numpy()
        np.testing.assert_allclose(ours.first[name], first, rtol=1e-13 + 1.01 * known, atol=1e-18)


@pytest.mark.slow
def test_ten_steps_of_minilm_equal_pytorchs_and_pefts_loads_the_result(
    minilm, minilm_dir, tmp_path
):
    ours, given = check_ten_steps(minilm), minilm.given
    saved = save_pretrained(tmp_path / "adapter", given.plan, ours.adapters, task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(pretrained(minilm_dir), saved).eval()
    truth = copy.deepcopy(theirs).double()
    batch = given.batches[0]
    ids, mask = (torch.from_numpy(v) for v in (batch.input_ids, batch.attention_mask))
    with torch.no_grad():
        peft_logits, exact = (m(ids.long(), attention_mask=mask).logits for m in (theirs, truth))
    run = jax.jit(lora(given.fn))
    logits, untrained = (
        np.asarray(run(given.params, adapters, batch.input_ids, batch.attention_mask))
        for adapters in (ours.adapters, given.adapters)
    )
    assert np.linalg.norm(logits - untrained) > 1e-2 * np.linalg.norm(logits), "vacuous"
    assert_within_rule(logits, peft_logits.numpy(), exact.numpy(), CHAIN, UNIT, "logits")
