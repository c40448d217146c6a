"""The step and the loop: what they compute, what they keep, and what they leave alone."""

import dataclasses
import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from lora_jax import Full, lora
from lora_jax.core import paths
from lora_jax.core.config.lora_config import LoraConfig
from lora_jax.core.errors import ConfigError, OutputError
from lora_jax.train import curves
from lora_jax.train.classifier import load_classifier
from lora_jax.train.data import Batch, Tokens
from lora_jax.train.finetune import FinetuneOptions, Planned, finetune
from lora_jax.train.loop import (
    EpochEvent,
    Interrupted,
    LoopOptions,
    NotFinite,
    Rows,
    StepEvent,
    StopEvent,
    fit,
)
from lora_jax.train.step import (
    Metrics,
    State,
    cross_entropy,
    make_evaluate,
    make_step,
    optimizer,
    schedule,
    start,
)
from parity_tests.models import tiny

CLASSES = ("ham", "spam")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    directory = tiny.save_model(tmp_path_factory.mktemp("model"), layers=1)
    return load_classifier(directory, CLASSES, 12)


@pytest.fixture(scope="module")
def planned(bert):
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    return bert.plan(config, 4)


@pytest.fixture(scope="module")
def apply(bert):
    return lora(bert.apply)


def fresh(planned, seed=0):
    """Adapters whose B is not zero, so that every part has a gradient."""
    adapters = planned.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype), adapters
    )


def make_batch(bert, n, size=None, seed=0):
    rows = tiny.texts(n, seed)
    tokens = bert.encode([text for text, _ in rows])
    labels = np.array([CLASSES.index(label) for _, label in rows], np.int32)
    take = np.resize(np.arange(n), size or n)
    weights = (np.arange(size or n) < n).astype(np.float32)
    return Batch(tokens.input_ids[take], tokens.attention_mask[take], labels[take], weights)


def bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in paths.flatten(tree).items()}


def is_deleted(tree):
    return {leaf.is_deleted() for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 7, 150, 1001])
def test_the_schedule_is_that_of_transformers(total, warmup):
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = transformers.get_linear_schedule_with_warmup(
        torch.optim.AdamW([weight], lr=1.0), math.ceil(warmup * total), total
    ).lr_lambdas[0]
    ours = schedule(3e-3, warmup, total_steps=total)
    wanted = [3e-3 * theirs(step) for step in range(total)]
    got = [float(ours(step)) for step in range(total)]
    # A step that falls to 0 is a difference of numbers as large as the peak.
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=3e-3 * 2.0**-23)
    assert total < 7 or max(got) == pytest.approx(3e-3, rel=0.5)


@pytest.mark.parametrize("size", [0.09, 4.0], ids=["below the clip", "above the clip"])
def test_the_optimizer_is_torchs_adamw_after_torchs_clipping(size):
    rng = np.random.default_rng(0)
    values = {"a": rng.standard_normal((5, 3)), "b": rng.standard_normal((4,))}
    values = {k: v.astype(np.float32) for k, v in values.items()}
    # a decay that shows, and norms that differ, since Adam does not see one common factor
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in values.items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.3)
    rate = transformers.get_linear_schedule_with_warmup(adamw, 2, 20)
    tx = optimizer(1e-2, weight_decay=0.3, warmup=0.1, clip=1.0, total_steps=20)
    ours = {k: jnp.asarray(v) for k, v in values.items()}
    state = tx.init(ours)
    for number in range(1, 11):
        gradients = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in values.items()}
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        gradients = {k: g * np.float32(size * number / norm) for k, g in gradients.items()}
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        adamw.step()
        rate.step()
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(gradients, state, ours)
        ours = optax.apply_updates(ours, updates)
    for name, parameter in theirs.items():
        moved = parameter.detach().numpy() - values[name]
        np.testing.assert_allclose(ours[name] - values[name], moved, rtol=1e-4, atol=1e-6)
        assert np.abs(moved).max() > 0.01


def test_the_clip_sees_the_trained_leaves_only(bert, planned, apply):
    batch, adapters = make_batch(bert, 4), fresh(planned)

    def loss(adapters):
        logits = apply(bert.params, adapters, batch.input_ids, batch.attention_mask)
        return cross_entropy(logits, batch.labels, batch.weights)

    gradients = jax.jit(jax.grad(loss))(adapters)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradients)))
    tx = optax.chain(optax.clip_by_global_norm(norm / 2), optax.sgd(1.0))
    state, _ = make_step(apply, tx)(start(tx, adapters), bert.params, batch)
    moved = jax.tree.map(lambda new, old: new - old, state.adapters, adapters)
    wanted = jax.tree.map(lambda g: -g / 2, gradients)
    for got, half in zip(jax.tree.leaves(moved), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, half, rtol=1e-4, atol=1e-6 * norm)


