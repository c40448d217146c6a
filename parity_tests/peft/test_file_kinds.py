"""Files with convolutions and DoRA, without their model: opened, written, combined, merged."""

from __future__ import annotations

import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lora_jax import Adapter, merge, open_adapter, without_dora, write_adapter
from lora_jax.adapters.merge import rounding
from lora_jax.cli.main import main
from lora_jax.core import delta as changes
from lora_jax.core.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
AXES = {"embed": "io", "one": "oii", "two": "oiii", "three": "oiiii", "linear": "oi"}


class Net(torch.nn.Module):
    """Every kind of layer that PEFT adapts, all sizes different."""

    def __init__(self, groups=1):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 7)
        self.one = torch.nn.Conv1d(7, 8, 3, padding=1)
        self.two = torch.nn.Conv2d(8, 6, (3, 5), padding="same", groups=groups)
        self.three = torch.nn.Conv3d(6, 5, (2, 3, 1))
        self.linear = torch.nn.Linear(5, 9)

    def forward(self, ids):
        x = torch.tanh(self.one(self.embed(ids).mT))
        x = torch.tanh(self.two(x[..., None].expand(*x.shape, 4)))
        x = torch.tanh(self.three(x[..., None].expand(*x.shape, 3)))
        return self.linear(x.mean((2, 3, 4)))


IDS = torch.arange(10).reshape(2, 5)


def net(groups=1):
    torch.manual_seed(0)
    return Net(groups)


