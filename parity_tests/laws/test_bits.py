"""Arrays moved as their bits: the same values and derivatives, and no stack widened on a CPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ad_checkpoint

from lora_jax.core.xla import bf16_slices
from lora_jax.optim.losses import linear_cross_entropy

LAYERS, ROWS, WIDTH = 3, 8, 24
ON_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="only CPUs widen")
KINDS = (jnp.bfloat16, jnp.float16, jnp.float32)


def draw(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def kept(named, weights, x):
    """Return a loss of a scan whose every step keeps what it names, and computes the rest again."""

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("kept"))
    def layer(x, weight):
        hidden = named(x @ weight, "kept")
        return x + jnp.sin(hidden) * hidden, None

    x, _ = jax.lax.scan(layer, x, weights)
    return jnp.sum(x.astype(jnp.float32) ** 2)


def arguments(dtype):
    return draw((LAYERS, WIDTH, WIDTH), dtype) / WIDTH, draw((ROWS, WIDTH), dtype, 1)


@pytest.mark.parametrize("dtype", KINDS, ids=lambda dtype: dtype.__name__)
def test_what_is_named_has_the_same_values_and_gradients_bit_for_bit(dtype):
    found, wanted = (
        jax.jit(jax.value_and_grad(functools.partial(kept, named), argnums=(0, 1)))(
            *arguments(dtype)
        )
        for named in (bf16_slices.checkpoint_name, ad_checkpoint.checkpoint_name)
    )
    assert jax.tree.leaves(found)[1].dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert all(np.any(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(found))


@ON_CPU
def test_what_is_kept_is_stacked_as_bits():
    def stacks(named):
        step = jax.grad(functools.partial(kept, named), argnums=1)
        text = jax.jit(step).lower(*arguments(jnp.bfloat16)).compile().as_text()
        shape = f"[{LAYERS},{ROWS},{WIDTH}]"
        return {dtype for dtype in ("u16", "f32") if f"{dtype}{shape}" in text}

    assert "u16" in stacks(bf16_slices.checkpoint_name)
    assert "u16" not in stacks(ad_checkpoint.checkpoint_name), "XLA does it by itself by now"


@pytest.mark.parametrize("transform", ["jvp", "vmap", "second"])
def test_transforms_go_through(transform):
    x, t = draw((ROWS, WIDTH), jnp.bfloat16), draw((ROWS, WIDTH), jnp.bfloat16, 1)

    def fn(named, x):
        return jnp.sin(named(x * x, "kept"))

    def found(named):
        own = functools.partial(fn, named)
        if transform == "jvp":
            return jax.jvp(own, (x,), (t,))
        if transform == "vmap":
            return jax.vmap(own)(x)
        return jax.jvp(jax.grad(lambda x: own(x).sum()), (x,), (t,))

    one, two = found(bf16_slices.checkpoint_name), found(ad_checkpoint.checkpoint_name)
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", KINDS, ids=lambda dtype: dtype.__name__)
def test_a_slice_has_the_same_values_and_derivatives(dtype, axis):
    x, t = draw((ROWS, WIDTH), dtype), draw((ROWS, WIDTH), dtype, 1)

    def found(cut):
        def fn(x):
            return cut(x, jnp.int32(2), 3, axis) ** 2

        gradient = jax.jit(jax.grad(lambda x: fn(x).sum()))(x)
        return jax.jvp(fn, (x,), (t,)), gradient

    one, two = found(bf16_slices.dynamic_slice_in_dim), found(jax.lax.dynamic_slice_in_dim)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert np.any(np.asarray(one[1], np.float32))


@ON_CPU
@pytest.mark.parametrize("transposed", [False, True])
def test_a_narrow_head_is_cut_as_bits_with_the_same_loss_and_gradient(transposed, monkeypatch):
    vocabulary, chunk = 50, 16
    hidden, labels = draw((ROWS, WIDTH), jnp.bfloat16), jnp.arange(ROWS)
    head = draw((vocabulary, WIDTH) if transposed else (WIDTH, vocabulary), jnp.bfloat16, 1)

    def loss(hidden, head):
        return linear_cross_entropy(hidden, head, labels, chunk=chunk, transposed=transposed)

    def found():
        step = jax.jit(lambda *args: jax.value_and_grad(loss)(*args))
        text = step.lower(hidden, head).compile().as_text()
        return step(hidden, head), f"u16[{','.join(map(str, head.shape))}]" in text

    one, as_bits = found()
    monkeypatch.setattr(bf16_slices, "widens", lambda x: False)
    two, as_they_are = found()
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert as_bits and not as_they_are