def test_moments_exist_for_adapters_only(planned):
    adapters = planned.init(jax.random.key(0))
    state = start(optimizer(total_steps=5), adapters)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * planned.trainable
    assert planned.trainable == sum(leaf.size for leaf in jax.tree.leaves(adapters))


def test_a_step_donates_the_state_and_never_the_parameters(bert, planned, apply):
    before, adapters = bits(bert.params), planned.init(jax.random.key(0))
    tx = optimizer(total_steps=5, warmup=0.0)
    step, state = make_step(apply, tx), start(tx, adapters)
    for _ in range(3):
        old, (state, metrics) = state, step(state, bert.params, make_batch(bert, 4))
        assert is_deleted(old.adapters) == {True}
        assert is_deleted(state) == is_deleted(bert.params) == is_deleted(adapters) == {False}
    assert int(state.step) == 3 and bool(metrics.finite)
    assert bits(bert.params) == before
    changed = [path for path, old in bits(adapters).items() if bits(state.adapters)[path] != old]
    assert changed == list(bits(adapters))


@pytest.mark.parametrize("poison", ["parameters", "rate"])
def test_a_step_that_is_not_finite_returns_the_state_as_it_was(poison, bert, planned, apply):
    params, rate = bert.params, 1e-3
    if poison == "parameters":
        params = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    else:
        rate = 1e38
    tx = optimizer(rate, warmup=0.0, total_steps=5)
    state = start(tx, fresh(planned))
    before = bits(state)
    after, metrics = make_step(apply, tx)(state, params, make_batch(bert, 4))
    assert not metrics.finite and bool(jnp.isnan(metrics.loss)) == (poison == "parameters")
    assert bits(after) == before


def test_rows_without_weight_do_not_count(bert, planned, apply):
    tx = optimizer(warmup=0.0, total_steps=5)
    step = make_step(apply, tx)
    full, padded = make_batch(bert, 3), make_batch(bert, 3, size=8)
    wrong = padded._replace(labels=np.where(padded.weights > 0, padded.labels, 1 - padded.labels))
    results = [
        step(start(tx, fresh(planned)), bert.params, batch) for batch in (full, padded, wrong)
    ]
    assert bits(results[1]) == bits(results[2])
    states, metrics = zip(*results, strict=True)
    assert metrics[0].rows == metrics[1].rows == 3
    assert metrics[0].correct == metrics[1].correct
    for one, other in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_cross_entropy_is_torchs_in_float32():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 3)).astype(np.float32) * 5
    labels, weights = np.array([0, 2, 1, 1, 0, 2], np.int32), np.array([1, 1, 0, 1, 1, 0])
    rows = weights.astype(bool)
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(logits[rows]), torch.tensor(labels[rows]).long()
    )
    ours = cross_entropy(jnp.asarray(logits), labels, weights.astype(np.float32))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    half = cross_entropy(jnp.asarray(logits, jnp.bfloat16), labels, weights.astype(np.float32))
    assert half.dtype == jnp.float32


@pytest.mark.slow
def test_before_the_first_step_the_model_is_the_base_model(bert, planned, apply):
    adapters, batch = planned.init(jax.random.key(5)), make_batch(bert, 4)
    args = batch.input_ids, batch.attention_mask
    with jax.disable_jit():
        base, adapted = bert.apply(bert.params, *args), apply(bert.params, adapters, *args)
    assert np.asarray(base).tobytes() == np.asarray(adapted).tobytes()
    base = np.asarray(jax.jit(bert.apply)(bert.params, *args))
    adapted = np.asarray(jax.jit(apply)(bert.params, adapters, *args))
    assert np.linalg.norm(adapted - base) <= 1e-6 * np.linalg.norm(base)


# The loop, with a step and an evaluation that only count.


def counting(fail_at=None, during=None):
    """A step that adds 1 to the adapter, and is not finite (or calls ``during``) at one step."""

    def step(state, params, batch):
        number = int(state.step) + 1
        if during and number == fail_at:
            during()
        elif number == fail_at:
            return state, Metrics(np.float32(np.nan), 0.0, 4.0, False)
        value = state.adapters["w"].value + 1
        state.adapters["w"].value.delete()  # as a compiled step does, whose state is donated
        new = State({"w": Full(value)}, None, state.step + 1)
        return new, Metrics(
            1 / number, float(batch.weights.sum()), float(batch.weights.sum()), True
        )

    return step


