"""``lora-jax convert``: every older layout gives PEFT the numbers that it had."""

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
from parity_tests.cli.test_file_commands import IDS, adapter_of, llama

PREFIX = "base_model.model."
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama, PEFT's adapter of it with two ranks and scales, its logits, and its tensors."""
    directory = tmp_path_factory.mktemp("convert")
    torch.manual_seed(0)
    model = llama().eval()
    model.save_pretrained(directory / "model")
    wrapped = adapter_of(
        copy.deepcopy(model),
        directory / "adapter",
        rank_pattern={"v_proj": 2},
        alpha_pattern={"v_proj": 7},
        use_rslora=True,
    )
    tensors = load_file(directory / "adapter" / "adapter_model.safetensors")
    return directory, model, logits(wrapped), tensors


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.numpy()


def converted_logits(model, directory):
    return logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), directory).eval())


def alpha_of(name):
    """Alpha that gives the scale of ``use_rslora`` where it is divided by r."""
    return 7 * 2**0.5 if "v_proj" in name else 5 * 3**0.5


def renamed(tensors, a, b, alpha=None, owner=lambda module: module):
    new = {}
    for key, value in tensors.items():
        module = key.removeprefix(PREFIX).rpartition(".lora_")[0]
        new[owner(module) + (a if "lora_A" in key else b)] = value
        if alpha:
            new[owner(module) + alpha] = np.asarray(alpha_of(module), np.float32)
    return new


