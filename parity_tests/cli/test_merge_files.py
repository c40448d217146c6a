"""What ``lora-jax merge`` writes is finite, whole and PEFT's; ``inspect`` says what is beyond."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from lora_jax import Adapter, merge_report
from lora_jax.cli.checkpoint import Checkpoint
from lora_jax.cli.main import main
from lora_jax.cli.stored_weights import place
from lora_jax.peft.module_tensors import LINEAR, LOOKED_UP

# PEFT takes the bias for a weight that was cut.
pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Model(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(6, 5, bias=bias)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.q(x)))


@pytest.fixture
def tiny(tmp_path):
    """Return a function that stores the model in a dtype and PEFT's adapter of it."""

    def make(dtype=torch.float32, **fields):
        model = Model()
        (tmp_path / "model").mkdir(exist_ok=True)
        stored = {name: v.detach().to(dtype) for name, v in model.named_parameters()}
        safetensors.torch.save_file(stored, tmp_path / "model" / "model.safetensors")
        torch.manual_seed(1)
        config = peft.LoraConfig(**(dict(r=2, lora_alpha=2, target_modules=["q"]) | fields))
        theirs = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for name, value in theirs.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    value.copy_(torch.randn_like(value))
        theirs.save_pretrained(tmp_path / "adapter")
        return theirs

    make.root = tmp_path
    return make


def run(capsys, *argv):
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def merge(capsys, root):
    return run(capsys, "merge", root / "model", root / "adapter", root / "out")


def edited(root, **fields):
    path = root / "adapter" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("dtype", "alpha"), [(torch.float32, 3e38), (torch.float16, 1e6), (torch.bfloat16, 3e38)]
)
def test_a_merged_weight_that_is_not_finite_is_an_error_and_nothing_is_written(
    dtype, alpha, tiny, capsys
):
    tiny(dtype)
    edited(tiny.root, lora_alpha=alpha)
    code, _, err = merge(capsys, tiny.root)
    name = str(dtype).removeprefix("torch.")
    assert code == 2
    [line] = [line for line in err.splitlines() if "q.weight" in line]
    assert f"of 30 values are NaN or infinite in {name}" in line
    assert not (tiny.root / "out").exists()
    code, out, _ = run(capsys, "inspect", tiny.root / "adapter")
    said = [line for line in out.splitlines() if line.startswith("suspicious: q: ")]
    beyond = "beyond float16" + (" and float32" if alpha > 1e30 else "")
    assert code == 0 and len(said) == 2
    assert said[0].startswith("suspicious: q: the scale is") and "beyond float16" in said[0]
    assert said[1].startswith("suspicious: q: |ΔW| is") and said[1].endswith(beyond)


@pytest.mark.parametrize("command", ["merge", "inspect", "combine", "convert"])
def test_an_alpha_beyond_float32_is_refused(command, tiny, capsys):
    tiny()
    edited(tiny.root, lora_alpha=1e39)
    given = {
        "merge": ["model", "adapter", "out"],
        "inspect": ["adapter"],
        "combine": ["out", "adapter", "adapter"],
        "convert": ["adapter", "out"],
    }[command]
    code, _, err = run(capsys, command, *(tiny.root / name for name in given))
    assert code == 2 and "lora_alpha: got 1e+39, wanted a finite number of float32" in err
    assert not (tiny.root / "out").exists()


def test_a_change_that_fits_is_not_complained_of(tiny, capsys):
    tiny(torch.float16)
    edited(tiny.root, lora_alpha=1e3)
    assert merge(capsys, tiny.root)[0] == 0
    code, out, _ = run(capsys, "inspect", tiny.root / "adapter")
    assert code == 0 and "beyond" not in out


def test_a_replaced_weight_beyond_the_stored_dtype_is_an_error(tiny, capsys):
    tiny(torch.float16, modules_to_save=["head"])
    stored = load_file(tiny.root / "adapter" / WEIGHTS)
    key = next(key for key in stored if key.endswith("head.bias"))
    save_file(stored | {key: stored[key] * 1e9}, tiny.root / "adapter" / WEIGHTS)
    code, _, err = merge(capsys, tiny.root)
    assert code == 2 and "head.bias: 3 of 3 values are NaN or infinite in float16" in err