def validating(accuracies, losses=None):
    scores = iter(zip(accuracies, losses or [1.0] * len(accuracies), strict=True))

    def evaluate(params, adapters, batch):
        accuracy, loss = next(scores)
        return Metrics(loss, accuracy * 4, 4.0, True)

    return evaluate


def rows(n):
    ids = np.arange(n, dtype=np.int32)[:, None]
    return Rows(Tokens(ids, np.ones_like(ids)), np.zeros(n, np.int32))


def run(step, evaluate, observe=lambda event: None, **options):
    state = State({"w": Full(jnp.zeros(1))}, None, jnp.zeros((), jnp.int32))
    options = LoopOptions(**(dict(epochs=2, batch_size=4) | options))
    return fit(step, evaluate, state, None, rows(10), rows(4), options, observe)


def steps_in(trained):
    return int(trained.adapters["w"].value[0])


def test_the_loop_reports_every_step_and_epoch():
    events = []
    trained = run(
        counting(),
        validating([0.5, 1.0]),
        events.append,
        learning_rate=schedule(1.0, 0.5, total_steps=6),
    )
    kinds = [type(event) for event in events]
    assert kinds == 2 * [*3 * [StepEvent], EpochEvent] + [StopEvent]
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [event.epoch for event in steps] == [1, 1, 1, 2, 2, 2]
    assert {event.total_steps for event in steps} == {6}
    assert [event.rows for event in steps] == [4, 4, 2, 4, 4, 2]
    rates = [event.learning_rate for event in steps]
    np.testing.assert_allclose(rates, [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3], rtol=1e-6)
    assert [event.loss for event in steps] == [1 / n for n in range(1, 7)]
    assert steps[-1].eta == 0 < steps[0].eta and steps[1].samples_per_second > 0
    epochs = [event for event in events if isinstance(event, EpochEvent)]
    assert [event.validation_accuracy for event in epochs] == [0.5, 1.0]
    assert epochs[0].train_loss == pytest.approx((4 * 1 + 4 / 2 + 2 / 3) / 10)
    assert epochs[0].train_accuracy == 1 and epochs[1].step == 6
    assert events[-1] == StopEvent(6, "finished")
    assert (trained.steps, steps_in(trained), trained.reason) == (6, 6, "finished")


def test_seed_and_epoch_decide_the_order_of_the_rows():
    def order(seed):
        seen = []

        def step(state, params, batch):
            seen.append(tuple(batch.input_ids[:, 0]))
            return counting()(state, params, batch)

        run(step, validating([0.5, 1.0]), seed=seed)
        return seen

    assert order(1) == order(1) != order(2)
    assert order(1)[:3] != order(1)[3:]


@pytest.mark.parametrize(
    ("accuracies", "losses", "patience", "steps", "best"),
    [
        ([0.5, 0.75, 0.75, 0.5, 1.0], None, 2, 12, 6),
        ([0.5, 0.75, 0.75, 0.75, 1.0], [4.0, 3.0, 2.0, 2.5, 1.0], 2, 15, 15),
        ([1.0, 0.5, 0.5, 0.5, 0.5], None, 1, 6, 3),
        ([1.0, 0.5, 0.5, 0.5, 0.5], None, None, 15, 15),
    ],
)
def test_early_stopping_keeps_the_best_adapters(accuracies, losses, patience, steps, best):
    events = []
    trained = run(
        counting(), validating(accuracies, losses), events.append, epochs=5, patience=patience
    )
    assert (trained.steps, steps_in(trained)) == (steps, best)
    early = steps < 15
    assert trained.reason == events[-1].reason
    assert ("no better validation accuracy" in trained.reason) == early


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_adapters():
    with pytest.raises(NotFinite, match=r"step 5 of 6 \(epoch 2, learning rate .*lower") as caught:
        run(counting(fail_at=5), validating([0.5]))
    assert steps_in(caught.value.trained) == caught.value.trained.steps == 4


def test_an_interrupt_in_the_observer_keeps_the_last_good_adapters():
    def observe(event):
        if isinstance(event, StepEvent) and event.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        run(counting(), validating([0.5]), observe)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert steps_in(caught.value.trained) == caught.value.trained.steps == 4