LAYOUTS = {
    "kohya": (
        lambda t: renamed(
            t,
            ".lora_down.weight",
            ".lora_up.weight",
            ".alpha",
            lambda module: "lora_te_" + module.replace(".", "_"),
        ),
        ["--modules", "MODEL"],
    ),
    "diffusers": (
        lambda t: renamed(
            t, ".lora.down.weight", ".lora.up.weight", ".alpha", lambda m: f"text_encoder.{m}"
        ),
        [],
    ),
    "old diffusers": (
        lambda t: renamed(
            t, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", ".alpha"
        ),
        ["--modules", "MODEL"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peft_loads_what_was_converted_and_gives_the_same_logits(layout, tiny, tmp_path, capsys):
    directory, model, wanted, tensors = tiny
    rename, options = LAYOUTS[layout]
    save_file(rename(tensors), tmp_path / "old.safetensors")
    options = [o.replace("MODEL", str(directory / "model" / "model.safetensors")) for o in options]
    argv = ["convert", str(tmp_path / "old.safetensors"), str(tmp_path / "new"), *options]
    assert main(argv) == 0
    assert "6 modules; the adapter is in" in capsys.readouterr().out
    np.testing.assert_allclose(
        converted_logits(model, tmp_path / "new"), wanted, rtol=1e-5, atol=1e-6
    )
    new = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert new.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(new[key], value)
    file, adapters = open_adapter(tmp_path / "new")
    assert len(adapters) == 6
    again = tmp_path / "again"
    assert main([*argv[:2], str(again), *argv[3:]]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_loralib_needs_an_alpha(tiny, tmp_path, capsys):
    directory, model, _, _ = tiny
    wrapped = adapter_of(copy.deepcopy(model), tmp_path / "adapter", target_modules=TARGETS)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(renamed(tensors, ".lora_A", ".lora_B"), tmp_path / "old.safetensors")
    argv = ["convert", str(tmp_path / "old.safetensors"), str(tmp_path / "new")]
    assert main(argv) == 2
    assert capsys.readouterr().err.count("give --lora-alpha") == 6
    assert not (tmp_path / "new").exists()
    assert main([*argv, "--lora-alpha", "5"]) == 0
    np.testing.assert_allclose(
        converted_logits(model, tmp_path / "new"), logits(wrapped), rtol=1e-5, atol=1e-6
    )


def test_a_directory_without_the_prefix_keeps_its_configurations_scales(tiny, tmp_path):
    directory, model, wanted, tensors = tiny
    old = tmp_path / "old"
    old.mkdir()
    bare = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    save_file(bare, old / "adapter_model.safetensors")
    config = (directory / "adapter" / "adapter_config.json").read_bytes()
    (old / "adapter_config.json").write_bytes(config)
    assert main(["convert", str(old), str(tmp_path / "new")]) == 0
    np.testing.assert_allclose(
        converted_logits(model, tmp_path / "new"), wanted, rtol=1e-5, atol=1e-6
    )


class Attention(torch.nn.Module):
    """Names and a convolution as in a U-Net of diffusers."""

    def __init__(self):
        super().__init__()
        self.proj_in = torch.nn.Conv2d(6, 4, 1)
        self.attn1 = torch.nn.ModuleDict(
            {"to_q": torch.nn.Linear(4, 4), "to_out": torch.nn.ModuleList([torch.nn.Linear(4, 3)])}
        )

    def forward(self, x):
        x = self.proj_in(x).flatten(2).transpose(1, 2)
        return self.attn1["to_out"][0](self.attn1["to_q"](x))


def test_a_convolution_and_one_part_of_kohyas_file(tmp_path, capsys):
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 6, 3, 3)
    rng = np.random.default_rng(0)
    shapes = {"proj_in": (4, 6, 1, 1), "attn1_to_q": (4, 4), "attn1_to_out_0": (3, 4)}
    pairs = {
        name: [rng.normal(size=s).astype(np.float32) for s in ((2, *s[1:]), (s[0], 2, *s[2:]))]
        for name, s in shapes.items()
    }
    old = {"lora_te_x.lora_down.weight": np.ones((1, 2), np.float32)}
    for name, (a, b) in pairs.items():
        old |= {
            f"lora_unet_{name}.lora_down.weight": a,
            f"lora_unet_{name}.lora_up.weight": b,
            f"lora_unet_{name}.alpha": np.asarray(3.0, np.float16),
        }
    # r where the file says no alpha
    del old["lora_unet_attn1_to_q.alpha"]
    save_file(old, tmp_path / "old.safetensors")
    names = [name for name, _ in model.named_modules()]
    (tmp_path / "modules.json").write_text(json.dumps(names))
    argv = ["convert", str(tmp_path / "old.safetensors"), str(tmp_path / "new")]
    argv += ["--modules", str(tmp_path / "modules.json")]
    assert main(argv) == 2
    assert "'lora_te_'\n  'lora_unet_'" in capsys.readouterr().err
    assert main([*argv, "--part", "lora_unet_"]) == 0
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "new")
    with torch.no_grad():
        for name, layer in [
            ("proj_in", model.proj_in),
            ("attn1_to_q", model.attn1["to_q"]),
            ("attn1_to_out_0", model.attn1["to_out"][0]),
        ]:
            a, b = (torch.tensor(one).flatten(1) for one in pairs[name])
            scale = 1 if name == "attn1_to_q" else 1.5
            layer.weight += scale * (b @ a).reshape(layer.weight.shape)
        np.testing.assert_allclose(wrapped(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_processors_of_old_diffusers_are_the_attentions_layers(tmp_path):
    old = {}
    for name in ("to_q", "to_out"):
        old[f"unet.b.0.attn1.processor.{name}_lora.down.weight"] = np.ones((2, 3), np.float32)
        old[f"unet.b.0.attn1.processor.{name}_lora.up.weight"] = np.ones((4, 2), np.float32)
    save_file(old, tmp_path / "old.safetensors")
    assert main(["convert", str(tmp_path / "old.safetensors"), str(tmp_path / "new")]) == 0
    config = load_config(tmp_path / "new")
    assert config.target_modules == ("b.0.attn1.to_out.0", "b.0.attn1.to_q")
    assert (config.r, config.lora_alpha) == (2, 2)


def test_adapters_of_single_experts_stay_those_of_modules(tmp_path):
    """Mixtral's experts were modules of their own, and a model with such modules takes them."""

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(
                torch.nn.ModuleDict({"w1": torch.nn.Linear(3, 4, bias=False)}) for _ in range(2)
            )

        def forward(self, x):
            return sum(one["w1"](x) for one in self.experts)

    model, x = Experts(), torch.randn(2, 3)
    rng = np.random.default_rng(0)
    old = {
        f"experts.{n}.w1.lora_{half}.weight": rng.normal(size=shape).astype(np.float32)
        for n in range(2)
        for half, shape in (("A", (2, 3)), ("B", (4, 2)))
    }
    save_file(old, tmp_path / "old.safetensors")
    argv = ["convert", str(tmp_path / "old.safetensors"), str(tmp_path / "new")]
    assert main([*argv, "--lora-alpha", "6"]) == 0
    with torch.no_grad():
        wanted = model(x).numpy()
        for n in range(2):
            a, b = (old[f"experts.{n}.w1.lora_{half}.weight"] for half in "AB")
            wanted = wanted + 3 * x.numpy() @ a.T @ b.T
        got = peft.PeftModel.from_pretrained(model, tmp_path / "new")(x)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_everything_that_cannot_be_converted_is_listed(tmp_path, capsys):
    one = np.ones((2, 3), np.float32)
    old = {
        "lora_unet_a_b.lora_down.weight": one,
        "lora_unet_a_b.lora_up.weight": one.T,
        "lora_unet_x_y.lora_down.weight": one,
        "lora_unet_x_y.lora_up.weight": one,
        "lora_unet_no_up.lora_down.weight": one,
        "lora_unet_a_c.lora_down.weight": one * np.nan,
        "lora_unet_a_c.lora_up.weight": one.T,
        "lora_unet_a_c.dora_scale": one,
    }
    save_file({k: np.ascontiguousarray(v) for k, v in old.items()}, tmp_path / "old.safetensors")
    (tmp_path / "modules.json").write_text(json.dumps(["a.b", "a_b", "x.y", "a.c"]))
    argv = ["convert", str(tmp_path / "old.safetensors"), str(tmp_path / "new")]
    assert main(argv) == 2
    assert "give the model's modules by --modules" in capsys.readouterr().err
    assert main([*argv, "--modules", str(tmp_path / "modules.json")]) == 2
    said = capsys.readouterr().err
    for wanted in (
        "a_b: fits a.b, a_b of the modules",
        "no_up: fits none of the modules",
        "no_up: has no B",
        "x_y: got A (2, 3) and B (2, 3)",
        "a_c.lora_down.weight: holds NaN",
        "a_c.dora_scale: unexpected",
    ):
        assert wanted in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["old.pt", "old.bin", "old.safetensors", "absent.safetensors"])
def test_what_cannot_be_read_is_said(name, tmp_path, capsys):
    if "old" in name:
        (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    assert main(["convert", str(tmp_path / name), str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert {"pt": "never read", "in": "never read"}.get(name[-2:], str(tmp_path / name)) in said


def test_tensors_of_other_ranks_than_the_configuration_are_refused(tiny, tmp_path, capsys):
    directory, _, _, tensors = tiny
    (tmp_path / "old").mkdir()
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    fields = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(fields | {"r": 4}))
    assert main(["convert", str(tmp_path / "old"), str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.count("got r=3, the configuration's 4") == 4


def without_prefix(directory, out, *, config=True):
    """Write the tensors of a PEFT directory in the names of before its prefix."""
    tensors = load_file(directory / "adapter_model.safetensors")
    out.mkdir()
    save_file(
        {key.removeprefix(PREFIX): value for key, value in tensors.items()},
        out / "adapter_model.safetensors",
    )
    if config:
        fields = (directory / "adapter_config.json").read_bytes()
        (out / "adapter_config.json").write_bytes(fields)
    return tensors


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_what_modules_have_beside_a_and_b_goes_along(field, said, tmp_path, capsys):
    """DoRA's magnitudes and the biases of B, with the field that says so or by their names."""
    torch.manual_seed(0)
    model = llama(attention_bias=True, mlp_bias=True).eval()
    wrapped = adapter_of(copy.deepcopy(model), tmp_path / "adapter", **{field: True})
    assert np.abs(logits(wrapped) - logits(model)).max() > 1e-2
    tensors = without_prefix(tmp_path / "adapter", tmp_path / "old", config=said)
    argv = ["convert", str(tmp_path / "old"), str(tmp_path / "new")]
    assert main([*argv, *([] if said else ["--lora-alpha", "5"])]) == 0, capsys.readouterr().err
    new = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert new.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(new[key], value)
    assert getattr(load_config(tmp_path / "new"), field) is True
    np.testing.assert_allclose(
        converted_logits(model, tmp_path / "new"), logits(wrapped), rtol=1e-5, atol=1e-6
    )
    assert len(open_adapter(tmp_path / "new")[1]) == 6


def test_a_convolutions_magnitudes_go_along(tmp_path):
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 6, 3, 3)
    targets = ["proj_in", "to_q"]
    wrapped = adapter_of(
        copy.deepcopy(model), tmp_path / "adapter", target_modules=targets, use_dora=True
    )
    without_prefix(tmp_path / "adapter", tmp_path / "old")
    assert main(["convert", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "new").eval()
    with torch.no_grad():
        np.testing.assert_allclose(loaded(x), wrapped(x), rtol=1e-5, atol=1e-5)


def test_what_is_beside_a_and_b_is_every_modules_and_fits(tiny, tmp_path, capsys):
    directory, _, _, tensors = tiny
    model = llama().eval()
    adapter_of(model, tmp_path / "adapter", use_dora=True)
    old = without_prefix(tmp_path / "adapter", tmp_path / "old")
    magnitude = "lora_magnitude_vector"
    first, second, *_ = sorted(key for key in old if key.endswith(magnitude))
    plain = {key.removeprefix(PREFIX): value for key, value in old.items()}
    owner = first.removeprefix(PREFIX).removesuffix(f".{magnitude}")
    path = tmp_path / "old" / "adapter_model.safetensors"
    argv = ["convert", str(tmp_path / "old"), str(tmp_path / "new")]
    changed = plain | {second.removeprefix(PREFIX): old[second][:-1]}
    del changed[first.removeprefix(PREFIX)]
    save_file(changed, path)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert f"{owner}: has no {magnitude}, where use_dora=True" in said
    size = len(old[second])
    assert f"{second.removeprefix(PREFIX)}: got ({size - 1},), wanted ({size},)" in said
    save_file(plain, path)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config = tmp_path / "old" / "adapter_config.json"
    config.write_text(json.dumps(fields | {"use_dora": False}))
    assert main(argv) == 2
    assert f"{owner}: has {magnitude}, where use_dora=False" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
