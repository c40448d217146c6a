"""The core: initialisers, the maths on arrays, merging, paths and files."""

from __future__ import annotations

import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import Adapter, Full, merge
from lora_jax.core import delta, paths
from lora_jax.core.adapter import a_shape, b_shape, pick
from lora_jax.core.errors import OutputError
from lora_jax.core.initializers import INITIALIZERS, draw
from lora_jax.core.io.atomic_files import output_directory, write_atomic

KEY = jax.random.key(0)

# name -> (bound of A, or None), whether B is zero, for in = 40 and r = 6
CONVENTIONS = {
    True: (1 / math.sqrt(40), True),
    "kaiming_uniform": (1 / math.sqrt(40), True),
    "kaiming_uniform_rank": (1 / math.sqrt(6), True),
    "torch": (1 / math.sqrt(40), True),
    "gaussian": (None, True),
    False: (1 / math.sqrt(40), False),
    "orthogonal": (None, False),
    "embedding": (None, False),
    "embedding_both": (None, False),
}


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initialisers_keep_their_convention(name):
    bound, zero = CONVENTIONS[name]
    a, b = draw(KEY, name, (50, 40, 30), "sio", r=6)
    assert a.shape == (50, 40, 6) and b.shape == (50, 6, 30)
    assert a.dtype == b.dtype == jnp.float32
    assert bool((b == 0).all()) == zero
    if bound is not None:
        assert 0.99 * bound < float(jnp.abs(a).max()) <= bound
        assert abs(float(a.std()) / (bound / math.sqrt(3)) - 1) < 0.02
    if name == "gaussian":
        assert abs(float(a.std()) * 6 - 1) < 0.02
    if name is False:
        assert 0.99 / math.sqrt(6) < float(jnp.abs(b).max()) <= 1 / math.sqrt(6)
    if str(name).startswith("embedding"):
        assert abs(float(b.std()) - 1) < 0.02 and bool((a == 0).all()) == (name == "embedding")
    drawn = b if name == "embedding" else a
    assert not np.array_equal(drawn[0], drawn[1]), "stacked pairs must not share one draw"


def test_kaiming_is_jax_variance_scaling():
    a, _ = draw(KEY, True, (40, 30), "io", r=6)
    same = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(KEY, (40, 6))
    np.testing.assert_allclose(np.abs(a).max(), np.abs(same).max(), rtol=0.05)


def test_orthogonal_changes_nothing_but_moves():
    a, b = draw(KEY, "orthogonal", (3, 40, 30), "sio", r=6)
    product = delta.delta(Adapter(a, b, 1.0, "sio"))
    assert float(jnp.abs(product).max()) < 1e-6
    assert float(jnp.abs(a).max()) > 0.01 and float(jnp.abs(b).max()) > 0.01


LAYOUTS = ["io", "oi", "sio", "ios", "iioo", "isoi", "soi", "oii", "ossi"]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(LAYOUTS), st.sampled_from([1, 2, 3]), st.integers(0, 9))
def test_delta_is_the_outer_sum_over_the_rank(axes, r, seed):
    rng = np.random.default_rng(seed)
    shape = tuple([2, 3, 5, 4][: len(axes)])
    a, b = rng.normal(size=a_shape(shape, axes, r)), rng.normal(size=b_shape(shape, axes, r))
    adapter = Adapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), 0.7, axes)
    wanted = np.zeros(shape)
    for index in np.ndindex(*shape):
        s, i, o = (pick(index, axes, letter) for letter in "sio")
        wanted[index] = 0.7 * sum(a[(*s, *i, k)] * b[(*s, k, *o)] for k in range(r))
    np.testing.assert_allclose(delta.delta(adapter), wanted, rtol=1e-5, atol=1e-5)


def test_dora_norm_is_the_norm_over_the_in_axes():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(7, 5)).astype(np.float32)
    adapter = Adapter(
        jnp.asarray(rng.normal(size=(7, 2)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, 5)), jnp.float32),
        2.0,
    )
    whole = w + np.asarray(delta.delta(adapter))
    np.testing.assert_allclose(
        delta.dora_norm(jnp.asarray(w), adapter), np.linalg.norm(whole, axis=0), rtol=1e-6
    )


def test_merging_into_bf16_sums_in_fp32_and_rounds_once():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(64, 48)), jnp.bfloat16)
    a, b = (jnp.asarray(rng.normal(size=s) / 8, jnp.bfloat16) for s in ((64, 6), (6, 48)))
    adapter = Adapter(a, b, 16 / 6)
    got = merge({"w": w}, {"w": adapter})["w"]
    exact = np.asarray(w, np.float64) + 16 / 6 * np.asarray(a, np.float64) @ np.asarray(
        b, np.float64
    )
    wanted = jnp.asarray(exact.astype(np.float32)).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    assert float(jnp.mean(got == wanted)) > 0.999
    coarse = w + (a @ b) * jnp.asarray(16 / 6, jnp.bfloat16)
    assert float(jnp.mean(coarse == wanted)) < 0.95, "the check cannot tell the two apart"


def test_merge_returns_a_new_tree_and_copies_what_is_not_adapted():
    params = {"w": jnp.ones((3, 2)), "rest": (jnp.ones(4), "text", None), "head": jnp.ones(2)}
    adapters = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), 1.0), "head": Full(jnp.zeros(2))}
    merged = merge(params, adapters)
    assert merged["rest"][0] is not params["rest"][0] and merged["rest"][1] == "text"
    np.testing.assert_array_equal(merged["rest"][0], params["rest"][0])
    assert float(merged["w"][0, 0]) == 2.0 and float(params["w"][0, 0]) == 1.0
    assert float(merged["head"].sum()) == 0.0


def test_adapters_survive_what_jax_puts_into_trees():
    adapter = Adapter(jnp.ones((3, 2)), jnp.ones((2, 4)), 0.5, "io", 0.1)
    shapes = jax.tree.map(lambda leaf: leaf.shape, {"w": adapter})
    assert shapes["w"].a == (3, 2) and shapes["w"].scale == 0.5 and shapes["w"].dropout == 0.1
    assert jax.tree.leaves(jax.tree.map(lambda _: 0, adapter)) == [0, 0]
    keys = [paths.path_of(k) for k, _ in jax.tree_util.tree_leaves_with_path({"w": adapter})]
    assert keys == ["w.a", "w.b"]


def test_two_leaves_of_one_path_are_an_error():
    with pytest.raises(ValueError, match=r"a\.b"):
        paths.flatten({"a": {"b": 1}, "a.b": 2})


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    write_atomic({one: b"1", two: b"2"})
    real = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OutputError, match="full"):
        write_atomic({one: b"new", two: b"new"})
    assert (one.read_bytes(), two.read_bytes()) == (b"1", b"2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    assert os.replace is real


def test_output_directories_are_refused_before_anything_is_lost(tmp_path):
    assert output_directory(tmp_path / "new" / "deep").is_dir()
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot write"):
            output_directory(bad)
    with pytest.raises(OutputError, match="--overwrite"):
        output_directory(tmp_path)
    assert output_directory(tmp_path, overwrite=True) == tmp_path
    assert Path(tmp_path / "file").read_text() == "x"
