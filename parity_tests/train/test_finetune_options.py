"""Every option of ``finetune``: what it changes in the result, and that it changes nothing else."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.cli.main import main
from lora_jax.train import classifier, finetune
from lora_jax.train.predict import predict
from parity_tests.models import tiny
from parity_tests.train.option_runs import (
    BASE,
    OTHER,
    PATIENT,
    PREFIX,
    Prepared,
    argv,
    first_labels,
    rows,
    write,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("options")
    (root / "model").mkdir()
    (root / "other").mkdir()
    return SimpleNamespace(
        root=root,
        model=tiny.save_model(root / "model", layers=1),
        other=tiny.save_model(root / "other", seed=1, layers=1),
        table=write(root / "table.csv", ("id", "text", "label"), rows()),
        renamed=write(root / "renamed.csv", ("label", "body", "kind"), rows()),
    )


@pytest.fixture(scope="module")
def run(world):
    """Run ``finetune`` with the base options but for some, each once; return what it wrote."""

    @functools.cache
    def once(changes):
        out = world.root / f"out{len(list(world.root.iterdir()))}"
        assert main(argv(world.model, world.table, out, dict(changes))) == 0
        record = json.loads((out / "run.json").read_text())
        config = json.loads((out / "adapter_config.json").read_text())
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return SimpleNamespace(
            out=out,
            tensors=load_file(out / "adapter_model.safetensors"),
            config=config,
            record=record,
            events=[json.loads(line) for line in lines],
        )

    return lambda **changes: once(tuple(sorted(changes.items())))


@pytest.fixture
def parts(world, monkeypatch):
    """Return the texts of the three parts, as training gets them."""

    def chosen(**changes):
        seen = []

        def encode(tokenizer, texts, *args, **kwargs):
            seen.append(tuple(texts))
            if len(seen) == 3:
                raise Prepared
            return real(tokenizer, texts, *args, **kwargs)

        with monkeypatch.context() as patch:
            real = classifier.encode
            patch.setattr(classifier, "encode", encode)
            with pytest.raises(Prepared):
                main(argv(world.model, world.table, world.root / "never", changes))
        return tuple(seen)

    return chosen


@pytest.fixture
def start(world, monkeypatch):
    """Return the adapters before the first step; nothing is compiled."""

    def drawn(**changes):
        def score(evaluate, params, adapters, *rest):
            seen.update(adapters)
            raise Prepared

        seen = {}
        with monkeypatch.context() as patch:
            patch.setattr(finetune, "score_rows", score)
            with pytest.raises(Prepared):
                main(argv(world.model, world.table, world.root / "never", changes))
        return in_file(seen)

    return drawn


def in_file(adapters):
    """Return the values of each tensor as the file has them, by the file's names."""
    found = {}
    for path, one in adapters.items():
        module, leaf = path.rsplit(".", 1)
        if hasattr(one, "value"):
            torch_name = {"kernel": "weight"}.get(leaf, leaf)
            found[f"{PREFIX}{module}.{torch_name}"] = np.asarray(one.value).T
        else:
            found[f"{PREFIX}{module}.lora_A.weight"] = np.asarray(one.a).T
            found[f"{PREFIX}{module}.lora_B.weight"] = np.asarray(one.b).T
    return found


def of(part):
    labels = first_labels()
    return Counter(labels[text] for text in part)


def same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def differing(one, other):
    return {name for name in one | other if one.get(name) != other.get(name)}


def test_every_option_has_a_law_here():
    """A new option needs one: a line here says which test holds it."""
    held = {
        "model": test_another_model_is_trained_and_recorded,
        "data": test_columns_are_named_and_nothing_else_follows,
        "text_column": test_columns_are_named_and_nothing_else_follows,
        "label_column": test_columns_are_named_and_nothing_else_follows,
        "output": test_equal_options_give_equal_files_wherever_they_go,
        "overwrite": test_an_earlier_run_is_replaced_on_demand_alone,
        "r": test_the_rank_is_that_of_every_pair,
        "lora_alpha": test_the_result_is_what_the_saved_files_give,
        "target_modules": test_the_targets_are_what_is_adapted,
        "epochs": test_epochs_and_batch_size_decide_the_steps,
        "batch_size": test_epochs_and_batch_size_decide_the_steps,
        "max_length": test_longer_texts_are_cut_in_training_and_in_use,
        "learning_rate": test_rate_and_decay_move_every_value_as_adamw_does,
        "weight_decay": test_rate_and_decay_move_every_value_as_adamw_does,
        "seed": test_the_seed_decides_the_start_and_not_the_parts,
        "split_seed": test_the_split_seed_decides_the_parts_alone,
        "balance": test_balance_cuts_the_larger_class,
        "patience": test_patience_stops_and_keeps_the_best,
        "limit": test_the_limit_is_the_number_of_texts,
        "cache": test_the_cache_is_where_both_downloads_go,
    }
    assert held.keys() == {field.name for field in dataclasses.fields(finetune.FinetuneOptions)}


