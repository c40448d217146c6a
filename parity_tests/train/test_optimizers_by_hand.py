"""LoRA+, LoRA-FA and Riemannian preconditioning: first steps by hand, shapes, and refusals."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peft.optimizers import create_riemannian_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer

from lora_jax import Adapter
from lora_jax.core.errors import AdapterError
from lora_jax.optim.optimizers import freeze, lora_fa, loraplus, riemannian


def pair(a, b, **fields):
    return {"w": Adapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), **fields)}


def first_update(optimizer, adapters, gradients):
    state = optimizer.init(adapters)
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(optimizer.update)(gradients, state, adapters)[0]["w"]


A, B = np.array([[1.0, 0], [0, 2], [2, 1]]), np.array([[1.0, 2], [0, 1]])
G_A, G_B = np.array([[0.5, 1], [-1, 0], [2, 0.25]]), np.array([[1.0, -2], [0.5, 4]])


def test_the_first_step_of_loraplus_by_hand():
    got = first_update(
        loraplus(0.5, ratio=3, optimizer=lambda rate, decay: optax.sgd(rate)),
        pair(A, B, scale=2.0),
        pair(G_A, G_B, scale=2.0),
    )
    np.testing.assert_array_equal(got.a, -0.5 * G_A)
    np.testing.assert_array_equal(got.b, -1.5 * G_B)


def test_the_first_step_of_riemannian_by_hand():
    # A'A = [[5, 2], [2, 5]], B B' = [[5, 2], [2, 1]]; with the damping 1 on the diagonal
    by_a, by_b = np.array([[6.0, -2], [-2, 6]]) / 32, np.array([[2.0, -2], [-2, 6]]) / 8
    got = first_update(
        riemannian(optax.sgd(1.0), reg=1), pair(A, B, scale=2.0), pair(G_A, G_B, scale=2.0)
    )
    np.testing.assert_allclose(got.a, -G_A @ by_b, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.b, -by_a @ G_B, rtol=1e-6, atol=1e-6)


def test_what_is_not_said_is_pefts_default():
    defaults = {
        name: one.default
        for name, one in inspect.signature(create_riemannian_optimizer).parameters.items()
    }
    adapters, gradients = pair(A, B, scale=2.0), pair(G_A, G_B, scale=2.0)
    plain, said = (
        first_update(riemannian(optax.sgd(1.0), **more), adapters, gradients)
        for more in ({}, {"reg": defaults["reg"]})
    )
    np.testing.assert_array_equal(plain.a, said.a)
    np.testing.assert_array_equal(plain.b, said.b)
    fa = inspect.signature(LoraFAOptimizer.__init__).parameters
    options = {"eps": fa["eps"].default, "weight_decay": fa["weight_decay"].default}
    options |= dict(zip(("b1", "b2"), fa["betas"].default, strict=True))
    options |= {"correct_bias": fa["correct_bias"].default, "learning_rate": fa["lr"].default}
    plain, said = (first_update(lora_fa(**more), adapters, gradients) for more in ({}, options))
    np.testing.assert_array_equal(plain.b, said.b)


def test_the_first_step_of_lora_fa_by_hand():
    # (A'A)^-1 = [[5, -2], [-2, 5]] / 21, the scale is 2
    g = np.array([[5.0, -2], [-2, 5]]) / 21 @ G_B / 4
    m, v = 0.1 * g, 0.001 * g * g
    step = -0.1 * np.sqrt(0.001) / 0.1 * m / (np.sqrt(v) + 1e-2)
    adapters = pair(A, B, scale=2.0)
    got = first_update(
        lora_fa(0.1, weight_decay=0.5, eps=1e-2), adapters, pair(G_A, G_B, scale=2.0)
    )
    np.testing.assert_array_equal(got.a, np.zeros_like(A))
    np.testing.assert_allclose(got.b, step - 0.05 * (B + step), rtol=1e-5, atol=1e-7)


OPTIMIZERS = {
    "loraplus": lambda: loraplus(1e-2, ratio=4, weight_decay=0.1),
    "lora_fa": lambda: lora_fa(1e-2, weight_decay=0.1),
    "riemannian": lambda: riemannian(optax.adamw(1e-2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("axes", ["sio", "ioo", "siio", "osi"])
def test_stacked_layers_and_split_heads_train_as_separate_matrices(name, axes):
    rng, r = np.random.default_rng(len(axes)), 2
    shape = (2, 3, 4, 5)[: len(axes)]
    sizes = {x: [n for n, y in zip(shape, axes, strict=True) if x == y] for x in "sio"}
    stacked, fan_in, out = (int(np.prod(sizes[x], initial=1)) for x in "sio")

    def draw():
        a, b = rng.normal(size=(stacked, fan_in, r)), rng.normal(size=(stacked, r, out))
        whole = pair(
            a.reshape(*sizes["s"], *sizes["i"], r),
            b.reshape(*sizes["s"], r, *sizes["o"]),
            scale=1.5,
            axes=axes,
        )
        return whole, [pair(a[k], b[k], scale=1.5) for k in range(stacked)]

    (whole, parts), (gradient, gradients) = draw(), draw()
    optimizer = OPTIMIZERS[name]()
    got = first_update(optimizer, whole, gradient)
    for k in range(stacked):
        wanted = first_update(optimizer, parts[k], gradients[k])
        for field in ("a", "b"):
            one = np.asarray(getattr(got, field)).reshape(stacked, *getattr(wanted, field).shape)
            np.testing.assert_allclose(one[k], getattr(wanted, field), rtol=2e-4, atol=1e-6)


def test_a_frozen_part_neither_moves_nor_decays_nor_costs_moments():
    adapters = pair(A, B, scale=2.0)
    for part, other in (("a", "b"), ("b", "a")):
        optimizer = freeze(optax.adamw(1e-2, weight_decay=0.9), part)
        got = first_update(optimizer, adapters, pair(G_A, G_B, scale=2.0))
        assert not np.asarray(getattr(got, part)).any() and np.asarray(getattr(got, other)).any()
        shapes = {leaf.shape for leaf in jax.tree.leaves(optimizer.init(adapters)) if leaf.ndim}
        assert shapes == {getattr(adapters["w"], other).shape}


def test_a_scale_that_is_an_array_never_moves():
    adapters = pair(A, B, scale=jnp.float32(2))
    for make in OPTIMIZERS.values():
        assert (
            first_update(make(), adapters, adapters).scale == 0 or make is OPTIMIZERS["riemannian"]
        )


def test_a_schedule_is_followed_and_multiplied():
    schedule = optax.linear_schedule(0.5, 0.1, 4)
    adapters = pair(A, B, scale=2.0)
    optimizer = loraplus(schedule, ratio=3, optimizer=lambda rate, decay: optax.sgd(rate))
    state = optimizer.init(adapters)
    for rate in (0.5, 0.4):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(pair(G_A, G_B, scale=2.0), state, adapters)
        np.testing.assert_allclose(updates["w"].a, -rate * G_A, rtol=1e-6)
        np.testing.assert_allclose(updates["w"].b, -3 * rate * G_B, rtol=1e-6)
    still = first_update(lora_fa(lambda step: 0.0 * step), adapters, adapters)
    assert not np.asarray(still.b).any()


def test_what_would_train_nothing_or_wrongly_is_refused():
    zero = pair(0 * A, B, scale=2.0) | {"v": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), None)}
    with pytest.raises(AdapterError, match="(?s)v: got no scale.*w: got A = 0"):
        lora_fa().init(zero)
    with pytest.raises(AdapterError, match="scale got 0"):
        lora_fa().init(pair(A, B, scale=0))
    with pytest.raises(AdapterError, match="embed: no such adapter"):
        loraplus(1e-3, ratio=2, embeddings=["w", "embed"]).init(pair(A, B, scale=2.0))
    adapters = pair(A, B, scale=2.0)
    for optimizer in (lora_fa(), riemannian(optax.sgd(1.0))):
        with pytest.raises(AdapterError, match="got no params"):
            optimizer.update(adapters, optimizer.init(adapters))
    around = loraplus(1e-3, ratio=2, optimizer=lambda rate, _: riemannian(optax.sgd(rate)))
    with pytest.raises(AdapterError, match="w: got A or B alone"):
        around.update(adapters, around.init(adapters), adapters)
