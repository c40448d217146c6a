"""``lora-jax inspect``, ``combine``, ``diff`` and ``merge`` on files, as users run them."""

from __future__ import annotations

import json
import os
import shutil

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lora_jax.cli.main import main
from parity_tests.models.test_bert import tiny_config
from parity_tests.tiers import cases

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
IDS = torch.arange(12).reshape(2, 6)
VOCABULARY = 23


def llama(**fields):
    config = dict(
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(config | fields)))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=12, n_layer=1, n_head=3, n_positions=16
    )
    return transformers.GPT2LMHeadModel(config)


def adapter_of(model, directory, seed=1, size=0.3, **fields):
    """Save a random PEFT adapter of this model; return the PEFT model."""
    torch.manual_seed(seed)
    config = dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(model, peft.LoraConfig(**(config | fields)))
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = size * torch.randn_like(value)
    model.save_pretrained(directory, save_embedding_layers=False)
    return model.eval()


@pytest.fixture
def tiny(tmp_path):
    """A Llama in shards and an adapter for it."""
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "model", max_shard_size="6KB")
    assert (tmp_path / "model" / INDEX).is_file()
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    return tmp_path, adapter_of(model, tmp_path / "adapter")


def run(capsys, *argv):
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def weights(directory):
    return {
        k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def deltas(model):
    """ΔW by state-dict name in float64, as PyTorch stores W."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            a = layer.lora_A["default"].weight.detach().double().numpy()
            b = layer.lora_B["default"].weight.detach().double().numpy()
            change = layer.scaling["default"] * (b @ a)
            found[f"{name}.weight"] = change.T if layer.fan_in_fan_out else change
    return found


def assert_merged(base, merged, changes):
    """Hold every stored value to one rounding of the exact sum, and all others to equality."""
    assert base.keys() == merged.keys()
    for key, old in base.items():
        new = merged[key]
        assert new.dtype == old.dtype and new.shape == old.shape
        if key not in changes:
            np.testing.assert_array_equal(new, old)
            continue
        exact = old.astype(np.float64) + changes[key]
        step = 2.0**-8 if old.dtype == ml_dtypes.bfloat16 else 2.0**-22
        room = step * (np.abs(old.astype(np.float64)) + np.abs(changes[key]).max())
        assert (np.abs(new.astype(np.float64) - exact) <= room).all(), key
        assert (new != old).mean() > 0.5


def test_shards_are_merged_in_place_of_the_old_ones(tiny, capsys):
    root, model = tiny
    (root / "model" / "pytorch_model.bin").write_bytes(b"old weights")
    (root / "model" / "1_Pooling").mkdir()
    (root / "model" / "1_Pooling" / "config.json").write_text("{}")
    code, out, _ = run(capsys, "merge", root / "model", root / "adapter", root / "out")
    assert code == 0 and "warning" not in out and "pytorch_model.bin" in out
    assert_merged(weights(root / "model"), weights(root / "out"), deltas(model))
    names = {str(p.relative_to(root / "model")) for p in (root / "model").rglob("*")}
    found = {str(p.relative_to(root / "out")) for p in (root / "out").rglob("*")}
    assert found == names - {"pytorch_model.bin"}
    assert (root / "out" / INDEX).read_bytes() == (root / "model" / INDEX).read_bytes()
    served = transformers.LlamaForCausalLM.from_pretrained(root / "out")
    with torch.no_grad():
        torch.testing.assert_close(served(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in root.iterdir()) == ["adapter", "model", "out"]


def test_bfloat16_is_rounded_once_and_a_lost_delta_is_said(tmp_path, capsys):
    torch.manual_seed(0)
    llama().bfloat16().save_pretrained(tmp_path / "model")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="bfloat16")
    model = adapter_of(model, tmp_path / "adapter")
    code, out, _ = run(capsys, "merge", tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert code == 0 and "warning" not in out
    stored = weights(tmp_path / "model")
    merged = weights(tmp_path / "out")
    assert_merged(stored, merged, deltas(model))
    for key, change in deltas(model).items():
        exact = (stored[key].astype(np.float64) + change).astype(np.float32)
        assert (exact.astype(ml_dtypes.bfloat16) == merged[key]).mean() > 0.98
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="bfloat16")
    adapter_of(model, tmp_path / "small", size=3e-3)
    code, out, _ = run(capsys, "merge", tmp_path / "model", tmp_path / "small", tmp_path / "lost")
    assert code == 0 and "rounding to bfloat16 takes" in out and "q_proj.weight" in out


def test_conv1d_is_merged_the_other_way_round_square_or_not(tmp_path, capsys):
    torch.manual_seed(0)
    gpt2().save_pretrained(tmp_path / "model")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    # attn.c_proj is 12 × 12: its shape does not tell.
    targets = ["c_attn", "attn.c_proj"]
    model = adapter_of(model, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=True)
    code, _, _ = run(capsys, "merge", tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert code == 0
    served = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(served(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not np.allclose(
        *(weights(tmp_path / d)["transformer.h.0.attn.c_proj.weight"] for d in ("model", "out"))
    )


def test_square_weights_alone_follow_the_flag(tmp_path, capsys):
    torch.manual_seed(0)
    gpt2().save_pretrained(tmp_path / "model")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    targets = ["attn.c_proj"]
    model = adapter_of(model, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=True)
    assert run(capsys, "merge", tmp_path / "model", tmp_path / "adapter", tmp_path / "out")[0] == 0
    served = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(served(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_base_model_without_its_prefix_is_found(tmp_path, capsys):
    torch.manual_seed(0)
    transformers.BertModel(tiny_config()).save_pretrained(tmp_path / "model")
    model = transformers.BertForSequenceClassification(tiny_config())
    model = adapter_of(model, tmp_path / "adapter", target_modules=["query", "value"])
    assert run(capsys, "merge", tmp_path / "model", tmp_path / "adapter", tmp_path / "out")[0] == 0
    changes = {key.removeprefix("bert."): value for key, value in deltas(model).items()}
    assert_merged(weights(tmp_path / "model"), weights(tmp_path / "out"), changes)


def test_a_head_trained_in_full_replaces_the_stored_one_and_needs_one(tmp_path, capsys):
    torch.manual_seed(0)
    transformers.BertModel(tiny_config()).save_pretrained(tmp_path / "bare")
    whole = transformers.BertForSequenceClassification(tiny_config())
    whole.save_pretrained(tmp_path / "whole")
    fields = dict(target_modules=["query"], modules_to_save=["classifier"])
    model = adapter_of(whole, tmp_path / "adapter", **fields)
    with torch.no_grad():
        for value in model.base_model.model.classifier.modules_to_save["default"].parameters():
            value += 1
    model.save_pretrained(tmp_path / "adapter")
    code, _, err = run(capsys, "merge", tmp_path / "bare", tmp_path / "adapter", tmp_path / "out")
    assert code == 2 and err.count("not in the model") == 2 and "query" not in err
    code, out, _ = run(capsys, "merge", tmp_path / "whole", tmp_path / "adapter", tmp_path / "out")
    assert code == 0 and "classifier.weight: replaced in full" in out
    load = transformers.BertForSequenceClassification.from_pretrained
    with torch.no_grad():
        got, wanted = load(tmp_path / "out").eval()(IDS).logits, model(IDS).logits
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert (load(tmp_path / "whole").eval()(IDS).logits - wanted).abs().max() > 0.1


def test_an_embedding_that_the_head_shares_is_not_merged(tmp_path, capsys):
    torch.manual_seed(0)
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    llama(tie_word_embeddings=False).save_pretrained(tmp_path / "apart")
    adapter_of(llama(), tmp_path / "adapter", target_modules=["embed_tokens"])
    code, _, err = run(capsys, "merge", tmp_path / "tied", tmp_path / "adapter", tmp_path / "out")
    assert code == 2 and "tie_word_embeddings" in err and "model.embed_tokens" in err
    assert not (tmp_path / "out").exists()
    code, out, _ = run(capsys, "merge", tmp_path / "apart", tmp_path / "adapter", tmp_path / "out")
    assert code == 0 and "model.embed_tokens.weight" in out


def test_bad_input_is_one_message_and_nothing_is_written(tiny, capsys):
    root, _ = tiny
    model, adapter = root / "model", root / "adapter"
    gpt2().save_pretrained(root / "other")
    broken = shutil.copytree(model, root / "broken")
    first = min(broken.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-7])
    taken = root / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    for argv, said in [
        ((root / "other", adapter, root / "out"), "q_proj.weight: not in the model"),
        ((root / "nowhere", adapter, root / "out"), "is missing. A model is a directory"),
        ((model, root / "nowhere", root / "out"), "cannot read"),
        ((broken, adapter, root / "out"), "not a whole safetensors file"),
        ((model, adapter, model), "which stays as it is"),
        ((model, adapter, model / "inside"), "which stays as it is"),
        ((model, adapter, taken), "already holds files"),
        ((model,), "DIRECTORY OUT, or MODEL ADAPTER OUT"),
        ((model, adapter, root / "out", root / "more"), "DIRECTORY OUT, or MODEL ADAPTER OUT"),
    ]:
        code, out, err = run(capsys, "merge", *argv)
        assert code == 2 and said in err and not out, argv
        assert not (root / "out").exists()
    names = ["adapter", "broken", "model", "other", "taken"]
    assert sorted(p.name for p in root.iterdir()) == names
    assert [p.name for p in taken.iterdir()] == ["mine.txt"]
    assert run(capsys, "merge", model, adapter, taken, "--overwrite")[0] == 0
    assert (taken / "mine.txt").read_text() == "mine" and (taken / INDEX).is_file()


def test_a_full_disk_in_the_middle_leaves_nothing(tiny, capsys, monkeypatch):
    root, _ = tiny
    calls = []

    def replace(source, target, *, real=os.replace):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    code, _, err = run(capsys, "merge", root / "model", root / "adapter", root / "out")
    assert code == 2 and "No space left" in err
    assert sorted(p.name for p in root.iterdir()) == ["adapter", "model"]


def test_an_index_that_lies_is_refused(tiny, capsys):
    root, _ = tiny
    path = root / "model" / INDEX
    index = json.loads(path.read_text())
    names = sorted(set(index["weight_map"].values()))
    first = next(iter(index["weight_map"]))
    for name, said in [
        (next(n for n in names if n != index["weight_map"][first]), "the index says"),
        ("../elsewhere.safetensors", "names files elsewhere"),
    ]:
        changed = index | {"weight_map": index["weight_map"] | {first: name}}
        path.write_text(json.dumps(changed))
        code, _, err = run(capsys, "merge", root / "model", root / "adapter", root / "out")
        assert code == 2 and said in err


def test_inspect_shows_every_module_and_its_numbers(tiny, capsys):
    root, model = tiny
    code, out, _ = run(capsys, "inspect", root / "adapter")
    assert code == 0 and "nothing suspicious" in out and "r: 3" in out and "lora_alpha: 5" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("model.")}
    changes = deltas(model)
    assert rows.keys() == {key.removesuffix(".weight") for key in changes}
    for key, change in changes.items():
        cells = rows[key.removesuffix(".weight")].replace("(", "").replace(")", "").split()
        s = np.linalg.svd(change, compute_uv=False)[:3]
        share = s / s.sum()
        assert float(cells[-2]) == pytest.approx(np.linalg.norm(change), rel=1e-3)
        assert float(cells[-1]) == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=0.06)
    assert f"{sum(3 * sum(c.shape) for c in changes.values()):,} trained values" in out


def test_inspect_says_what_is_suspicious(tiny, capsys):
    root, _ = tiny
    path = root / "adapter" / "adapter_model.safetensors"
    stored = load_file(path)
    prefix = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    stored[prefix.format(0, "q", "B")][:] = 0
    one = stored[prefix.format(1, "q", "B")]
    one[:, 1:] = 0
    stored[prefix.format(0, "v", "B")][:] *= 1000
    stored[prefix.format(1, "v", "A")] = stored[prefix.format(1, "v", "A")].astype(np.float16)
    save_file(stored, path)
    code, out, _ = run(capsys, "inspect", root / "adapter")
    said = [line for line in out.splitlines() if line.startswith("suspicious")]
    assert code == 0
    assert any("0.self_attn.q_proj: B is all zero" in line for line in said)
    assert any("0.self_attn.v_proj: |ΔW| is" in line for line in said)
    assert any("dtypes differ: float16, float32" in line for line in said)
    # One of three is above a quarter; the table shows it all the same.
    row = next(line for line in out.splitlines() if line.startswith("model.layers.1.self_attn.q"))
    assert row.split()[-1] == "1.0"


def test_inspect_says_when_the_rank_is_far_too_large(tmp_path, capsys):
    adapter_of(llama(), tmp_path / "adapter", r=8)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    stored[key][:, 1:] = 0
    save_file(stored, path)
    _, out, _ = run(capsys, "inspect", tmp_path / "adapter")
    [line] = [line for line in out.splitlines() if line.startswith("suspicious")]
    assert "0.self_attn.q_proj: the effective rank is 1.0 of 8" in line


@pytest.mark.parametrize("kind", cases(["cat", "svd", "ties"], slow=("ties",)))
def test_combine_writes_what_peft_would_have(tiny, capsys, kind):
    root, model = tiny
    adapter_of(llama(), root / "two", seed=2)
    model.load_adapter(str(root / "two"), "two")
    options = ["--density", "0.5"] if kind == "ties" else []
    argv = ["combine", root / "out", root / "adapter", root / "two", "--type", kind, *options]
    code, out, _ = run(capsys, *argv, "--weights", "0.7", "-0.3")
    assert code == 0 and "q_proj" in out and str(root / "out") in out
    density = 0.5 if options else None
    model.base_model.add_weighted_adapter(
        ["default", "two"], [0.7, -0.3], "sum", kind, density=density
    )
    model.load_adapter(str(root / "out"), "ours")
    logits = []
    for name in ("sum", "ours"):
        model.set_adapter(name)
        with torch.no_grad():
            logits.append(model(IDS).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_combine_refuses_bad_weights_and_types(tiny, capsys):
    root, _ = tiny
    argv = ["combine", root / "out", root / "adapter", root / "adapter"]
    for more, said in [
        (["--weights", "1"], "wanted 2 finite numbers"),
        (["--type", "mean"], "combination_type: got 'mean'"),
        (["--type", "dare_ties"], "density: got None"),
    ]:
        code, _, err = run(capsys, *argv, *more)
        assert code == 2 and said in err and not (root / "out").exists()


def test_diff_shows_fields_and_deltas(tiny, capsys):
    root, model = tiny
    one, other = root / "adapter", root / "two"
    code, out, _ = run(capsys, "diff", one, one)
    assert code == 0 and "the configurations are equal" in out and out.count("equal") == 7
    two = adapter_of(llama(), other, seed=1, r=2, target_modules=["q_proj", "o_proj"])
    code, out, _ = run(capsys, "diff", one, other)
    assert code == 0 and "r: 3 and 2" in out and "target_modules" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("model.")}
    key = "model.layers.0.self_attn.q_proj"
    x, y = deltas(model)[f"{key}.weight"], deltas(two)[f"{key}.weight"]
    assert float(rows[key].split()[-1]) == pytest.approx(
        np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-2
    )
    assert f"only in {other}" in rows["model.layers.0.self_attn.o_proj"]
    assert f"only in {one}" in rows["model.layers.0.self_attn.v_proj"]


def test_diff_refuses_adapters_of_another_model(tiny, capsys):
    root, _ = tiny
    adapter_of(llama(hidden_size=24), root / "other")
    code, _, err = run(capsys, "diff", root / "adapter", root / "other")
    assert code == 2 and "not of one model" in err and "q_proj: shape" in err
