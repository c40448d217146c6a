"""Every option of the commands on files: what it changes in the result, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import cli as commands
from lora_jax.cli import main as cli
from lora_jax.cli import merge as merging
from lora_jax.cli.main import main
from lora_jax.core.errors import OutputError
from lora_jax.models import planning
from lora_jax.parity import suite
from lora_jax.parity.reports.checks import Check
from lora_jax.parity.reports.report import from_json
from lora_jax.parity.verdicts import TensorVerdict, Verdict
from lora_jax.train import classifier
from lora_jax.train import predict as predicting
from parity_tests.models import tiny
from parity_tests.train.option_runs import PREFIX, Prepared, argv, rows, write

# All alike, so that each operation is compiled once.
SIZES = dict.fromkeys(("a.q", "a.v", "b.q"), (6, 5))


def run(capsys, *words, code=0):
    assert main([str(word) for word in words]) == code
    return capsys.readouterr()


def save_adapter(directory, seed, *, r=2, alpha=3, modules=tuple(SIZES), base="base"):
    """Write an adapter as PEFT does; return ΔW of each module in float64."""
    rng = np.random.default_rng(seed)
    directory.mkdir()
    tensors, changes = {}, {}
    for name in modules:
        fan_in, out = SIZES[name]
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((r, fan_in), (out, r)))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
        changes[name] = alpha / r * (b.astype(np.float64) @ a)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": list(modules)}
    config["base_model_name_or_path"] = base
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return changes


def read(directory):
    return (
        json.loads((directory / "adapter_config.json").read_text()),
        load_file(directory / "adapter_model.safetensors"),
    )


def changes_of(directory):
    """Return ΔW of each module of a directory, and its rank."""
    config, tensors = read(directory)
    patterns = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    found, ranks = {}, {}
    for key, a in tensors.items():
        if ".lora_A." not in key:
            continue
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        r, alpha = (
            next((v for k, v in pattern.items() if k == name or name.endswith(f".{k}")), given)
            for pattern, given in zip(patterns, (config["r"], config["lora_alpha"]), strict=True)
        )
        assert a.shape[0] == r
        b = tensors[key.replace("lora_A", "lora_B")].astype(np.float64)
        found[name], ranks[name] = alpha / r * (b @ a), r
    return found, ranks


def close(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def names_of(options):
    return {field.name for field in dataclasses.fields(options)}


def test_every_option_has_a_law():
    """A new option needs one, here or where the name leads."""
    held = {
        cli.PredictOptions: "directory texts data text_column json model batch_size cache",
        cli.MergeOptions: "paths overwrite model cache",
        cli.PlanOptions: "model target_modules exclude_modules r lora_alpha materialize cache",
        commands.InspectOptions: "adapter",
        commands.CombineOptions: "out adapters weights type svd_rank density majority_sign_method"
        " seed overwrite",
        commands.DiffOptions: "one other",
        commands.ConvertOptions: "source out modules part lora_alpha base_model overwrite",
        commands.ParityOptions: "levels only seed output overwrite against jax torch inputs mapping"
        " oracle mutants",
    }
    assert {options: set(names.split()) for options, names in held.items()} == {
        options: names_of(options) for options in held
    }


# predict and merge, on what finetune wrote


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("model", "other")):
        (root / name).mkdir()
        tiny.save_model(root / name, seed=seed, layers=1)
    return SimpleNamespace(root=root, model=root / "model", other=root / "other")


@pytest.fixture(scope="module")
def trained(models):
    table = write(models.root / "table.csv", ("id", "text", "label"), rows())
    out = models.root / "out"
    assert main(argv(models.model, table, out, {})) == 0
    return SimpleNamespace(**vars(models), table=table, out=out)


def test_predict_gives_json_the_same_numbers_and_every_class(trained, capsys):
    texts = ["win cash now", "dinner later", "win cash now"]
    plain = run(capsys, "predict", trained.out, *texts).out.splitlines()
    told = run(capsys, "predict", trained.out, *texts, "--json").out.splitlines()
    found = [json.loads(line) for line in told]
    assert [one["text"] for one in found] == texts and found[0] == found[2]
    for line, one in zip(plain, found, strict=True):
        assert one["probabilities"].keys() == {"ham", "spam"}
        assert one["label"] == max(one["probabilities"], key=one["probabilities"].get)
        assert one["probability"] == one["probabilities"][one["label"]]
        assert line.split("\t") == [one["label"], f"{one['probability']:.4f}", one["text"]]


def test_predict_takes_the_texts_then_the_tables_and_as_many_at_a_time_as_asked(
    trained, capsys, monkeypatch
):
    table = write(trained.root / "more.csv", ("id", "body", "text"), [("prize now", "no text")])
    sizes, real = [], predicting.batches

    def batches(tokens, labels, size, **more):
        sizes.append((len(tokens.input_ids), size))
        return real(tokens, labels, size, **more)

    monkeypatch.setattr(predicting, "batches", batches)
    words = ["predict", trained.out, "win cash", "dinner", "thanks love", "--data", table]
    by_column = {}
    for column, wanted in (("body", "prize now"), ("text", "no text")):
        lines = run(capsys, *words, "--text-column", column).out.splitlines()
        by_column[column] = lines
        texts = [line.split("\t")[2] for line in lines]
        assert texts == ["win cash", "dinner", "thanks love", wanted]
    assert by_column["body"][:3] == by_column["text"][:3]
    lines = run(capsys, *words, "--batch-size", 3).out.splitlines()
    assert lines == by_column["text"] and sizes == [(4, 4), (4, 4), (4, 3)]


def test_another_base_model_is_the_one_that_is_used(trained, capsys, tmp_path):
    moved = shutil.copytree(trained.model, tmp_path / "copy")
    plain = run(capsys, "predict", trained.out, "win cash").out
    for model, same in ((moved, True), (trained.other, False)):
        found = run(capsys, "predict", trained.out, "win cash", "--model", model).out
        assert (found == plain) == same
    merged = {}
    for name, more in (
        ("own", []),
        ("moved", ["--model", moved]),
        ("other", ["--model", trained.other]),
    ):
        run(capsys, "merge", trained.out, tmp_path / name, *more)
        merged[name] = load_file(tmp_path / name / "model.safetensors")
    for key, value in merged["own"].items():
        np.testing.assert_array_equal(value, merged["moved"][key])
    # what the adapter adds is the same, whatever it is added to
    key = "bert.encoder.layer.0.attention.self.query.weight"
    stored = [load_file(d / "model.safetensors") for d in (trained.model, trained.other)]
    name = next(name for name in stored[0] if name.endswith(key.removeprefix("bert.")))
    added = [merged["own"][key] - stored[0][name], merged["other"][key] - stored[1][name]]
    np.testing.assert_allclose(added[0], added[1], atol=1e-6)
    assert np.abs(added[0]).max() > 1e-3


def test_the_cache_is_where_the_model_is_looked_for(trained, monkeypatch, tmp_path):
    seen = []

    def resolve(name, *, cache, progress):
        seen.append(cache)
        raise Prepared

    monkeypatch.setattr(classifier, "resolve_model", resolve)
    monkeypatch.setattr(planning, "resolve_model", resolve)
    for words in (
        ["predict", trained.out, "text"],
        ["merge", trained.out, tmp_path / "out"],
        ["plan", "minilm"],
    ):
        for more, wanted in (([], None), (["--cache", tmp_path / "c"], tmp_path / "c")):
            with pytest.raises(Prepared):
                main([str(word) for word in (*words, *more)])
            assert seen.pop() == wanted, words


def test_merge_has_no_option_without_effect(models, capsys, tmp_path):
    words = ["merge", models.model, models.other, tmp_path / "out"]
    for more in (["--model", "minilm"], ["--cache", tmp_path]):
        said = run(capsys, *words, *more, code=2)
        assert more[0] in said.err and not (tmp_path / "out").exists()


def stored(directory, tensors, **config):
    """Write a model directory of these tensors."""
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_head_shares_the_embedding_unless_the_model_says_otherwise(tmp_path, capsys):
    """Older configurations do not say it, and transformers takes them for tied."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((7, 4)).astype("f4")
    (tmp_path / "adapter").mkdir()
    name = f"{PREFIX}model.embed_tokens.lora_embedding_"
    pair = {f"{name}A": rng.standard_normal((2, 7)), f"{name}B": rng.standard_normal((4, 2))}
    pair = {key: value.astype("f4") for key, value in pair.items()}
    save_file(pair, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    for says, code in (
        ({}, 2),
        ({"tie_word_embeddings": True}, 2),
        ({"tie_word_embeddings": False}, 0),
    ):
        key = f"model{len(list(tmp_path.iterdir()))}"
        tensors = {"model.embed_tokens.weight": weight}
        model = stored(tmp_path / key, tensors, architectures=["LlamaForCausalLM"], **says)
        out = tmp_path / f"{key}-merged"
        told = run(capsys, "merge", model, tmp_path / "adapter", out, code=code)
        assert ("tie_word_embeddings" in told.err) == bool(code) and out.exists() == (not code)
    merged = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    change = 2.0 * (pair[f"{name}B"] @ pair[f"{name}A"]).T
    np.testing.assert_allclose(merged, weight + change, rtol=1e-5, atol=1e-5)


def test_a_merge_that_fails_leaves_the_directory_that_was_there(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OutputError("No space left on device")

    save_adapter(tmp_path / "adapter", 1)
    tensors = {f"{name}.weight": np.zeros((5, 6), "f4") for name in SIZES}
    model = stored(tmp_path / "model", tensors)
    monkeypatch.setattr(merging, "copy_others", full)
    for there in (True, False):
        out = tmp_path / f"out{there}"
        if there:
            out.mkdir()
            (out / "notes.txt").write_text("mine")
        words = ["merge", model, tmp_path / "adapter", out, "--overwrite"]
        assert "No space left" in run(capsys, *words, code=2).err
        assert out.exists() == there
    assert [path.read_text() for path in (tmp_path / "outTrue").iterdir()] == ["mine"]


def test_an_alora_is_not_merged(tmp_path, capsys):
    save_adapter(tmp_path / "adapter", 1)
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"alora_invocation_tokens": [3, 4]}
    tensors = {f"{name}.weight": np.zeros((5, 6), "f4") for name in SIZES}
    model = stored(tmp_path / "model", tensors)
    run(capsys, "merge", model, tmp_path / "adapter", tmp_path / "plain")
    path.write_text(json.dumps(config))
    said = run(capsys, "merge", model, tmp_path / "adapter", tmp_path / "out", code=2)
    assert "a part of the tokens" in said.err and not (tmp_path / "out").exists()


def test_a_norm_of_thirty_times_the_median_is_suspicious(tmp_path, capsys):
    for times, said in ((29, False), (31, True)):
        directory = tmp_path / str(times)
        save_adapter(directory, 1)
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        first = {kind: tensors[f"{PREFIX}a.q.lora_{kind}.weight"] for kind in "AB"}
        for name in SIZES:
            for kind, value in first.items():
                factor = times if (name, kind) == ("b.q", "B") else 1
                tensors[f"{PREFIX}{name}.lora_{kind}.weight"] = factor * value
        save_file(tensors, path)
        lines = run(capsys, "inspect", directory).out.splitlines()
        found = [line for line in lines if line.startswith("suspicious") and "median" in line]
        assert len(found) == said and all("b.q" in line for line in found)


# plan


def planned(capsys, model, *more):
    """Return the table's rows by path, and its last line."""
    lines = run(capsys, "plan", model, *more).out.splitlines()
    return {line.split("  ")[0]: line.split() for line in lines[2:-1] if line}, lines[-1]


def test_plan_shows_what_each_option_changes(models, capsys):
    def adapted(found):
        return {path for path, cells in found.items() if "adapted" in cells}

    base, total = planned(capsys, models.model, "--target-modules", "query", "key")
    assert {path.rpartition(".kernel")[0].rpartition(".")[2] for path in adapted(base)} == {
        "query",
        "key",
    }
    more = ("--target-modules", "query", "key")
    other, ranks = planned(capsys, models.model, *more, "--r", 4)
    assert adapted(other) == adapted(base)
    # A and B of 24 × r each, at scale 16 / r
    assert total.startswith(f"trainable {2 * 2 * 24 * 8:,} of")
    assert ranks.startswith(f"trainable {2 * 2 * 24 * 4:,} of")
    for path in adapted(base):
        assert base[path][-7:-5] == ["8", "2"] and other[path][-7:-5] == ["4", "4"]
    scaled, same = planned(capsys, models.model, *more, "--lora-alpha", 4)
    assert same == total
    assert {path for path in base if base[path] != scaled[path]} == adapted(base)
    assert all(scaled[path][-7:-5] == ["8", "0.5"] for path in adapted(base))
    every, _ = planned(capsys, models.model)
    assert adapted(base) < adapted(every) and len(adapted(every)) == 7
    without, _ = planned(capsys, models.model, "--exclude-modules", "key")
    changed = {path for path in every if every[path] != without[path]}
    assert changed == {path for path in every if ".key." in path}
    assert all("excluded" in without[path] for path in changed)


def test_plan_forms_weights_on_demand_alone(models, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "plan_model", lambda model, config, **more: seen.append(config))
    run(capsys, "plan", models.model)
    run(capsys, "plan", models.model, "--materialize")
    assert [config.on_unsupported for config in seen] == ["error", "materialize"]
    assert dataclasses.replace(seen[1], on_unsupported="error") == seen[0]


# combine


@pytest.fixture
def pair(tmp_path):
    """Two adapters, of which the first lacks a module."""
    one = save_adapter(tmp_path / "one", 1, modules=("a.q", "b.q"))
    two = save_adapter(tmp_path / "two", 2, alpha=5, base="another")
    return SimpleNamespace(
        root=tmp_path, one=one, two=two, argv=(tmp_path / "one", tmp_path / "two")
    )


def combined(capsys, pair, *more, argv=None):
    out = pair.root / f"out{len(list(pair.root.iterdir()))}"
    said = run(capsys, "combine", out, *(argv or pair.argv), *more).out
    return *changes_of(out), said, out


def summed(pair, *weights):
    trees = (pair.one, pair.two)
    return {
        name: sum(w * tree[name] for w, tree in zip(weights, trees, strict=True) if name in tree)
        for name in SIZES
    }


def test_combine_weighs_each_adapter_with_its_own_weight(pair, capsys):
    found, ranks, said, out = combined(capsys, pair, "--type", "cat", "--weights", "0.7", "-2")
    close(found, summed(pair, 0.7, -2))
    assert ranks == {"a.q": 4, "a.v": 2, "b.q": 4}
    assert "different base models: another, base" in said
    assert read(out)[0]["base_model_name_or_path"] == "base"
    close(combined(capsys, pair, "--type", "cat")[0], summed(pair, 0.5, 0.5))


def test_combine_is_the_svd_of_its_rank_unless_told_otherwise(pair, capsys):
    exact = summed(pair, 0.5, 0.5)
    for more, rank in (((), 2), (("--svd-rank", 3), 3), (("--svd-rank", 1), 1)):
        found, ranks, said, _ = combined(capsys, pair, *more)
        assert set(ranks.values()) == {rank}
        for name, value in exact.items():
            u, s, v = np.linalg.svd(value)
            best = (u[:, :rank] * s[:rank]) @ v[:rank]
            np.testing.assert_allclose(found[name], best, atol=1e-4, err_msg=name)
            error = np.linalg.norm(best - value) / np.linalg.norm(value)
            [row] = [line.split() for line in said.splitlines() if line.startswith(name)]
            assert row[1] == str(rank) and float(row[2]) == pytest.approx(error, abs=2e-3)


def test_combine_prunes_to_the_density_and_elects_by_the_method(tmp_path, capsys):
    root = SimpleNamespace(root=tmp_path)
    save_adapter(tmp_path / "one", 1)
    save_adapter(tmp_path / "two", 2)
    save_adapter(tmp_path / "three", 3)
    argv = [tmp_path / name for name in ("one", "two", "three")]
    kept = {}
    for density in ("1", "0.5"):
        *_, out = combined(
            capsys, root, "--type", "magnitude_prune", "--density", density, argv=argv[:1]
        )
        kept[density] = read(out)[1]
    # One adapter alone is not pruned, as in PEFT.
    for key, value in kept["1"].items():
        np.testing.assert_array_equal(value, kept["0.5"][key])
    words = ["--type", "magnitude_prune", "--weights", "1", "0", "--density"]
    for density in (1.0, 0.25):
        *_, out = combined(capsys, root, *words, density, argv=argv[:2])
        for value in read(out)[1].values():
            assert (value != 0).sum() == int(density * value.size)
    words = ["--type", "ties", "--density", "1", "--weights", "3", "1", "1"]
    found = {}
    for method in ("", "total", "frequency"):
        more = ["--majority-sign-method", method] if method else []
        found[method] = combined(capsys, root, *words, *more, argv=argv)[0]
    plain, total, frequency = found.values()
    close(plain, total)
    assert any(not np.allclose(total[name], frequency[name]) for name in total)


def test_combine_draws_from_the_seed(pair, capsys):
    words = ["--type", "dare_linear", "--density", "0.5"]
    first, again, same, other = (
        read(combined(capsys, pair, *words, *more)[3])[1]
        for more in ([], [], ["--seed", "0"], ["--seed", "1"])
    )
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
        np.testing.assert_array_equal(value, same[key])
    assert any((value != other[key]).any() for key, value in first.items())


def test_combine_and_convert_replace_on_demand_alone(pair, capsys):
    out = pair.root / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for words in (["combine", out, *pair.argv], ["convert", pair.argv[0], out]):
        assert "--overwrite" in run(capsys, *words, code=2).err
        assert [path.name for path in out.iterdir()] == ["notes.txt"]
        run(capsys, *words, "--overwrite")
        assert (out / "notes.txt").read_text() == "mine" and changes_of(out)
        for path in out.glob("adapter*"):
            path.unlink()


# convert


def kohya(path, alpha=None):
    rng = np.random.default_rng(0)
    tensors = {}
    for part in ("lora_unet_", "lora_te_"):
        for name, (fan_in, out) in SIZES.items():
            key = f"{part}{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = rng.standard_normal((2, fan_in)).astype("f4")
            tensors[f"{key}.lora_up.weight"] = rng.standard_normal((out, 2)).astype("f4")
            if alpha is not None:
                tensors[f"{key}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path)
    return {
        part: {
            name: tensors[f"{part}{name.replace('.', '_')}.lora_up.weight"].astype("f8")
            @ tensors[f"{part}{name.replace('.', '_')}.lora_down.weight"]
            for name in SIZES
        }
        for part in ("lora_unet_", "lora_te_")
    }


def test_convert_takes_the_part_the_alpha_and_the_name_it_is_given(tmp_path, capsys):
    (tmp_path / "modules.json").write_text(json.dumps(list(SIZES)))
    products = kohya(tmp_path / "old.safetensors")
    said = kohya(tmp_path / "said.safetensors", alpha=8)

    def converted(name, *more):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        words = ["convert", tmp_path / name, out, "--modules", tmp_path / "modules.json"]
        run(capsys, *words, *more)
        return changes_of(out)[0], read(out)[0]

    for part, wanted in products.items():
        found, config = converted("old.safetensors", "--part", part, "--lora-alpha", 6)
        close(found, {name: 3 * value for name, value in wanted.items()})
        assert config["base_model_name_or_path"] is None
        # The file's own alpha counts.
        found, _ = converted("said.safetensors", "--part", part, "--lora-alpha", 6)
        close(found, {name: 4 * value for name, value in said[part].items()})
        named, other = converted(
            "said.safetensors", "--part", part, "--lora-alpha", 6, "--base-model", "some/model"
        )
        close(named, found)
        assert other["base_model_name_or_path"] == "some/model"


def test_convert_keeps_what_the_directory_says_unless_told_otherwise(tmp_path, capsys):
    wanted = save_adapter(tmp_path / "old", 1, alpha=3, base="first/model")
    for more, scale, base in (
        ([], 1.0, "first/model"),
        (["--lora-alpha", 6], 2.0, "first/model"),
        (["--base-model", "second/model"], 1.0, "second/model"),
    ):
        out = tmp_path / f"out{len(more)}{scale}"
        run(capsys, "convert", tmp_path / "old", out, *more)
        close(changes_of(out)[0], {name: scale * value for name, value in wanted.items()})
        assert read(out)[0]["base_model_name_or_path"] == base


# parity


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A suite of checks that say which seed they were given."""
    seen = {}

    def check(name, level):
        def run(seed):
            seen[name] = seed
            return [TensorVerdict("y", Verdict.EXACT)]

        return Check(name, level, run)

    monkeypatch.setattr(suite, "CHECKS", tuple(check(f"c{n}", n) for n in range(4)))
    monkeypatch.setattr(suite, "TRAJECTORIES", {})
    monkeypatch.chdir(tmp_path)
    return seen


def test_parity_runs_the_chosen_checks_from_the_seed(drawn, capsys, tmp_path):
    for more, wanted in (
        ([], {f"c{n}": 0 for n in range(4)}),
        (["--seed", 5], {f"c{n}": 5 for n in range(4)}),
        (["--seed", 5, "--levels", "1, 3"], {"c1": 5, "c3": 5}),
        (["--only", "c2"], {"c2": 0}),
    ):
        drawn.clear()
        run(capsys, "parity", *more, "--output", tmp_path / "out", "--overwrite")
        assert drawn == wanted, more
        report = from_json((tmp_path / "out" / "report.json").read_text())
        assert {check.name for check in report.checks} == wanted.keys()
        assert report.environment["seed"] in (5, "5") if "--seed" in more else True


PAIR = """
import numpy as np
import torch

def ours(x):
    return 1.001 * x

def theirs(x):
    return x * 1.0

def truth(given, cotangents):
    return {"y": 1.001 * given["x"], "dx": 1.001 * cotangents["y"]}

def make():
    return {"x": np.linspace(1, 2, 30, dtype="float32").reshape(5, 6)}
"""


def test_parity_asks_the_oracle_who_is_right(capsys, tmp_path, monkeypatch):
    (tmp_path / "twins.py").write_text(PAIR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["parity", "--jax", "twins:ours", "--torch", "twins:theirs", "--inputs", "twins:make"]
    said = run(capsys, *words, code=1).out
    assert "torch is further" not in said
    told = run(capsys, *words, "--oracle", "twins:truth", code=1).out
    [line] = [line for line in told.splitlines() if "y: MISMATCH" in line]
    assert "torch is further from the truth" in line
