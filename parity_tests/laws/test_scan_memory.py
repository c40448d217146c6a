"""What a layer more costs in temporary memory under ``scan``, and what a training step donates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import LoraConfig, lora, plan
from lora_jax.train.data import Batch
from lora_jax.train.step import make_step, start

WIDTH, HIDDEN, TOKENS, R = 32, 96, 3, 2
MATRICES = {name: (WIDTH, WIDTH) for name in "qkvo"} | {
    "gate": (WIDTH, HIDDEN),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}
WEIGHTS = 4 * sum(m * n for m, n in MATRICES.values())


def norm(x):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True))).astype(x.dtype)


def layer(x, weights):
    """One layer of a decoder, in the dtype of its input."""
    q, k, v = (norm(x) @ weights[name] for name in "qkv")
    x = x + jax.nn.softmax(q @ k.T) @ v @ weights["o"]
    h = norm(x)
    return x + (jax.nn.silu(h @ weights["gate"]) * (h @ weights["up"])) @ weights["down"], None


def remat(x, weights):
    return jax.checkpoint(layer)(x, weights)


def keeping_weights(x, weights):
    """A planted cost: what the backward pass needs of every step is of the weights' size."""
    factor = sum(jnp.sum(jnp.sin(jnp.mean(x) * weight)) for weight in weights.values())
    return layer(x, weights)[0] * factor, None


def abstract(layers, dtype):
    stacked = {n: jax.ShapeDtypeStruct((layers, *s), dtype) for n, s in MATRICES.items()}
    return {"layers": stacked}, jax.ShapeDtypeStruct((TOKENS, WIDTH), dtype)


def temporary(body, layers, dtype=jnp.float32, adapted=True):
    """Return the bytes that a compiled gradient step needs beside its arguments and results.

    The step is of the adapters under ``lora``, or of the input without any.
    """

    def fn(params, x):
        return jnp.sum(jax.lax.scan(body, x, params["layers"])[0].astype(jnp.float32))

    def step(adapters, params, x):
        return jax.value_and_grad(lambda a: lora(fn)(params, a, x))(adapters)

    params, x = abstract(layers, dtype)
    if not adapted:
        return temporary_bytes(jax.value_and_grad(fn, 1), params, x)
    found = plan(fn, params, LoraConfig(r=R, target_modules=[*MATRICES]), x)
    return temporary_bytes(step, found.abstract(), params, x)


def temporary_bytes(step, *arguments):
    return jax.jit(step).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def growth(body, **options):
    """Return the bytes for one layer more, the same from 2 to 4 as from 4 to 8 layers."""
    two, four, eight = (temporary(body, layers, **options) for layers in (2, 4, 8))
    assert (four - two) / 2 == pytest.approx((eight - four) / 4, rel=0.05, abs=1024)
    return (eight - four) / 4


@pytest.mark.slow
def test_a_layer_more_keeps_its_activations_and_no_weights():
    """Some 30 rows of activations of at most the hidden size; the weights are far larger."""
    a_layer = growth(layer)
    assert a_layer < 4 * TOKENS * 30 * HIDDEN < WEIGHTS, a_layer


@pytest.mark.slow
def test_with_remat_a_layer_more_keeps_its_input_alone():
    assert growth(remat) <= 2 * 4 * TOKENS * WIDTH


@pytest.mark.slow
def test_bfloat16_weights_are_copied_no_more_than_without_adapters():
    """XLA for CPUs hoists their conversion to float32 out of the loop, with adapters or without."""
    with_adapters = growth(layer, dtype=jnp.bfloat16)
    without = growth(layer, dtype=jnp.bfloat16, adapted=False)
    assert with_adapters - without < WEIGHTS / 4, (with_adapters, without)


@pytest.mark.slow
def test_weights_that_are_kept_are_seen():
    eight, two = (temporary(keeping_weights, n, adapted=False) for n in (8, 2))
    assert (eight - two) / 6 >= WEIGHTS


def test_a_training_step_writes_adapters_and_moments_where_they_were():
    params = {"w": jnp.ones((WIDTH, HIDDEN))}

    def fn(params, ids, mask):
        return (
            jnp.einsum("bti,bt->bi", jax.nn.one_hot(ids, WIDTH), mask.astype(jnp.float32))
            @ params["w"]
        )

    ids, mask = np.ones((4, 3), np.int32), np.ones((4, 3), np.int32)
    found = plan(fn, params, LoraConfig(r=R, target_modules=["w"]), ids, mask)
    adapters = found.init(jax.random.key(0))
    tx = optax.adam(1e-3)
    state = start(tx, adapters)
    batch = Batch(ids, mask, np.zeros(4, np.int32), np.ones(4, np.float32))
    step = make_step(lora(fn), tx)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert size >= 3 * 4 * R * (WIDTH + HIDDEN)
    memory = step.lower(state, params, batch).compile().memory_analysis()  # pyright: ignore
    assert memory.alias_size_in_bytes == size
    assert memory.argument_size_in_bytes >= size + params["w"].nbytes

    before = np.asarray(params["w"])
    after, _ = step(state, params, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, params)))
    np.testing.assert_array_equal(before, params["w"])
