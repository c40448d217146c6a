"""``lora-jax convert``: MLX-LM's adapters, diffusers' header, names of families, odd spellings."""

from __future__ import annotations

import copy
import json

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lora_jax import load_config, open_adapter
from lora_jax.cli.main import main
from parity_tests.cli.test_file_commands import IDS, llama
from parity_tests.peft.test_foreign_spellings import named, shard

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens")
RNG = np.random.default_rng(0)


def weight_of(model, name):
    return model.get_submodule(name).weight


def mlx(model, *, dora=False, r=2):
    """Random parts of MLX-LM's layers: ``lora_a`` and ``lora_b``, and ``m`` with DoRA."""
    tensors = {}
    for name in MODULES[: 2 if dora else 3]:
        out, fan_in = weight_of(model, name).shape
        if name.endswith("embed_tokens"):
            fan_in, out = out, fan_in
        shapes = {"lora_a": (fan_in, r), "lora_b": (r, out)} | ({"m": (out,)} if dora else {})
        tensors |= {f"{name}.{p}": RNG.normal(size=s).astype(np.float32) for p, s in shapes.items()}
    return tensors


def merged(model, tensors, scale):
    """The model that MLX-LM computes with: its layers' ``fuse``, in float64."""
    model = copy.deepcopy(model)
    for name in {key.rpartition(".")[0] for key in tensors}:
        a, b = (tensors[f"{name}.lora_{half}"].astype(np.float64) for half in "ab")
        weight = weight_of(model, name)
        change = scale * (a @ b if name.endswith("embed_tokens") else b.T @ a.T)
        new = weight.detach().double().numpy() + change
        if (m := tensors.get(f"{name}.m")) is not None:
            new *= (m / np.linalg.norm(new, axis=1))[:, None]
        weight.data = torch.tensor(new, dtype=torch.float32)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.numpy()


@pytest.mark.parametrize("dora", [False, True])
def test_an_mlx_adapter_gives_peft_the_logits_that_mlx_has(dora, tmp_path, capsys):
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=False)
    tensors = mlx(model, dora=dora)
    old = tmp_path / "old"
    old.mkdir()
    save_file(tensors, old / "adapters.safetensors")
    fields = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 2, "alpha": 16, "scale": 3.0, "dropout": 0.1},
    }
    (old / CONFIG).write_text(json.dumps(fields))
    assert main(["convert", str(old), str(tmp_path / "new")]) == 0
    assert f"{len(tensors) // (3 if dora else 2)} modules" in capsys.readouterr().out
    config = load_config(tmp_path / "new")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 6.0, 0.1)
    assert config.use_dora == dora
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "new")
    np.testing.assert_allclose(logits(wrapped), logits(merged(model, tensors, 3)), 1e-4, 1e-4)
    # A directory that is not converted says what to do.
    assert main(["inspect", str(old)]) == 2
    assert "of an MLX-LM adapter: `lora-jax convert`" in capsys.readouterr().err


def test_what_does_not_say_mlx_scale_asks_for_it(tmp_path, capsys):
    model = llama(tie_word_embeddings=False)
    tensors = {key: one for key, one in mlx(model).items() if "q_proj" in key}
    save_file(tensors, tmp_path / "adapters.safetensors")
    argv = ["convert", str(tmp_path), str(tmp_path / "new")]
    given = {"rank": 2, "scale": 10.0}
    for parameters, more, said in (
        (given | {"alpha": 16}, {}, "before 0.15 scales by scale·alpha/rank"),
        (given | {"scale": None}, {}, "scale: got None"),
        (given | {"alpha": 2}, {}, None),
        (given | {"alpha": 16}, {"num_layers": 4}, None),
    ):
        (tmp_path / CONFIG).write_text(json.dumps({"lora_parameters": parameters} | more))
        assert main([*argv, "--overwrite"]) == (2 if said else 0)
        assert (said or "") in capsys.readouterr().err
        if said is None:
            assert load_config(tmp_path / "new").lora_alpha == 20.0
    assert main([*argv, "--overwrite", "--lora-alpha", "5"]) == 0
    assert load_config(tmp_path / "new").lora_alpha == 5.0
    # The file alone, without its directory's configuration.
    argv[1] = str(tmp_path / "adapters.safetensors")
    assert main([*argv, "--overwrite"]) == 2
    assert "or give --lora-alpha" in capsys.readouterr().err
    assert main([*argv, "--overwrite", "--lora-alpha", "7"]) == 0
    assert load_config(tmp_path / "new").lora_alpha == 7.0


def test_mlx_tensors_without_a_place_are_listed(tmp_path, capsys):
    one = np.ones((3, 2), np.float32)
    tensors = {
        "a.lora_a": one,
        "b.lora_a": one,
        "b.lora_b": one,
        "c.lora_a": np.ones((4, 2, 3), np.float32),
        "c.lora_b": np.ones((4, 3, 2), np.float32),
        "embed_tokens.lora_a": one,
        "embed_tokens.lora_b": one.T.copy(),
        "embed_tokens.m": np.ones(3, np.float32),
        "d.lora_a": one * np.nan,
        "d.lora_b": one.T.copy(),
        "e.weight": one,
    }
    save_file(tensors, tmp_path / "adapters.safetensors")
    source = str(tmp_path / "adapters.safetensors")
    assert main(["convert", source, str(tmp_path / "new"), "--lora-alpha", "1"]) == 2
    said = capsys.readouterr().err
    for words in (
        "a: has no lora_b",
        "b: got lora_a (3, 2) and lora_b (3, 2)",
        "c: got lora_a (4, 2, 3) and lora_b (4, 3, 2), experts",
        "embed_tokens.m: DoRA's magnitude of an embedding",
        "d.lora_a: holds NaN",
        "e.weight: unexpected",
        "some modules have one",
    ):
        assert words in said
    assert not (tmp_path / "new").exists()