# Which texts are used


def test_every_text_is_in_one_part_and_the_first_label_counts(parts):
    train, validation, test = parts()
    assert (len(train), len(validation), len(test)) == (28, 4, 8)
    together = [*train, *validation, *test]
    assert sorted(together) == sorted(first_labels())


def test_the_split_seed_decides_the_parts_alone(parts):
    base = parts()
    other = parts(split_seed=5)
    assert list(map(len, other)) == list(map(len, base))
    assert sorted(sum(other, ())) == sorted(sum(base, ()))
    assert all(set(x) != set(y) for x, y in zip(base, other, strict=True))
    for changes in ({"batch_size": 3}, {"r": 3}, {"epochs": 5}, {"patience": 2}, {"seed": 9}):
        assert parts(**changes) == base, changes


def test_the_limit_is_the_number_of_texts(parts):
    base, limited = parts(), parts(limit=20)
    assert list(map(len, limited)) == [14, 2, 4]
    assert len(set(sum(limited, ()))) == 20 and set(sum(limited, ())) < set(sum(base, ()))
    # at random, where the table has one class after the other
    assert set(of(sum(limited, ()))) == {"ham", "spam"}
    assert set(sum(parts(limit=20, split_seed=5), ())) != set(sum(limited, ()))
    assert sorted(sum(parts(limit=1000), ())) == sorted(sum(base, ()))


def test_balance_cuts_the_larger_class(parts):
    every = {"ham": 14, "spam": 26}
    wanted = {"auto": every, "no": every, "yes": {"ham": 14, "spam": 14}}
    for balance, counts in wanted.items():
        assert of(sum(parts(balance=balance), ())) == counts, balance
    chosen = [set(sum(parts(balance="yes", split_seed=n), ())) for n in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_without_a_table_the_collection_is_balanced(world, monkeypatch, capsys):
    seen = []

    def split(texts, **options):
        seen.append(np.bincount(texts.labels).tolist())
        raise Prepared

    monkeypatch.setattr(finetune, "_read_sms", lambda *args: finetune._read_own(given))
    monkeypatch.setattr(finetune.data, "split", split)
    given = finetune.FinetuneOptions(data=world.table)
    for balance in ("auto", "no", "yes"):
        with pytest.raises(Prepared):
            main(["finetune", "--output", str(world.root / "never"), "--balance", balance])
    assert seen == [[14, 14], [14, 26], [14, 14]]


def test_columns_are_named_and_nothing_else_follows(run, world):
    base = run()
    other = run(data=world.renamed, text_column="body", label_column="kind")
    same_tensors(base.tensors, other.tensors)
    assert base.config == other.config
    assert base.record["classes"] == other.record["classes"] == ["ham", "spam"]


# What is trained


def test_equal_options_give_equal_files_wherever_they_go(run, world):
    base, out = run(), world.root / "elsewhere" / "deep"
    assert main(argv(world.model, world.table, out, {})) == 0
    same_tensors(base.tensors, load_file(out / "adapter_model.safetensors"))
    assert base.config == json.loads((out / "adapter_config.json").read_text())


def test_an_earlier_run_is_replaced_on_demand_alone(run, world, capsys):
    base = run()
    before = {path.name: path.read_bytes() for path in base.out.iterdir()}
    assert main(argv(world.model, world.table, base.out, {})) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in base.out.iterdir()} == before