def test_a_base_that_is_not_finite_is_the_users_own(tiny, capsys):
    tiny()
    path = tiny.root / "model" / "model.safetensors"
    stored = load_file(path)
    stored["q.weight"][2, 3] = np.nan
    save_file(stored, path)
    assert merge(capsys, tiny.root)[0] == 0
    assert np.isnan(load_file(tiny.root / "out" / "model.safetensors")["q.weight"]).sum() == 1


def test_the_report_of_a_merge_says_that_it_is_not_finite():
    pair = Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=1e6)
    found = merge_report({"w": jnp.ones((3, 2), jnp.float16)}, {"w": pair})["w"]
    assert found.error == np.inf and "not finite in float16" in (found.warning or "")


def test_lora_bias_is_merged_into_the_stored_bias(tiny, capsys):
    theirs = tiny(lora_bias=True)
    code, out, _ = merge(capsys, tiny.root)
    assert code == 0 and "q.bias: lora_bias added" in out
    served, x = Model(), torch.linspace(-1, 1, 24).reshape(4, 6)
    merged = load_file(tiny.root / "out" / "model.safetensors")
    served.load_state_dict({name: torch.from_numpy(value) for name, value in merged.items()})
    with torch.no_grad():
        wanted = theirs(x)
        torch.testing.assert_close(served(x), wanted, rtol=1e-5, atol=1e-5)
        without = load_file(tiny.root / "model" / "model.safetensors")["q.bias"]
        served.q.bias.copy_(torch.from_numpy(without))
        assert (served(x) - wanted).abs().max() > 0.1
    # Trained in full, too: that one first, and the pair's on it.
    path = tiny.root / "model" / "model.safetensors"
    stored = load_file(path)
    save_file({name: v for name, v in stored.items() if name != "q.bias"}, path)
    code, _, err = run(capsys, "merge", *(tiny.root / n for n in ("model", "adapter", "no")))
    assert code == 2 and "q.bias: not in the model, so there is no bias to add lora_bias to" in err
    save_file(stored | {"q.bias": np.zeros(4, np.float32)}, path)
    code, _, err = run(capsys, "merge", *(tiny.root / n for n in ("model", "adapter", "no")))
    assert code == 2 and "q.bias: lora_bias is (5,), the model has F32(4,)" in err


def test_a_square_conv1d_lies_as_the_others_of_its_adapter_do():
    """A Conv1D is stored (in, out), a linear layer (out, in); a square weight does not tell."""
    pairs = {
        name: Adapter(jnp.ones((4, 1)), jnp.ones((1, out)), 1.0, axes=LINEAR)
        for name, out in (("wide", 6), ("square", 4))
    }
    for wide, wanted in (((4, 6), LOOKED_UP), ((6, 4), LINEAR)):
        shapes = {"wide.weight": wide, "square.weight": (4, 4)}
        model = Checkpoint(Path(), {}, shapes, dict.fromkeys(shapes, "F32"))
        for transposed in (False, True):
            placed = place(pairs, model, transposed=transposed)
            assert {one.axes for one in placed.values()} == {wanted}
    alone = {"square": pairs["square"]}
    for transposed, wanted in ((False, LINEAR), (True, LOOKED_UP)):
        assert place(alone, model, transposed=transposed)["square.weight"].axes == wanted


def test_targets_that_the_model_has_not_are_a_note_and_those_it_has_an_error(tiny, capsys):
    tiny()
    edited(tiny.root, target_modules=["q", "query", "c_attn"])
    code, out, err = merge(capsys, tiny.root)
    assert code == 0 and not err
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert [line.split("'")[1] for line in notes] == ["query", "c_attn"]
    code, out, _ = run(capsys, "inspect", tiny.root / "adapter")
    assert code == 0 and "suspicious: target_modules: 'query' has no adapter" in out
    edited(tiny.root, target_modules=["q", "head"])
    code, _, err = run(capsys, "merge", *(tiny.root / n for n in ("model", "adapter", "no")))
    assert code == 2 and "head: 'head' means it" in err and not (tiny.root / "no").exists()