def drawn(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "magnitude" in name:
            value.data *= 1 + 0.3 * torch.rand(value.shape, generator=generator)
        elif "lora_" in name:
            value.data = 0.3 * torch.randn(value.shape, generator=generator)
    return model.eval()


def pefts(directory=None, seed=1, groups=1, **fields):
    """PEFT's model with a random adapter, saved in this directory."""
    config = dict(r=4, lora_alpha=6, target_modules=list(AXES), rank_pattern={"two": 3})
    model = peft.get_peft_model(net(groups), peft.LoraConfig(**(config | fields)))
    drawn(model, seed)
    if directory is not None:
        model.save_pretrained(directory, save_embedding_layers=False)
    return model


def base_directory(directory):
    """The base as a model directory."""
    directory.mkdir()
    tensors = {name: value.numpy() for name, value in net().state_dict().items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def run(capsys, *argv):
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def dora(request):
    return request.param


def test_a_file_is_read_and_written_as_it_was(dora, tmp_path):
    model = pefts(tmp_path / "a", use_dora=dora)
    file, adapters = open_adapter(tmp_path / "a")
    assert {name: one.axes for name, one in adapters.items()} == AXES
    assert all((one.magnitude is not None) == dora for one in adapters.values())
    write_adapter(tmp_path / "b", file, adapters)
    ours, theirs = (load_file(tmp_path / d / WEIGHTS) for d in "ba")
    assert ours.keys() == theirs.keys() and len(ours) == (15 if dora else 10)
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
    again = peft.PeftModel.from_pretrained(net(), str(tmp_path / "b")).eval()
    torch.testing.assert_close(again(IDS), model(IDS), rtol=0, atol=0)


def test_a_merged_checkpoint_is_pefts(dora, tmp_path, capsys):
    model = pefts(tmp_path / "a", use_dora=dora)
    base = base_directory(tmp_path / "base")
    code, out, err = run(capsys, "merge", base, tmp_path / "a", tmp_path / "out")
    assert code == 0, err
    assert "warning" not in out
    got = load_file(tmp_path / "out" / "model.safetensors")
    plain = net().state_dict()
    truth = copy.deepcopy(model).double().merge_and_unload().state_dict()
    assert got.keys() == truth.keys()
    for name, exact in truth.items():
        error = np.abs(got[name] - exact.numpy()).max()
        assert error <= 1e-6 * np.abs(exact.numpy()).max(), name
        changed = np.abs(plain[name].numpy() - exact.numpy()).max() > 0.1
        assert changed == (name.removesuffix(".weight") in AXES), name
    merged = net()
    merged.load_state_dict({name: torch.from_numpy(value) for name, value in got.items()})
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(IDS), model(IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
def test_combinations_are_pefts(kind, tmp_path, capsys):
    targets = ["two", "three"]
    for name, seed in (("a", 1), ("b", 2)):
        pefts(tmp_path / name, seed, target_modules=targets)
    options = ("--weights", "0.7", "0.4", "--type", kind)
    adapters = (tmp_path / "a", tmp_path / "b")
    code, out, err = run(capsys, "combine", tmp_path / "c", *adapters, *options)
    assert code == 0, err
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path / "a"), adapter_name="a")
    theirs.load_adapter(str(tmp_path / "b"), adapter_name="b")
    layers = theirs.base_model.model
    if kind != "svd":
        theirs.add_weighted_adapter(["a", "b"], [0.7, 0.4], "c", combination_type=kind)
    _, ours = open_adapter(tmp_path / "c")
    assert {name: one.axes for name, one in ours.items()} == {n: AXES[n] for n in targets}
    for name, one in ours.items():
        layer = layers.get_submodule(name)
        # PEFT's own "svd" fails with kernels larger than 1.
        wanted = (
            best(0.7 * delta(layer, "a") + 0.4 * delta(layer, "b"), 4)
            if kind == "svd"
            else delta(layer, "c")
        )
        np.testing.assert_allclose(changes.delta(one), wanted, rtol=1e-4, atol=1e-5)


def delta(layer, adapter):
    return layer.get_delta_weight(adapter).detach().double().numpy()


def best(change, r):
    u, sigma, vt = np.linalg.svd(change.reshape(len(change), -1), full_matrices=False)
    return ((u[:, :r] * sigma[:r]) @ vt[:r]).reshape(change.shape)


def test_dora_is_not_combined_and_the_reason_is_said(tmp_path, capsys):
    pefts(tmp_path / "a", use_dora=True)
    code, _, err = run(capsys, "combine", tmp_path / "c", tmp_path / "a", tmp_path / "a")
    assert code != 0 and "two: DoRA's change is not A·B alone" in err
    assert not (tmp_path / "c").exists()


def test_inspect_shows_kernels_and_magnitudes(dora, tmp_path, capsys):
    pefts(tmp_path / "a", use_dora=dora, target_modules=["embed", "two"])
    code, out, err = run(capsys, "inspect", tmp_path / "a")
    assert code == 0, err
    (row,) = [line for line in out.splitlines() if line.startswith("two ")]
    assert "(3, 8, 3, 5)" in row and "(6, 3, 1, 1)" in row
    assert ("|magnitude|" in out) == ("|s·A·B|" in out) == dora
    assert ("|ΔW|" in out) == (not dora)
    if dora:
        key = "base_model.model.two.lora_magnitude_vector"
        size = np.linalg.norm(load_file(tmp_path / "a" / WEIGHTS)[key])
        assert row.endswith(f"{size:.4g}")


def test_diff_of_two_files(dora, tmp_path, capsys):
    fields = dict(use_dora=dora, target_modules=["two", "linear"])
    pefts(tmp_path / "a", **fields)
    pefts(tmp_path / "b", seed=2, **fields)
    code, out, err = run(capsys, "diff", tmp_path / "a", tmp_path / "a")
    assert code == 0, err
    wanted = "equal, magnitude equal" if dora else "equal"
    rows = [line for line in out.splitlines() if line.startswith(tuple(AXES))]
    assert len(rows) == 2 and all(row.endswith(wanted) for row in rows)
    code, out, _ = run(capsys, "diff", tmp_path / "a", tmp_path / "b")
    (row,) = [line for line in out.splitlines() if line.startswith("two ")]
    one, other = (open_adapter(tmp_path / d)[1]["two"] for d in "ab")
    plain = [dataclasses.replace(each, magnitude=None) for each in (one, other)]
    x, y = map(changes.delta, plain)
    said = f"{jnp.linalg.norm(x - y) / jnp.linalg.norm(x):.3g}"
    assert said in row
    if dora:
        size = jnp.linalg.norm(one.magnitude - other.magnitude) / jnp.linalg.norm(one.magnitude)
        assert row.endswith(f"magnitude {size:.3g}")


def test_diff_of_dora_and_plain_says_so(tmp_path, capsys):
    pefts(tmp_path / "a", use_dora=True)
    pefts(tmp_path / "b")
    code, out, _ = run(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 0 and "equal, a magnitude in one of them only" in out
    assert "use_dora: True and False" in out


def test_an_alora_is_not_merged(tmp_path, capsys):
    file, adapters = open_adapter(plain_linear(tmp_path / "plain"))
    masked = {name: dataclasses.replace(one, masked=True) for name, one in adapters.items()}
    config = dataclasses.replace(file.config, alora_invocation_tokens=[1])
    write_adapter(tmp_path / "a", dataclasses.replace(file, config=config), masked)
    base = base_directory(tmp_path / "base")
    code, _, err = run(capsys, "merge", base, tmp_path / "a", tmp_path / "out")
    assert code != 0 and "they cannot be merged" in err and "linear" in err
    assert not (tmp_path / "out").exists()


def plain_linear(directory):
    pefts(directory, target_modules=["linear"], rank_pattern={})
    return directory


def edited(directory, change):
    tensors = {name: value.copy() for name, value in load_file(directory / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})


KEY = "base_model.model.two."
EDITS = {
    "no magnitude": (True, lambda t: t.pop(KEY + "lora_magnitude_vector"), "vector: missing"),
    "a magnitude too many": (
        False,
        lambda t: t.update({KEY + "lora_magnitude_vector": np.ones(6, np.float32)}),
        "vector: unexpected, as use_dora is false",
    ),
    "a flat magnitude": (
        True,
        lambda t: t.update({KEY + "lora_magnitude_vector": np.ones(6, np.float32)}),
        r"vector: got \(6,\), wanted \(1, 6, 1, 1\)",
    ),
    "a magnitude alone": (
        True,
        lambda t: t.update({"base_model.model.x.lora_magnitude_vector": np.ones(6, np.float32)}),
        "x.lora_A.weight: missing",
    ),
    "B with a window": (
        False,
        lambda t: t.update({KEY + "lora_B.weight": np.ones((6, 3, 3, 5), np.float32)}),
        "wanted sizes of 1 behind the rank",
    ),
    "B of a matrix": (
        False,
        lambda t: t.update({KEY + "lora_B.weight": np.ones((6, 3), np.float32)}),
        r"lora_B.weight: got \(6, 3\), wanted a matrix or a kernel",
    ),
    "six axes": (
        False,
        lambda t: t.update(
            {
                KEY + "lora_A.weight": np.ones((3, 8, 1, 1, 1, 1), np.float32),
                KEY + "lora_B.weight": np.ones((6, 3, 1, 1, 1, 1), np.float32),
            }
        ),
        "wanted a matrix or a kernel",
    ),
    "another rank": (
        False,
        lambda t: t.update({KEY + "lora_A.weight": np.ones((4, 8, 3, 5), np.float32)}),
        "wanted rank 3 on axis 0",
    ),
    "another dtype": (
        True,
        lambda t: t.update({KEY + "lora_magnitude_vector": np.ones((1, 6, 1, 1), np.int32)}),
        "got int32, wanted floating point",
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_file_that_is_no_adapter_is_refused(case, tmp_path):
    dora, change, match = EDITS[case]
    pefts(tmp_path / "a", use_dora=dora)
    edited(tmp_path / "a", change)
    with pytest.raises(AdapterError, match=match):
        open_adapter(tmp_path / "a")


def test_a_grouped_convolution_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="groups > 1"):
        pefts(tmp_path / "a", groups=2, r=4, rank_pattern={})
    with pytest.raises(AdapterError, match="two.lora_B.weight: got .* a grouped convolution's"):
        open_adapter(tmp_path / "a")


def test_what_a_file_has_no_place_for_is_not_written(tmp_path):
    pefts(tmp_path / "a")
    file, adapters = open_adapter(tmp_path / "a")
    wrong = adapters | {
        "two": dataclasses.replace(adapters["two"], axes="ioii"),
        "one": dataclasses.replace(adapters["one"], magnitude=jnp.ones(8)),
        "linear": dataclasses.replace(adapters["linear"], axes="oii"),
    }
    with pytest.raises(AdapterError) as caught:
        write_adapter(tmp_path / "b", file, wrong)
    for line in ("two: got axes 'ioii'", "one: got DoRA's magnitude", "linear: got (5, 4) and"):
        assert line in str(caught.value)


def test_the_rounding_of_doras_change_is_of_all_of_it():
    rng = np.random.default_rng(0)
    w, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((9, 6), (9, 2), (2, 6)))
    one = Adapter(a, b, 0.5, magnitude=jnp.full(6, 2.0))
    whole = rounding(w.astype(jnp.bfloat16), [one])
    assert whole.error < 0.02 and whole.changed == 54 and whole.warning is None
    little = dataclasses.replace(one, b=b * 1e-6, magnitude=jnp.linalg.norm(w, axis=0))
    assert rounding(w, [little]).error < 0.1


@pytest.mark.parametrize("axes", ["io", "oi", "sio", "oiii"])
def test_dora_as_a_plain_pair(axes):
    rng = np.random.default_rng(0)
    shape = {"io": (7, 5), "oi": (5, 7), "sio": (3, 7, 5), "oiii": (5, 4, 3, 2)}[axes]
    stacked = shape[:1] if axes[0] == "s" else ()
    into = {"oiii": (4, 3, 2)}.get(axes, (7,))
    sizes = ((*stacked, *into, 2), (*stacked, 2, 5), (*stacked, 5), shape)
    a, b, m, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)
    params, other = {"w": w, "v": w}, Adapter(a, b, 0.5, axes)
    adapters = {"w": dataclasses.replace(other, magnitude=jnp.abs(m) + 1), "v": other}
    whole = merge(params, adapters)
    exact, errors = without_dora(params, adapters, r=7)
    assert exact["w"].magnitude is None and errors.keys() == {"w"} and errors["w"] < 1e-6
    np.testing.assert_allclose(merge(params, exact)["w"], whole["w"], rtol=1e-5, atol=1e-5)
    # As it was, but a copy: either may be donated.
    assert exact["v"].scale == other.scale and exact["v"].a is not other.a
    np.testing.assert_array_equal(exact["v"].a, other.a)
    np.testing.assert_array_equal(exact["v"].b, other.b)
    small, errors = without_dora(params, adapters)
    change = np.asarray(whole["w"] - w, np.float64)
    left = change - np.asarray(merge(params, small)["w"] - w, np.float64)
    assert small["w"].a.shape == a.shape and errors["w"] > 0.1
    assert errors["w"] == pytest.approx(np.linalg.norm(left) / np.linalg.norm(change), rel=1e-4)
    order = [n for letter in "sio" for n, one in enumerate(axes) if one == letter]
    matrices = change.transpose(order).reshape(*stacked, -1, 5)
    sigma = np.linalg.svd(matrices, compute_uv=False)
    best = np.sqrt((sigma[..., 2:] ** 2).sum() / (sigma**2).sum())
    assert errors["w"] == pytest.approx(best, rel=1e-4)


def test_a_plain_pair_of_rank_0_or_for_nothing_is_refused():
    pair = Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), 1.0, magnitude=jnp.ones(2))
    with pytest.raises(AdapterError, match="r: got 0"):
        without_dora({"w": jnp.ones((3, 2))}, {"w": pair}, 0)
    with pytest.raises(AdapterError, match="v: no such parameter"):
        without_dora({"w": jnp.ones((3, 2))}, {"v": pair})