def test_a_real_interrupt_waits_for_the_end_of_the_step():
    # Whoever started pytest may have it ignored, as a script does that runs it with "&".
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    press = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    try:
        with pytest.raises(Interrupted) as caught:
            run(counting(fail_at=2, during=press), validating([0.5]))
        assert steps_in(caught.value.trained) == caught.value.trained.steps == 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_ignored_interrupt_stays_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        press = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
        assert run(counting(fail_at=2, during=press), validating([0.5, 0.5])).steps == 6
    finally:
        signal.signal(signal.SIGINT, previous)


def test_loop_options_out_of_range_are_all_listed():
    with pytest.raises(
        ConfigError, match=r"(?s)epochs: got 0.*batch_size: got -1.*patience: got 0"
    ):
        LoopOptions(epochs=0, batch_size=-1, patience=0)


# Reports.

STEP = StepEvent(1, 1, 6, 16, 0.7, 0.5, 1e-3, 0.1, 160.0, 0.5)
EPOCH = EpochEvent(1, 3, 0.7, 0.5, math.inf, 0.6, 1.0, {"w": Full(jnp.zeros(1))})


def test_metrics_are_json_lines_without_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for event in (STEP, EPOCH, StopEvent(3, "finished")):
        curves.append(path, event)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["step", "epoch", "stop"]
    assert lines[0]["loss"] == 0.7 and lines[1]["validation_loss"] is None
    assert "adapters" not in lines[1] and "NaN" not in path.read_text()
    with pytest.raises(OutputError, match="cannot write .*: Is a directory"):
        curves.append(tmp_path, STEP)


@pytest.mark.parametrize("events", [[], [STEP], [STEP, EPOCH]], ids=len)  # EPOCH has an infinity
def test_curves_are_a_png_of_any_history(events):
    content = curves.curves(events, "title")
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
    assert content == curves.curves(events, "title")


# The whole job, on a model and a table of our own.


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("job")
    return FinetuneOptions(
        model=str(tiny.save_model(root)),
        data=tiny.save_table(root / "table.csv"),
        output=root / "out",
        r=4,
        max_length=12,
        batch_size=8,
        learning_rate=3e-2,
        epochs=4,
    )


@pytest.fixture(scope="module")
def job(options):
    events = []
    return finetune(options, events.append), events


def test_finetuning_learns_and_says_what_it_did(options, job):
    result, events = job
    assert result.accuracy_after >= 0.9 > result.accuracy_before
    assert (result.steps, result.stop) == (72, "finished")
    # query and value of two layers: A and B of 24 × 4 each; the head: 24 × 2 + 2
    assert result.trainable == 2 * 2 * 2 * 96 + 50
    names = sorted(path.name for path in options.output.iterdir())
    assert names == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "curves.png",
        "metrics.jsonl",
        "run.json",
    ]
    weights = options.output / "adapter_model.safetensors"
    assert result.adapter_bytes == weights.stat().st_size
    record = json.loads((options.output / "run.json").read_text())
    assert record["classes"] == ["ham", "spam"] and record["max_length"] == 12
    assert record["base_model"] == options.model
    assert record["result"]["accuracy_after"] == result.accuracy_after
    config = json.loads((options.output / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]
    assert config["base_model_name_or_path"] == options.model
    lines = (options.output / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 72 + 4 + 1
    [planned] = [event for event in events if isinstance(event, Planned)]
    assert planned.texts == (140, 20, 40) and planned.accuracy == result.accuracy_before


@pytest.mark.slow
def test_equal_options_give_equal_bytes_and_other_seeds_other_ones(options, job, tmp_path):
    def adapter(**changes):
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        finetune(dataclasses.replace(options, output=output, **changes))
        return [
            (output / name).read_bytes()
            for name in ("adapter_model.safetensors", "adapter_config.json")
        ]

    first = [
        (options.output / name).read_bytes()
        for name in ("adapter_model.safetensors", "adapter_config.json")
    ]
    assert adapter() == first
    weights, config = adapter(seed=1)
    assert weights != first[0] and config == first[1]


def test_evaluation_leaves_its_arguments(bert, planned, apply):
    adapters, before = planned.init(jax.random.key(0)), bits(bert.params)
    metrics = make_evaluate(apply)(bert.params, adapters, make_batch(bert, 4))
    assert is_deleted(adapters) == is_deleted(bert.params) == {False}
    assert bits(bert.params) == before and metrics.rows == 4 and bool(metrics.finite)
