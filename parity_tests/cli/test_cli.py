"""``lora-jax`` as users run it: the whole way round, and every way in which input can be bad."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax.cli import console
from lora_jax.cli.main import main
from lora_jax.core.errors import OutputError
from lora_jax.core.io import atomic_files
from lora_jax.train import finetune as finetuning
from lora_jax.train import option_limits
from lora_jax.train.finetune import FinetuneOptions, finetune
from lora_jax.train.loop import EpochEvent, Interrupted, StepEvent
from lora_jax.train.predict import merge_to, predict
from parity_tests.models import tiny

ROOT = Path(lora_jax.__file__).parent.parent
TEXTS = ["win cash prize now", "dinner at home tomorrow", "thanks love"]
SMALL = "--r 4 --max-length 12 --batch-size 8 --learning-rate 3e-2".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return tiny.save_table(tmp_path_factory.mktemp("data") / "table.csv")


@pytest.fixture(scope="module")
def trained(model, table, tmp_path_factory):
    """A finished run; its output on stdout is in ``log``."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        log = out.parent / "log"
        with log.open("w") as stream:
            patch.setattr(sys, "stdout", stream)
            assert main(arguments(model, table, out, "--epochs", "12")) == 0
    return out


def arguments(model, table, out, *more):
    known = ["--model", model, "--data", table, "--output", out]
    return ["finetune", *map(str, known), *SMALL, *map(str, more)]


def digest(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()} if directory.is_dir() else None


def fails(capsys, argv, *said, code=2):
    """Hold one clear message, nothing on stdout that looks like success, and the exit code."""
    assert main([str(a) for a in argv]) == code
    captured = capsys.readouterr()
    for words in said:
        assert words in captured.err, captured.err
    assert captured.err.startswith("lora-jax: ") and "Traceback" not in captured.err
    assert "next:" not in captured.out


def test_the_log_of_a_run_is_short_and_ends_with_the_summary(trained):
    log = (trained.parent / "log").read_text()
    assert "trainable 434 of" in log and "140 texts for training, 20 validation, 40 test" in log
    assert "test accuracy before training" in log
    assert log.count("step ") == 10 and log.count("epoch ") == 12 and "\x1b" not in log
    result = json.loads((trained / "run.json").read_text())["result"]
    assert result["accuracy_after"] >= 0.9
    for words in ("434 (", f"{result['accuracy_before']:.1%} before", "before, ", "bytes"):
        assert words in log
    assert log.splitlines()[-1].startswith(f"next: lora-jax predict {trained} ")