def test_the_rank_is_that_of_every_pair(run, start, world):
    base, other = run(), run(**OTHER)
    assert differing(base.config, other.config) == {"r", "lora_alpha"}
    assert (other.config["r"], other.config["lora_alpha"]) == (3, 60)
    for name, value in other.tensors.items():
        old = base.tensors[name].shape
        wanted = tuple(3 if size == 2 else size for size in old) if "lora_" in name else old
        assert value.shape == wanted, name
    trained, result = sum(value.size for value in other.tensors.values()), other.record["result"]
    assert result["trainable"] == trained
    weights = other.out / "adapter_model.safetensors"
    assert result["adapter_bytes"] == weights.stat().st_size
    # The head is counted once, among what is trained.
    stored = load_file(world.model / "model.safetensors").values()
    head = sum(v.size for name, v in other.tensors.items() if "classifier" in name)
    pairs = trained - head
    frozen = sum(value.size for value in stored)
    assert result["share"] == pytest.approx(trained / (frozen + head + pairs), rel=1e-6)


def test_alpha_leaves_the_start_as_it_is(start):
    same_tensors(start(), start(lora_alpha=60))


def test_the_result_is_what_the_saved_files_give(run, parts):
    """So training multiplies by the same alpha / r as whoever loads the files."""
    labels = first_labels()
    _, _, test = parts()
    for changes in ({}, OTHER):
        one = run(**changes)
        found = predict(one.out, test)
        loss = -np.mean([math.log(p.probabilities[labels[p.text]]) for p in found])
        hits = np.mean([p.label == labels[p.text] for p in found])
        result = one.record["result"]
        assert result["loss_after"] == pytest.approx(loss, rel=1e-4), changes
        assert result["accuracy_after"] == pytest.approx(hits), changes
    # Where nothing moves, the files are the start.
    still = run(**PATIENT)
    hits = np.mean([p.label == labels[p.text] for p in predict(still.out, test)])
    for one in (still, run(), run(**OTHER)):
        assert one.record["result"]["accuracy_before"] == pytest.approx(hits)
    own = np.mean([p.label == labels[p.text] for p in predict(still.out, parts()[1])])
    assert own != pytest.approx(hits), "the validation part would give the same"
    # What is trained alone differs: alpha is ten times as large.
    losses = [run(**changes).record["result"]["loss_after"] for changes in ({}, OTHER)]
    assert abs(losses[0] - losses[1]) > 1e-2


def test_the_targets_are_what_is_adapted(start):
    base = start()
    wanted = {
        ("query", "value"): {"query", "value"},
        ("key",): {"key"},
        ("all-linear",): {"query", "key", "value", "dense"},
    }
    for targets, modules in wanted.items():
        found = start(target_modules=targets)
        adapted = {name.split(".")[-3] for name in found if "lora_" in name}
        assert adapted == modules, targets
        # A target more changes nothing for the others.
        for name in found.keys() & base.keys():
            np.testing.assert_array_equal(found[name], base[name])
    same_tensors(base, start(target_modules=("query", "value")))


def test_epochs_and_batch_size_decide_the_steps(run):
    one, base = run(**PATIENT), run()
    steps = [event for event in one.events if event["event"] == "step"]
    assert [event["rows"] for event in steps] == 3 * [8, 8, 8, 4]
    assert [event["epoch"] for event in steps] == 4 * [1] + 4 * [2] + 4 * [3]
    assert {event["total_steps"] for event in steps} == {9 * 4}
    assert one.record["steps"] == one.record["result"]["steps"] == 12
    assert [event["rows"] for event in base.events if event["event"] == "step"] == [28, 28]
    assert sum(event["event"] == "epoch" for event in base.events) == 2
    assert base.record["stop"] == "finished"
    # an epoch's loss and accuracy are those of its rows
    epoch = next(event for event in one.events if event["event"] == "epoch")
    loss = sum(event["loss"] * event["rows"] for event in steps[:4]) / 28
    assert epoch["train_loss"] == pytest.approx(loss, rel=1e-6)
    assert epoch["train_accuracy"] == pytest.approx(steps[3]["accuracy"])
    # Nothing moves there, and the first step of the base sees the same start.
    first = next(event for event in base.events if event["event"] == "step")
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    assert one.config == base.config
    results = [each.record["result"]["accuracy_before"] for each in (one, base)]
    assert results[0] == results[1]