PAIR = {"lora_A.weight": (2, 3), "lora_B.weight": (4, 2)}


def pairs(*modules):
    return {
        f"{module}.{half}": RNG.normal(size=shape).astype(np.float32)
        for module in modules
        for half, shape in PAIR.items()
    }


def header(**parts):
    """What diffusers writes: PEFT's fields behind each part's name, as one text."""
    fields = {
        f"{part}.{name}": value for part, given in parts.items() for name, value in given.items()
    }
    return {"format": "pt", "lora_adapter_metadata": json.dumps(fields)}


def test_the_header_of_diffusers_says_alpha_and_patterns(tmp_path, capsys):
    tensors = pairs("unet.a.to_q", "unet.b.to_k", "text_encoder.c")
    unet = {"r": 2, "lora_alpha": 8, "alpha_pattern": {"to_k": 3}, "use_rslora": None}
    text = {"r": 2, "lora_alpha": 5, "use_rslora": True, "peft_type": "LORA"}
    save_file(tensors, tmp_path / "old.safetensors", metadata=header(unet=unet, text_encoder=text))
    argv = ["convert", str(tmp_path / "old.safetensors"), str(tmp_path / "new"), "--overwrite"]
    assert main(argv) == 2
    assert "choose one by --part" in capsys.readouterr().err
    for part, wanted in (
        ("unet.", {"a.to_q": 4, "b.to_k": 1.5}),
        ("text_encoder.", {"c": 5 / 2**0.5}),
    ):
        assert main([*argv, "--part", part]) == 0
        _, adapters = open_adapter(tmp_path / "new")
        assert {name: one.scale for name, one in adapters.items()} == pytest.approx(wanted)
    # One part is meant without a word, also one whose name could be a module's.
    for part in ("transformer", "unet"):
        save_file(pairs(f"{part}.q"), argv[1], metadata=header(**{part: unet}))
        assert main(argv) == 0
        assert list(open_adapter(tmp_path / "new")[1]) == ["q"]
        assert load_config(tmp_path / "new").lora_alpha == 8
    # As a model alone is saved: no part at all.
    plain = {"format": "pt", "lora_adapter_metadata": json.dumps(unet | {"r": 3})}
    save_file(pairs("q"), argv[1], metadata=plain)
    assert main(argv) == 2
    assert "got r=2, the configuration's 3" in capsys.readouterr().err
    save_file(pairs("q"), argv[1], metadata=plain | {"lora_adapter_metadata": "{"})
    assert main(argv) == 2
    assert "lora_adapter_metadata in the header of" in capsys.readouterr().err


def test_spellings_and_shards_are_converted_too(tmp_path):
    tensors = pairs("x.q", "x.v")
    old = tmp_path / "old"
    old.mkdir()
    save_file({f"module.{named('default')(k)}": v for k, v in tensors.items()}, old / WEIGHTS)
    shard(old)
    assert main(["convert", str(old), str(tmp_path / "new"), "--lora-alpha", "4"]) == 0
    new = load_file(tmp_path / "new" / WEIGHTS)
    assert new.keys() == {PREFIX + key for key in tensors}
    for key, value in tensors.items():
        np.testing.assert_array_equal(new[PREFIX + key], value)


def test_a_familys_names_become_those_of_the_model(tmp_path, capsys):
    """Both ways, for PEFT's file with its patterns and for MLX-LM's."""
    old, new = "language_model.model.layers.{}.q", "model.language_model.layers.{}.q"
    for here, there in ((old, new), (new, old)):
        source = tmp_path / "old"
        source.mkdir(exist_ok=True)
        tensors = pairs(here.format(0), here.format(1))
        save_file({PREFIX + key: one for key, one in tensors.items()}, source / WEIGHTS)
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]}
        fields["alpha_pattern"] = {here.format(1).replace(".", "\\."): 1}
        (source / CONFIG).write_text(json.dumps(fields))
        modules = tmp_path / "modules.json"
        modules.write_text(json.dumps([there.format(n) for n in range(3)]))
        argv = ["--modules", str(modules), "--overwrite"]
        assert main(["convert", str(source), str(tmp_path / "new"), *argv]) == 0
        assert "are read as the model's" in capsys.readouterr().out
        _, adapters = open_adapter(tmp_path / "new")
        scales = {name: one.scale for name, one in adapters.items()}
        assert scales == {there.format(0): 3.0, there.format(1): 0.5}
        for n in range(2):
            a = tensors[f"{here.format(n)}.lora_A.weight"]
            np.testing.assert_array_equal(adapters[there.format(n)].a, a.T)
        save_file(
            {f"{here.format(0)}.lora_a": np.ones((3, 2), np.float32),
             f"{here.format(0)}.lora_b": np.ones((2, 4), np.float32)},
            tmp_path / "mlx.safetensors",
        )  # fmt: skip
        argv += ["--lora-alpha", "1"]
        assert (
            main(["convert", str(tmp_path / "mlx.safetensors"), str(tmp_path / "new"), *argv]) == 0
        )
        assert list(open_adapter(tmp_path / "new")[1]) == [there.format(0)]