def test_predict_prints_one_line_for_each_text_and_table_row(trained, capsys, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text('{"body": "free\\toffer\\nnow"}\n{"body": "later okay"}\n')
    argv = ["predict", trained, *TEXTS, "--data", more, "--text-column", "body"]
    assert main([str(a) for a in argv]) == 0
    captured = capsys.readouterr()
    lines = [line.split("\t") for line in captured.out.splitlines()]
    assert [line[2] for line in lines] == [*TEXTS, "free offer now", "later okay"]
    assert [line[0] for line in lines] == ["spam", "ham", "ham", "spam", "ham"]
    assert all(0.5 <= float(line[1]) <= 1 for line in lines) and not captured.err
    assert main(["predict", str(trained), "naïve\ttext", "--json"]) == 0
    [one] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert one["text"] == "naïve\ttext" and sum(one["probabilities"].values()) == pytest.approx(1)
    assert one["probability"] == one["probabilities"][one["label"]]


def test_the_merged_model_predicts_the_same_in_plain_transformers(trained, capsys, tmp_path):
    out = tmp_path / "merged"
    assert main(["merge", str(trained), str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert theirs.config.id2label == {0: "ham", 1: "spam"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(out / "tokenizer.json"), pad_token="[PAD]"
    )
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        wanted = torch.softmax(theirs(**inputs).logits, -1).numpy()
    ours = [list(p.probabilities.values()) for p in predict(trained, TEXTS)]
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)
    before = digest(out)
    fails(capsys, ["merge", trained, out], "already holds files", "--overwrite")
    assert digest(out) == before
    (out / "notes.txt").write_text("mine")
    assert main(["merge", str(trained), str(out), "--overwrite"]) == 0
    assert digest(out) == before | {"notes.txt": b"mine"}


def test_merging_never_replaces_the_base_model(trained, model, capsys):
    before = digest(model)
    fails(capsys, ["merge", trained, model, "--overwrite"], "holds the base model")
    assert digest(model) == before


def test_the_number_of_texts_at_a_time_changes_nothing(trained):
    one, three = predict(trained, TEXTS, batch_size=1), predict(trained, TEXTS, batch_size=2)
    assert [p.label for p in one] == [p.label for p in three]
    np.testing.assert_allclose(
        [p.probability for p in one], [p.probability for p in three], rtol=1e-5
    )


BAD_TABLES = {
    "missing": (None, ["No such file"]),
    "wrong column": (b"body,label\na,b\n", ["column 'text': got 0 of it"]),
    "empty": (b"", ["got an empty file"]),
    "one class": (b"text,label\na,ham\nb,ham\n", ["one class 'ham'"]),
    "not utf-8": (b"text,label\ncaf\xe9,ham\n", ["0xe9", "save the file as UTF-8"]),
    "few rows": (b"text,label\na,ham\nb,spam\n", ["got 2 rows", "at least 10"]),
    "rare class": (
        b"text,label\n" + b"".join(b"%d,ham\n" % i for i in range(40)) + b"x,spam\n",
        ["the training part lacks a class", "spam: no text"],
    ),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables(case, model, tmp_path, capsys):
    content, said = BAD_TABLES[case]
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_bytes(content)
    # a split that puts the only text of the rare class into the test part
    argv = arguments(model, path, tmp_path / "out", "--split-seed", "0")
    fails(capsys, argv, *said)
    assert not digest(tmp_path / "out")


BAD_OPTIONS = {
    "r = 0": (["--r", "0"], ["r: got 0, wanted an integer of at least 1"]),
    "no match": (["--target-modules", "quarry"], ["quarry"]),
    "ranges": (
        ["--learning-rate", "0", "--max-length", "-1", "--limit", "3", "--seed", "-1"],
        ["learning_rate: got 0", "max_length: got -1", "limit: got 3", "seed: got -1"],
    ),
    "epochs": (["--epochs", "0", "--batch-size", "0"], ["epochs: got 0", "batch_size: got 0"]),
    "long texts": (["--max-length", "40"], ["max_length: got 40, wanted 1 to 20"]),
    "no room": (["--max-length", "2"], ["max_length: got 2"]),
    "no such model": (["--model", "no-such-model"], ["no directory, no alias", "minilm"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case, model, table, tmp_path, capsys):
    more, said = BAD_OPTIONS[case]
    fails(capsys, arguments(model, table, tmp_path / "out", *more), *said)
    assert not digest(tmp_path / "out")


def test_usage_errors_are_exit_code_2(capsys):
    for argv in (["finetune", "--r", "many"], ["finetun"], [], ["merge", "only-one"]):
        assert main(argv) == 2
        assert capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_truncated_model_files(name, model, table, tmp_path, capsys):
    broken = shutil.copytree(model, tmp_path / "broken")
    content = (broken / name).read_bytes()
    (broken / name).write_bytes(content[: len(content) // 2])
    fails(capsys, arguments(broken, table, tmp_path / "out"), name)


def test_truncated_adapter_files(trained, tmp_path, capsys):
    for name in ("adapter_model.safetensors", "adapter_config.json", "run.json"):
        broken = shutil.copytree(trained, tmp_path / name)
        content = (broken / name).read_bytes()
        (broken / name).write_bytes(content[: len(content) // 2])
        fails(capsys, ["predict", broken, "text"], name)
        fails(capsys, ["merge", broken, tmp_path / "merged"], name)
        (broken / name).unlink()
        fails(capsys, ["predict", broken, "text"], name)
    fails(capsys, ["predict", tmp_path / "nowhere", "text"], "run.json", "lora-jax finetune")
    fails(capsys, ["predict", trained], "no text to classify")
    fails(capsys, ["predict", trained, "x", "--model", "no-such-model"], "no-such-model")


def test_an_occupied_output_is_refused_and_never_cleared(model, table, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    (out / "run.json").write_text("old")
    before = digest(out)
    argv = arguments(model, table, out, "--epochs", "1", "--limit", "40")
    fails(capsys, argv, "already holds files", "--overwrite")
    assert digest(out) == before
    assert main([*argv, "--overwrite"]) == 0
    after = digest(out)
    assert after["thesis.txt"] == b"years of work" and json.loads(after["run.json"])["classes"]
    assert len(after) == 6


def test_outputs_that_cannot_be_written(model, table, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        fails(capsys, arguments(model, table, out), "cannot write to", "Choose another directory")
    assert (tmp_path / "file").read_text() == "mine"


def full_disk(monkeypatch, names):
    """Make every sync of a file with one of these names fail as a full disk does."""
    real = os.fsync

    def fsync(handle):
        if any(name in os.readlink(f"/proc/self/fd/{handle}") for name in names):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(atomic_files.os, "fsync", fsync)


def test_a_full_disk_at_the_end(model, table, tmp_path, capsys, monkeypatch):
    full_disk(monkeypatch, ["adapter_model"])
    argv = arguments(model, table, tmp_path / "out", "--epochs", "2", "--limit", "40")
    fails(capsys, argv, "No space left on device", "Free some space")
    assert not [n for n in digest(tmp_path / "out") if n.startswith((".", "adapter"))]


def test_a_disk_that_fills_up_leaves_the_adapter_of_the_last_epoch(
    model, table, tmp_path, capsys, monkeypatch
):
    out, seen = tmp_path / "out", []

    def observe(event):
        if isinstance(event, EpochEvent) and event.epoch == 1:
            seen.append(digest(out)["adapter_model.safetensors"])
            full_disk(monkeypatch, ["adapter_model"])

    options = FinetuneOptions(
        model=str(model), data=table, output=out, epochs=2, limit=40, max_length=12
    )
    with pytest.raises(OutputError, match="No space left"):
        finetune(options, observe)
    assert digest(out)["adapter_model.safetensors"] == seen[0]
    assert len(predict(out, TEXTS)) == 3


def test_metrics_that_cannot_be_written_do_not_stop_training(
    model, table, tmp_path, capsys, monkeypatch
):
    def append(path, event):
        raise OutputError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(finetuning, "append", append)
    assert main(arguments(model, table, tmp_path / "out", "--epochs", "1", "--limit", "40")) == 0
    out = capsys.readouterr().out
    assert out.count("metrics.jsonl: No space left on device") == 1 and "next:" in out


def interrupt_at(step, monkeypatch):
    real = console.Reporter.step

    def observe(self, event):
        if event.step == step:
            raise KeyboardInterrupt
        real(self, event)

    monkeypatch.setattr(console.Reporter, "step", observe)


def test_an_interrupt_saves_the_adapter(model, table, tmp_path, capsys, monkeypatch):
    interrupt_at(4, monkeypatch)
    out = tmp_path / "out"
    argv = arguments(model, table, out, "--epochs", "9")
    fails(capsys, argv, "interrupted after step 4", f"saved in {out}", code=130)
    record = json.loads((out / "run.json").read_text())
    assert (record["steps"], record["stop"], record["result"]) == (4, "interrupted", None)
    assert set(digest(out)) >= {"adapter_config.json", "adapter_model.safetensors", "curves.png"}
    assert [p.label for p in predict(out, TEXTS)]
    one_epoch = load_file(out / "adapter_model.safetensors")
    assert all(np.isfinite(tensor).all() and tensor.any() for tensor in one_epoch.values())


def test_an_interrupt_before_training(model, table, tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "load_classifier", stop)
    fails(capsys, arguments(model, table, tmp_path / "out"), "nothing was trained yet", code=130)
    assert not digest(tmp_path / "out")


def test_the_function_lets_the_interrupt_through(model, table, tmp_path):
    def observe(event):
        if isinstance(event, StepEvent):
            raise KeyboardInterrupt

    options = FinetuneOptions(model=str(model), data=table, output=tmp_path, max_length=12)
    with pytest.raises(Interrupted):
        finetune(options, observe)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_training_that_breaks_down_saves_the_last_good_adapter(
    model, table, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(option_limits, "RATE", 1e38)  # so that it surely breaks down
    out = tmp_path / "out"
    argv = arguments(model, table, out, "--learning-rate", "1e30")
    fails(capsys, argv, "not finite at step 2 of", "lower learning rate", str(out), code=1)
    assert json.loads((out / "run.json").read_text())["steps"] == 1
    assert len(predict(out, TEXTS)) == 3


def test_a_model_with_broken_weights_is_refused_before_the_first_step(
    model, table, tmp_path, capsys
):
    broken, out = shutil.copytree(model, tmp_path / "broken"), tmp_path / "out"
    tensors = load_file(broken / "model.safetensors")
    tensors["pooler.dense.bias"][:] = np.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    argv = arguments(broken, table, out)
    fails(capsys, argv, "values that are not finite", "pooler.dense.bias: 24 of 24 values")
    assert not digest(out)


def test_missing_extras_are_named_before_anything_is_done(
    model, table, tmp_path, capsys, monkeypatch
):
    for name in ("tyro", "rich", "matplotlib", "tokenizers"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            argv = arguments(model, table, tmp_path / "out")
            fails(capsys, argv, f"{name}: ", 'pip install "lora_jax[demo]"')
    assert not (tmp_path / "out").exists()


def test_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lora-jax {lora_jax.__version__}\n"
    helps = {}
    for argv in ([], ["finetune"], ["predict"], ["merge"]):
        assert main([*argv, "--help"]) == 0
        helps[" ".join(argv)] = capsys.readouterr().out
    assert all(name in helps[""] for name in ("finetune", "predict", "merge"))
    fields = FinetuneOptions.__dataclass_fields__
    for name in fields:
        assert f"--{name.replace('_', '-')}" in helps["finetune"]
    assert helps["finetune"].count("(default:") == len(fields)
    assert "DIRECTORY" in helps["predict"] and "TEXTS" in helps["predict"]
    assert "DIRECTORY OUT" in helps["merge"]


def lora_jax_process(*argv, **more):
    # Whoever started pytest may have Ctrl-C ignored, which a child would inherit.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from lora_jax.cli.main import main; sys.exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


@pytest.mark.slow
def test_a_process_that_is_interrupted_saves_and_says_so(model, table, tmp_path):
    out = tmp_path / "out"
    process = lora_jax_process(*arguments(model, table, out, "--epochs", "100000"))
    deadline = time.monotonic() + 60
    while not (out / "adapter_model.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert error.startswith("lora-jax: interrupted after step ") and len(error.splitlines()) == 1
    assert json.loads((out / "run.json").read_text())["stop"] == "interrupted"


def test_a_reader_that_has_enough_is_no_error(trained):
    process = lora_jax_process("predict", trained, *TEXTS)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_minilm_on_sms_spam(seed, tmp_path):
    result = finetune(FinetuneOptions(output=tmp_path / "out", seed=seed))
    assert result.trainable == 74_498 and result.adapter_bytes <= 302_000
    assert result.accuracy_before < 0.6 and result.accuracy_after >= 0.94
    found = predict(
        tmp_path / "out", ["You have won a prize. Call 09061701461 to claim", "See you at lunch"]
    )
    assert [p.label for p in found] == ["spam", "ham"]
    merge_to(tmp_path / "out", tmp_path / "merged")
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
