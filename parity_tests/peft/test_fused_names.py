"""Fused rows of a table of names: the file's bytes, the same ΔW, and what is refused."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import LoraConfig, load_config, load_pretrained, plan, save_pretrained
from lora_jax.core import delta
from lora_jax.core.adapter import Full
from lora_jax.core.errors import AdapterError, ConfigError
from lora_jax.peft.config_json import AdapterFile
from lora_jax.peft.files import read_weights, write_directory
from lora_jax.peft.keys import PREFIX
from lora_jax.peft.names.naming import Fused, origins, places, torch_name
from parity_tests.models.named_models import random_adapters

D, HEAD = 5, 2
FILES = ("adapter_config.json", "adapter_model.safetensors")
PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class Layout:
    """How the weights lie: the heads of each part, their order in the whole, and JAX's axes."""

    heads: tuple[int, int, int] = (2, 2, 2)
    order: str = "blocks"
    apart: bool = True
    layers: int = 0
    jax_is_fused: bool = False

    @property
    def groups(self) -> int:
        return 1 if self.order == "blocks" else min(self.heads)

    def rows(self) -> list[list[int]]:
        """Which rows of the whole each part is, one at a time."""
        found: list[list[int]] = [[], [], []]
        count = itertools.count()
        for _ in range(self.groups):
            for part, heads in enumerate(self.heads):
                found[part] += [next(count) for _ in range(HEAD * heads // self.groups)]
        return found

    @property
    def table(self) -> dict[str, Any]:
        number = ".{}" if self.layers else ""
        known = self.apart and not self.jax_is_fused
        heads = None if known or self.order == "blocks" else self.groups
        if self.jax_is_fused:
            return {"attn.qkv": Fused(f"m{number}.{{p:q|k|v}}_proj", self.order, heads, self.heads)}
        return {"attn.{p:query|key|value}": Fused(f"m{number}.qkv", self.order, heads)}

    def params(self) -> Any:
        def kernel(heads: int) -> Any:
            out = (heads, HEAD) if self.apart else (heads * HEAD,)
            return {"kernel": jnp.ones((*([self.layers] * bool(self.layers)), D, *out))}

        if self.jax_is_fused:
            return {"attn": {"qkv": kernel(sum(self.heads))}}
        return {"attn": {name: kernel(n) for name, n in zip(PARTS, self.heads, strict=True)}}

    def plan(self, config: LoraConfig) -> Any:
        x = jnp.ones((*([self.layers] * bool(self.layers)), 3, D))

        def one(params: Any, x: Any) -> Any:
            return [jnp.tensordot(x, leaf, 1) for leaf in jax.tree.leaves(params)]

        def fn(params: Any, x: Any) -> Any:
            if not self.layers:
                return one(params, x)
            return jax.lax.scan(lambda _, both: (None, one(*both)), None, (params, x))[1]

        return plan(fn, self.params(), config, x)


layouts = st.builds(
    Layout,
    st.sampled_from([(2, 2, 2), (4, 2, 2)]),
    st.sampled_from(["blocks", "heads"]),
    st.booleans(),
    st.sampled_from([0, 2]),
)


def whole_numbers(rng: Any, *shape: int) -> np.ndarray:
    """Numbers whose products and sums are exact in any order."""
    return rng.integers(-4, 5, shape).astype(np.float32) + 0.5


def drawn(found: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda one: jnp.asarray(whole_numbers(rng, *one.shape)), found.abstract())


def deltas(layout: Layout, adapters: Any) -> np.ndarray:
    """Return ``ΔW`` of the adapters as the file has the whole: ``(layers, out, in)``."""
    layers = max(layout.layers, 1)
    whole = np.zeros((layers, HEAD * sum(layout.heads), D), np.float32)
    for path, adapter in adapters.items():
        change = np.asarray(delta.delta(adapter)).reshape(layers, D, -1)
        part = PARTS.index(path.split(".")[1]) if not layout.jax_is_fused else None
        rows = range(whole.shape[1]) if part is None else layout.rows()[part]
        whole[:, list(rows)] = change.transpose(0, 2, 1)
    return whole


def file_deltas(layout: Layout, directory: Path) -> np.ndarray:
    """Return the same from a file, by nothing but its tensors and its configuration."""
    config, tensors = load_config(directory), read_weights(directory)
    whole = np.zeros((max(layout.layers, 1), HEAD * sum(layout.heads), D), np.float32)
    for key, a in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        names = module.split(".")
        rows = range(whole.shape[1])
        if layout.jax_is_fused:
            rows = layout.rows()["qkv".index(names[-1][0])]
        alpha = next(
            (v for k, v in config.alpha_pattern.items() if k.replace("\\", "") == module),
            config.lora_alpha,
        )
        b = tensors[key.replace("lora_A", "lora_B")]
        layer = int(names[1]) if layout.layers else 0
        whole[layer, list(rows)] = (alpha / len(a)) * (b @ a)
    return whole


def read(layout: Layout, directory: Path) -> tuple[Any, Any]:
    config = load_config(directory, names=layout.table, params=layout.params())
    assert config.r == load_config(directory, names=layout.table).r, "with and without params"
    found = layout.plan(config)
    return found, load_pretrained(directory, found, names=layout.table)


def assert_same_bytes(one: Path, other: Path) -> None:
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def write(directory: Path, layout: Layout, seed: int, ranks: Any, share: bool) -> None:
    """Write a file as PEFT would: one pair for each module, or one A for all of a layer's."""
    rng = np.random.default_rng(seed)
    tensors, modules = {}, {}
    for layer in range(max(layout.layers, 1)):
        number = f".{layer}" * bool(layout.layers)
        names = {f"m{number}.qkv": (HEAD * sum(layout.heads), 0)}
        if layout.jax_is_fused:
            names = {
                f"m{number}.{p}_proj": (HEAD * heads, n)
                for n, (p, heads) in enumerate(zip("qkv", layout.heads, strict=True))
            }
        a = whole_numbers(rng, ranks[0], D)
        for name, (out, n) in names.items():
            own = a if share else whole_numbers(rng, ranks[n], D)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = own
            tensors[f"{PREFIX}{name}.lora_B.weight"] = whole_numbers(rng, out, len(own))
            modules[name] = len(own)
    config = LoraConfig(r=ranks[0], lora_alpha=2 * ranks[0], target_modules=tuple(modules))
    if any(r != ranks[0] for r in modules.values()):
        patterns = {name.replace(".", r"\."): r for name, r in sorted(modules.items())}
        # powers of two as scales, so that what is rescaled stays exact
        alphas = {name: r * 2 ** (r % 3) for name, r in patterns.items()}
        config = replace(config, rank_pattern=patterns, alpha_pattern=alphas)
    write_directory(directory, AdapterFile(config), tensors)


@pytest.mark.parametrize("jax_is_fused", [False, True])
@settings(max_examples=8, deadline=None)
@given(layout=layouts, seed=st.integers(0, 9), r=st.sampled_from([1, 3]))
def test_a_file_whose_parts_share_a_comes_back_in_bytes(jax_is_fused, layout, seed, r):
    layout = replace(layout, jax_is_fused=jax_is_fused)
    with tempfile.TemporaryDirectory() as scratch:
        one, two = Path(scratch, "one"), Path(scratch, "two")
        write(one, layout, seed, (r, r, r), share=True)
        found, adapters = read(layout, one)
        assert {leaf.r for leaf in found.adapted} == {r}
        np.testing.assert_array_equal(deltas(layout, adapters), file_deltas(layout, one))
        save_pretrained(two, found, adapters, names=layout.table)
        assert_same_bytes(one, two)


@pytest.mark.parametrize("jax_is_fused", [False, True])
@settings(max_examples=8, deadline=None)
@given(layout=layouts, seed=st.integers(0, 9), r=st.integers(1, 3), subset=st.booleans())
def test_what_jax_trained_is_the_same_change_in_the_file(jax_is_fused, layout, seed, r, subset):
    layout = replace(layout, jax_is_fused=jax_is_fused)
    targets = ["attn.qkv"] if jax_is_fused else ["query", "value"] + ["key"] * (not subset)
    found = layout.plan(LoraConfig(r=r, lora_alpha=4 * r, target_modules=targets))
    adapters = drawn(found, seed)
    with tempfile.TemporaryDirectory() as scratch:
        one, two = Path(scratch, "one"), Path(scratch, "two")
        save_pretrained(one, found, adapters, names=layout.table)
        wanted = deltas(layout, adapters)
        np.testing.assert_array_equal(file_deltas(layout, one), wanted)
        again, loaded = read(layout, one)
        assert {leaf.r for leaf in again.adapted} == {r if jax_is_fused else len(targets) * r}
        np.testing.assert_array_equal(deltas(layout, loaded), wanted)
        # from then on the parts share A
        save_pretrained(two, again, loaded, names=layout.table)
        assert_same_bytes(one, two)


@settings(max_examples=8, deadline=None)
@given(layout=layouts, seed=st.integers(0, 9), ranks=st.sampled_from([(2, 2, 2), (1, 3, 2)]))
def test_parts_that_differ_are_one_weight_of_the_sum_of_their_ranks(layout, seed, ranks):
    layout = replace(layout, jax_is_fused=True)
    with tempfile.TemporaryDirectory() as scratch:
        one, two = Path(scratch, "one"), Path(scratch, "two")
        write(one, layout, seed, ranks, share=False)
        found, adapters = read(layout, one)
        assert [leaf.r for leaf in found.adapted] == [sum(ranks)]
        wanted = file_deltas(layout, one)
        np.testing.assert_allclose(deltas(layout, adapters), wanted, rtol=1e-6, atol=1e-5)
        save_pretrained(two, found, adapters, names=layout.table)
        np.testing.assert_allclose(file_deltas(layout, two), wanted, rtol=1e-6, atol=1e-5)


def test_parts_of_other_ranks_and_scales_are_one_weight(tmp_path):
    layout = Layout()
    config = LoraConfig(
        r=2,
        target_modules=PARTS,
        rank_pattern={"key": 3},
        alpha_pattern={"query": 4, "key": 3, "value": 16},
    )
    found = layout.plan(config)
    adapters = drawn(found)
    save_pretrained(tmp_path / "a", found, adapters, names=layout.table)
    wanted = deltas(layout, adapters)
    np.testing.assert_array_equal(file_deltas(layout, tmp_path / "a"), wanted)
    again, loaded = read(layout, tmp_path / "a")
    assert {(leaf.r, leaf.scale) for leaf in again.adapted} == {(7, 2.0)}
    np.testing.assert_array_equal(deltas(layout, loaded), wanted)


def test_a_file_that_leaves_parts_out_changes_nothing_there(tmp_path):
    layout = Layout(jax_is_fused=True)
    write(tmp_path / "a", layout, 0, (2, 2, 2), share=False)
    tensors = read_weights(tmp_path / "a")
    kept = {key: value for key, value in tensors.items() if "k_proj" not in key}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=("m.q_proj", "m.v_proj"))
    write_directory(tmp_path / "b", AdapterFile(config), kept)
    found, adapters = read(layout, tmp_path / "b")
    assert found.adapted[0].r == 4
    wanted = file_deltas(layout, tmp_path / "b")
    np.testing.assert_array_equal(deltas(layout, adapters), wanted)
    assert not wanted[0, layout.rows()[1]].any() and wanted[0, layout.rows()[0]].any()


@pytest.mark.parametrize("jax_is_fused", [False, True])
def test_dora_has_the_magnitudes_of_all_parts(jax_is_fused, tmp_path):
    layout = Layout(order="heads", jax_is_fused=jax_is_fused)
    targets = ["qkv"] if jax_is_fused else list(PARTS)
    found = layout.plan(LoraConfig(r=2, target_modules=targets, use_dora=True))
    adapters = drawn(found)
    save_pretrained(tmp_path / "a", found, adapters, names=layout.table)
    tensors = read_weights(tmp_path / "a")
    again, loaded = read(layout, tmp_path / "a")
    rows = layout.rows()
    for n, (path, adapter) in enumerate(adapters.items()):
        m = np.asarray(adapter.magnitude)
        np.testing.assert_array_equal(loaded[path].magnitude, m)
        if jax_is_fused:
            for p, own in zip("qkv", rows, strict=True):
                got = tensors[f"{PREFIX}m.{p}_proj.lora_magnitude_vector"]
                np.testing.assert_array_equal(got, m.reshape(-1)[own])
        else:
            part = PARTS.index(path.split(".")[1])
            got = tensors[f"{PREFIX}m.qkv.lora_magnitude_vector"][rows[part]]
            np.testing.assert_array_equal(got, m.reshape(-1), err_msg=str(n))
    save_pretrained(tmp_path / "b", again, loaded, names=layout.table)
    if jax_is_fused:
        return
    half = layout.plan(LoraConfig(target_modules=["key"], use_dora=True))
    with pytest.raises(AdapterError, match="DoRA of some parts alone"):
        save_pretrained(tmp_path / "c", half, drawn(half), names=layout.table)


@pytest.mark.parametrize("jax_is_fused", [False, True])
def test_biases_are_fused_too(jax_is_fused, tmp_path):
    layout = Layout(order="heads", jax_is_fused=jax_is_fused)
    names = ("qkv",) if jax_is_fused else PARTS
    params = layout.params()
    for own in params["attn"].values():
        own["bias"] = jnp.ones(own["kernel"].shape[1:])

    def fn(p, x):
        return [jnp.tensordot(x, p["attn"][n]["kernel"], 1) + p["attn"][n]["bias"] for n in names]

    config = LoraConfig(r=2, target_modules=names, bias="lora_only")
    found = plan(fn, params, config, jnp.ones((3, D)))
    adapters = drawn(found)
    save_pretrained(tmp_path / "a", found, adapters, names=layout.table)
    tensors = read_weights(tmp_path / "a")
    biases = {key: value for key, value in tensors.items() if key.endswith("base_layer.bias")}
    assert len(biases) == (3 if jax_is_fused else 1)
    for n, own in enumerate(layout.rows()):
        if jax_is_fused:
            got = biases[f"{PREFIX}m.{'qkv'[n]}_proj.base_layer.bias"]
            wanted = np.asarray(adapters["attn.qkv.bias"].value).reshape(-1)[own]
        else:
            got = biases[f"{PREFIX}m.qkv.base_layer.bias"][own]
            wanted = np.asarray(adapters[f"attn.{PARTS[n]}.bias"].value).reshape(-1)
        np.testing.assert_array_equal(got, wanted)
    loaded = load_config(tmp_path / "a", names=layout.table, params=params)
    again = plan(fn, params, loaded, jnp.ones((3, D)))
    values = load_pretrained(tmp_path / "a", again, names=layout.table)
    for path, one in adapters.items():
        if isinstance(one, Full):
            kept = values[path]
            assert isinstance(kept, Full)
            np.testing.assert_array_equal(kept.value, one.value)
    save_pretrained(tmp_path / "b", again, values, names=layout.table)
    if jax_is_fused:
        assert_same_bytes(tmp_path / "a", tmp_path / "b")


def test_a_plan_whose_parts_differ_cannot_read_a_fused_weight(tmp_path):
    layout = Layout()
    write(tmp_path / "a", layout, 0, (2, 2, 2), share=True)
    for config in (
        LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"]),
        LoraConfig(r=2, lora_alpha=4, target_modules=PARTS, rank_pattern={"key": 3}),
    ):
        with pytest.raises(AdapterError, match=r"m.qkv: got .*key.*wanted one rank and scale"):
            load_pretrained(tmp_path / "a", layout.plan(config), names=layout.table)
    fused = Layout(jax_is_fused=True)
    write(tmp_path / "b", fused, 0, (2, 2, 2), share=False)
    small = fused.plan(LoraConfig(r=2, lora_alpha=4, target_modules=["qkv"]))
    with pytest.raises(AdapterError, match="the file's parts make rank 6, the plan has 2"):
        load_pretrained(tmp_path / "b", small, names=fused.table)
    with pytest.warns(UserWarning, match="left out: attn.qkv.kernel"):
        some, _ = load_pretrained(tmp_path / "b", small, names=fused.table, strict=False)
    assert some == {}


def test_a_fused_file_with_a_tensor_too_few_is_refused(tmp_path):
    for jax_is_fused in (False, True):
        layout = Layout(jax_is_fused=jax_is_fused)
        directory = tmp_path / str(jax_is_fused)
        write(directory, layout, 0, (2, 2, 2), share=True)
        found, _ = read(layout, directory)
        tensors = read_weights(directory)
        lost = next(key for key in tensors if key.endswith("B.weight"))
        del tensors[lost]
        write_directory(directory, AdapterFile(load_config(directory)), tensors, overwrite=True)
        with pytest.raises(AdapterError, match="missing"):
            load_pretrained(directory, found, names=layout.table)


def test_weights_that_do_not_fit_their_row_are_all_listed(tmp_path):
    def saved(layout, table):
        targets = ["qkv"] if layout.jax_is_fused else list(PARTS)
        found = layout.plan(LoraConfig(r=2, target_modules=targets))
        save_pretrained(tmp_path / "a", found, random_adapters(found), names=table)

    flat = Layout(order="heads", apart=False)
    row = {"attn.{p:query|key|value}": Fused("m.qkv", "heads")}
    with pytest.raises(AdapterError, match=r"m.qkv: got outputs \[4, 4, 4\].*heads=None"):
        saved(flat, row)
    with pytest.raises(AdapterError, match="heads=3"):
        saved(flat, {"attn.{p:query|key|value}": Fused("m.qkv", "heads", heads=3)})
    with pytest.raises(AdapterError, match="wanted 4 parts that the function uses"):
        saved(flat, {"attn.{p:query|key|value|gate}": Fused("m.qkv")})
    with pytest.raises(AdapterError, match=r"attn.qkv.kernel: got outputs .*widths \(5, 1, 1\)"):
        fused = Layout(jax_is_fused=True)
        saved(fused, {"attn.qkv": Fused("m.{p:q|k|v}_proj", widths=(5, 1, 1))})
    assert not (tmp_path / "a").exists()


def test_rows_that_cannot_be_fused_are_all_listed():
    table = {
        "a.{p:q|k}": Fused("x.{p}"),
        "b": Fused("y"),
        "c": Fused("z.{p:q|k}", widths=(1, 2, 3)),
        "d": Fused("w.{p:q|k}", order="interleaved"),
        "e": Fused("v.{p:q|k}", heads=2),
    }
    with pytest.raises(ConfigError) as error:
        torch_name(table, "a.q.kernel")
    assert all(f"'{name}" in str(error.value) for name in "abcde")


def test_both_directions_of_a_fused_row():
    table = {
        "h.{n}.{p:query|key}": Fused("h.{n}.qk"),
        "{m:x|y}.kv": Fused("{m}.{p:k|v}_proj"),
    }
    assert [(o.name, o.part) for o in origins(table, "h.3.qk")] == [
        ("h.3.query", 0),
        ("h.3.key", 1),
    ]
    assert [o.name for o in places(table, "y.kv.kernel")] == ["y.k_proj", "y.v_proj"]
    [place] = places(table, "h.11.key.kernel")
    assert (place.name, place.part, place.parts, place.jax_is_fused) == ("h.11.qk", 1, 2, False)
    [origin] = origins(table, "x.v_proj")
    assert (origin.name, origin.part, origin.jax_is_fused) == ("x.kv", 1, True)
    assert not origins(table, "z.v_proj") and not places(table, "h.1.value.kernel")
