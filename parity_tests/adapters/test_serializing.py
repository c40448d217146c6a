"""Adapters written and read by what people save trees with: the same bits, and what is static."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax import export

from lora_jax import Adapter, Full, Rows, lora, select, stack

A, B = jnp.arange(3.0).reshape(3, 1) / 7, jnp.arange(2.0).reshape(1, 2) / 3
# One of every kind, with every field away from its default, and in every dtype.
ADAPTERS = {
    "w": Adapter(A, B, 16 / 6, "io", 0.1, True, None, jnp.array([0.5, 2.0]), None, True),
    "w[0:2]": Adapter(A, B, 2, columns=(0, 2)),
    "layers.w": Adapter(
        jnp.ones((2, 3, 1), jnp.bfloat16), jnp.ones((2, 1, 2), jnp.bfloat16), 0.5, "sio"
    ),
    "biased": Adapter(A, B, jnp.asarray(0.3), bias=jnp.array([1.0, -2.0])),
    "head": Full(jnp.array([1.5, -0.0], jnp.bfloat16)),
    "embed": Rows(jnp.array([[1.0, 2.0]]) / 3, (4,), "io", 0),
}


def equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == two.dtype
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def through_pickle(tree, like, folder):
    return pickle.loads(pickle.dumps(tree))


def through_msgpack(tree, like, folder):
    return serialization.from_bytes(like, serialization.to_bytes(tree))


def through_orbax(tree, like, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "saved", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "saved", like)


WAYS = [through_pickle, through_msgpack, through_orbax]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_same_bits_and_what_is_static(way, tmp_path):
    zeros = jax.tree.map(jnp.zeros_like, ADAPTERS)
    got = way(ADAPTERS, zeros, tmp_path)
    equal(got, ADAPTERS)
    assert got["w[0:2]"].scale == 2 and isinstance(got["w[0:2]"].scale, int)
    stacked = stack([{"w": ADAPTERS["w[0:2]"]}, {"w": ADAPTERS["w[0:2]"]}])
    equal(way(stacked, jax.tree.map(lambda leaf: 0 * leaf, stacked), tmp_path / "stacked"), stacked)
    state = optax.adamw(1e-3).init({"w": ADAPTERS["w"]})
    equal(way(state, jax.tree.map(jnp.zeros_like, state), tmp_path / "state"), state)


def test_msgpack_reads_the_scale_that_was_written():
    """Of the target only the paths count: another scale there would be silently wrong."""
    other = {"w": Adapter(A * 0, B * 0, 99.0)}
    written = serialization.to_bytes({"w": ADAPTERS["w"]})
    equal(serialization.from_bytes(other, written), {"w": ADAPTERS["w"]})
    whole = jax.tree.map(np.asarray, serialization.to_state_dict({"w": ADAPTERS["w"]}))
    equal(serialization.from_state_dict(other, whole), {"w": ADAPTERS["w"]})


def test_another_kind_is_refused():
    state = serialization.to_state_dict(ADAPTERS)
    with pytest.raises(ValueError, match="no state of Full: got fields .* of another kind"):
        serialization.from_state_dict(ADAPTERS["head"], state["w"])
    with pytest.raises(ValueError, match="no state of Adapter: it lacks .'b'.$"):
        less = {name: value for name, value in state["w"].items() if name != "b"}
        serialization.from_state_dict(ADAPTERS["w"], less)
    with pytest.raises(ValueError, match="no state of Adapter: got .'a', 'b'., wanted 'static'"):
        serialization.from_state_dict(ADAPTERS["w"], {"a": A, "b": B})


def test_a_copy_and_an_old_pickle_know_nothing_of_jax():
    jax.tree.leaves(ADAPTERS)  # what JAX asks for is kept beside the fields
    assert "_aux" not in pickle.loads(pickle.dumps(ADAPTERS["w"])).__dict__
    equal(copy.deepcopy(ADAPTERS), ADAPTERS)


def test_an_exported_function_that_takes_and_returns_adapters(tmp_path):
    params, x = {"w": jnp.arange(6.0).reshape(3, 2)}, jnp.ones((2, 3))

    def fn(p, x):
        return x @ p["w"]

    adapters = {"w": Adapter(A, B, 16 / 6, magnitude=jnp.array([0.5, 2.0]))}
    step = jax.jit(jax.grad(lambda a, x: jnp.sin(lora(fn)(params, a, x)).sum()))
    read = export.deserialize(export.export(step)(adapters, x).serialize())
    equal(read.call(adapters, x), step(adapters, x))
    with pytest.raises(ValueError, match="scale"):
        read.call({"w": Adapter(A, B, 1.0, magnitude=jnp.ones(2))}, x)
    serve = jax.jit(lambda stacked, n, x: lora(fn)(params, select(stacked, n), x))
    several = stack([adapters, adapters])
    read = export.deserialize(export.export(serve)(several, 1, x).serialize())
    equal(read.call(several, 1, x), serve(several, 1, x))
    every = export.export(jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree)))
    equal(
        export.deserialize(every(ADAPTERS).serialize()).call(ADAPTERS),
        jax.tree.map(lambda leaf: leaf * 2, ADAPTERS),
    )


def test_flax_may_be_imported_later():
    code = """
import sys, jax, jax.numpy as jnp
from lora_jax import LoraConfig, plan
assert "flax" not in sys.modules
params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
found = plan(lambda p, x: x @ p["w"], params, LoraConfig(r=1, target_modules=["w"]), x)
from flax.serialization import from_bytes, to_bytes
made = found.init(jax.random.key(0))
assert (from_bytes(made, to_bytes(made))["w"].a == made["w"].a).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