def test_rate_and_decay_move_every_value_as_adamw_does(run, start):
    for changes in ({}, OTHER):
        one, began = run(**changes), start(**changes)
        rate, decay = ((BASE | changes)[name] for name in ("learning_rate", "weight_decay"))
        rates = [event["learning_rate"] for event in one.events if event["event"] == "step"]
        np.testing.assert_allclose(rates, [0.0, rate], rtol=1e-6)
        assert one.tensors.keys() == began.keys()
        for name, value in one.tensors.items():
            moved = value - began[name] * np.float32(1 - rate * decay)
            if ".lora_A." in name:
                # B is 0 in both steps, so A has no gradient and decays alone.
                np.testing.assert_allclose(moved, 0, atol=1e-6, err_msg=name)
                continue
            # Adam's eps takes something from the smallest gradients alone.
            assert np.abs(moved).max() <= rate * (1 + 1e-4), name
            assert np.median(np.abs(moved)) >= rate * (1 - 1e-3), name


def test_longer_texts_are_cut_in_training_and_in_use(run, world):
    # [CLS], four words and [SEP]
    cut = [(" ".join(text.split()[:4]), label) for text, label in rows()]
    assert len({text for text, _ in cut}) == len(first_labels()), "the cut texts stay different"
    table = write(world.root / "cut.csv", ("id", "text", "label"), cut)
    one, other = run(max_length=6), run(max_length=6, data=table)
    same_tensors(one.tensors, other.tensors)
    assert one.record["max_length"] == 6 and one.config == run().config
    assert any((one.tensors[name] != run().tensors[name]).any() for name in one.tensors)
    long, short = predict(one.out, [rows()[0][0], cut[0][0]])
    assert long.probabilities == short.probabilities
    long, short = predict(run().out, [rows()[0][0], cut[0][0]])
    assert long.probabilities != short.probabilities


def test_the_seed_decides_the_start_and_not_the_parts(start, parts):
    base, other = start(), start(seed=7)
    assert parts() == parts(seed=7)
    same_tensors(base, start(split_seed=5))
    for name, value in base.items():
        moved = np.abs(value - other[name]).max()
        # B and the bias begin at 0
        assert (moved > 1e-3) == (".lora_A." in name or name.endswith("classifier.weight")), name
    names = [name for name in base if ".lora_A." in name]
    assert not np.allclose(base[names[0]], base[names[1]])


def test_patience_stops_and_keeps_the_best(run):
    """No epoch is better than the first, whose adapters the next step would take."""
    one = run(**PATIENT)
    assert sum(event["event"] == "epoch" for event in one.events) == 3
    assert "no better validation accuracy in 2 epochs" in one.record["stop"]
    # One rate a step, rising from 0 to the third of 36 steps; then each later step falls by
    # 1/33 of it. A value of B whose gradient keeps its sign has moved by their sum.
    rates = [event["learning_rate"] for event in one.events if event["event"] == "step"]
    first, whole = sum(rates[:4]), sum(rates)
    moved = np.concatenate([v.ravel() for n, v in one.tensors.items() if ".lora_B." in n])
    assert 0.5 * first < np.abs(moved).max() < 1.01 * first < 0.5 * whole


def test_another_model_is_trained_and_recorded(run, world):
    base, other = run(), run(model=world.other)
    assert other.record["base_model"] == other.config["base_model_name_or_path"]
    assert other.record["base_model"] == str(world.other.resolve())
    assert differing(base.config, other.config) == {"base_model_name_or_path"}
    assert base.config["task_type"] == "SEQ_CLS" and base.config["peft_type"] == "LORA"
    assert base.record["result"]["loss_after"] != other.record["result"]["loss_after"]
    text = rows()[0][0]
    [own], [moved] = predict(base.out, [text]), predict(base.out, [text], model=str(world.other))
    assert own.probabilities != moved.probabilities


def test_the_cache_is_where_both_downloads_go(world, monkeypatch):
    seen = {}

    def fetch(asset, *, cache, progress):
        seen["data"] = cache
        return world.root

    def resolve(name, *, cache, progress):
        seen["model"] = cache
        raise Prepared

    monkeypatch.setattr(finetune, "fetch", fetch)
    monkeypatch.setattr(finetune.reading, "read_sms", lambda path: texts)
    monkeypatch.setattr(classifier, "resolve_model", resolve)
    texts = finetune.reading.read_table(world.table)
    with pytest.raises(Prepared):
        main(["finetune", "--output", str(world.root / "never"), "--cache", str(world.root / "c")])
    assert seen == {"data": world.root / "c", "model": world.root / "c"}
