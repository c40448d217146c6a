"""What a function does to a weight it does to A·B: one example of every kind, all run."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax import Adapter, LoraConfig, lora, merge, plan

N = 6


def drawn(seed=0):
    """Two weights, adapters of other ranks and scales for them, and an input."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {"v": draw(N, N), "w": draw(N, N)}
    adapters = {
        "v": Adapter(draw(N, 2), draw(2, N), 0.5),
        "w": Adapter(draw(N, 3), draw(3, N), 2.0),
    }
    return params, adapters, draw(4, N)


OF_ONE = {
    "a number times it": lambda w: 3.0 * w,
    "over a number": lambda w: w / 4.0,
    "minus it": lambda w: -w,
    "transposed": lambda w: w.T,
    "turned around": lambda w: w[::-1],
    "turned the other way": lambda w: w[:, ::-1],
    "reshaped": lambda w: w.reshape(N, 2, 3).reshape(N, N),
    "a part": lambda w: w[:, 1:5],
    "every other": lambda w: w[:, ::2],
    "a part at run time": lambda w: lax.dynamic_slice_in_dim(w, jnp.asarray(2), 3, axis=1),
    "beside an array": lambda w: jnp.concatenate([w, jnp.ones((N, 2))], axis=1),
}
OF_TWO = {
    "side by side": lambda v, w: jnp.concatenate([v, w], axis=1),
    "the other way round": lambda v, w: jnp.concatenate([w, v], axis=1),
    "parts of both": lambda v, w: jnp.concatenate([w[:, 4:], 2.0 * v[:, :3]], axis=1),
}


def held(fn, params, adapters, x, name):
    """Hold value and gradients of A and B to those of the merged weights."""
    got, pull = jax.vjp(lambda adapters: lora(fn)(params, adapters, x), adapters)
    wanted, push = jax.vjp(lambda adapters: fn(merge(params, adapters), x), adapters)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=name)
    (ours,), (theirs,) = pull(jnp.ones_like(got)), push(jnp.ones_like(got))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4, err_msg=name)


def test_what_is_done_to_a_weight_is_done_to_its_change():
    params, adapters, x = drawn()
    for name, form in OF_ONE.items():
        held(
            lambda p, x, form=form: jnp.tanh(x @ form(p["w"])),
            params,
            {"w": adapters["w"]},
            x,
            name,
        )
    for name, form in OF_TWO.items():
        held(lambda p, x, form=form: jnp.tanh(x @ form(p["v"], p["w"])), params, adapters, x, name)


def test_a_cast_of_the_weight_leaves_a_and_b():
    params, adapters, x = drawn()
    own = {"w": adapters["w"]}

    def fn(params, x):
        return x @ params["w"].astype(jnp.bfloat16).astype(jnp.float32)

    added = lora(fn)(params, own, x) - fn(params, x)
    exact = 2.0 * np.float64(x) @ np.float64(own["w"].a) @ np.float64(own["w"].b)
    assert np.linalg.norm(added - exact) <= 1e-5 * np.linalg.norm(exact)


def test_what_the_author_freezes_does_not_learn():
    params, adapters, x = drawn()

    def fn(params, x):
        return x @ lax.stop_gradient(params["w"]) + x @ params["v"]

    gradients = jax.grad(lambda adapters: lora(fn)(params, adapters, x).sum())(adapters)
    moved = {path: bool(one.a.any() and one.b.any()) for path, one in gradients.items()}
    assert moved == {"v": True, "w": False}


def test_a_scale_that_is_an_array_counts_and_gets_no_gradient():
    params, adapters, x = drawn()

    def fn(params, x):
        return x @ params["w"]

    def loss(scale, b):
        own = {"w": dataclasses.replace(adapters["w"], scale=scale, b=b)}
        return lora(fn)(params, own, x).sum()

    value, (of_scale, of_b) = jax.value_and_grad(loss, (0, 1))(jnp.array(2.0), adapters["w"].b)
    np.testing.assert_allclose(value, loss(2.0, adapters["w"].b), rtol=1e-5)
    assert of_scale == 0 and of_b.any()


def test_ranges_of_one_weight_are_merged_where_they_are():
    params, _, x = drawn()
    config = LoraConfig(r=2, target_modules=["w"], output_slices={"w": ((1, 3), (4, 6))})

    def fn(params, x):
        return x @ params["w"]

    found = plan(fn, params, config, x)
    adapters = jax.tree.map(lambda one: one + 1.0, found.init(jax.random.key(0)))
    merged = merge(params, adapters)
    np.testing.assert_allclose(fn(merged, x), lora(fn)(params, adapters, x), rtol=1e-5, atol=1e-5)
    moved = np.asarray(merged["w"] != params["w"]).any(axis=0)
    assert moved.tolist() == [False, True, True, False, True, True]


# What is drawn


def test_every_path_and_every_range_of_a_weight_draws_its_own_a():
    params, _, x = drawn()
    config = LoraConfig(
        r=2, target_modules=["v", "w"], output_slices={"w": ((0, 2), (3, 5))}, lora_alpha=4
    )
    found = plan(lambda p, x: x @ p["v"] @ p["w"], params, config, x)
    first, other = (found.init(jax.random.key(seed)) for seed in (0, 1))
    assert len(first) == 3
    factors = [one.a for one in (*first.values(), *other.values())]
    for n, one in enumerate(factors):
        assert all(np.abs(one - two).min() > 0 for two in factors[:n])


def test_adapters_are_float32_beside_any_base_and_an_embeddings_a_is_zero():
    """As in PEFT: what is looked up has a random B, and a zero A."""
    params = {"embed": jnp.ones((7, 4), jnp.bfloat16), "w": jnp.ones((4, 3), jnp.bfloat16)}
    config = LoraConfig(r=2, target_modules=["embed", "w"])
    found = plan(lambda p, ids: p["embed"][ids] @ p["w"], params, config, jnp.arange(3))
    adapters = found.init(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    zero = {path: (not one.a.any(), not one.b.any()) for path, one in adapters.items()}
    assert zero == {"embed": (True, False), "w": (False, True)}


def test_all_that_lies_in_a_saved_module_is_trained():
    params = {
        "w": jnp.ones((4, 4)),
        "head": {"dense": {"w": jnp.ones((4, 4))}, "out": jnp.ones((4, 2))},
    }
    config = LoraConfig(r=2, target_modules=["w"], modules_to_save=["head"])

    def fn(params, x):
        return x @ params["w"] @ params["head"]["dense"]["w"] @ params["head"]["out"]

    found = plan(fn, params, config, jnp.ones((3, 4)))
    assert set(found.full) == {"head.dense.w", "head.out"}


LOOPS = {
    "scan": lambda step, x: lax.scan(lambda c, _: (step(c), None), x, None, length=3)[0],
    "while_loop": lambda step, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, step(c[1])), (0, x)
    )[1],
    "fori_loop": lambda step, x: lax.fori_loop(0, 3, lambda _, c: step(c), x),
}


def test_every_turn_of_a_loop_draws_its_own_mask():
    """What is dropped in one turn is another's: the turns are told apart by what they add."""
    size, p = 64, 0.5
    params = {"w": jnp.zeros((size, size))}
    pair = Adapter(jnp.eye(size), jnp.eye(size), 1.0, dropout=p)
    for name, loop in LOOPS.items():

        def fn(params, x, loop=loop):
            # ones are carried on beside the sum, so that each turn sees the same input
            return loop(lambda c: jnp.concatenate([c[:1], c[1:] + c[:1] @ params["w"]]), x)

        out = lora(fn)(
            params,
            {"w": pair},
            jnp.stack([jnp.ones(size), jnp.zeros(size)]),
            dropout_key=jax.random.key(0),
        )
        # kept in 0, 1, 2 or 3 turns of three, twice as large each time; one mask gives 0 or 3
        counts = np.bincount(np.round(np.asarray(out[1]) / 2).astype(int), minlength=4)
        assert (counts > 0).all() and counts.sum() == size, (name, counts)


def test_a_pair_for_each_layer_acts_there_whether_layers_are_kept_or_summed_over():
    rng = np.random.default_rng(0)
    weight, a, b, x = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 4, 3), (2, 4, 1), (2, 1, 3), (5, 2, 4))
    )
    pair = {"w": Adapter(a, b, 2.0, "sio")}

    def apart(params, x):
        return jnp.einsum("bsi,sio->bso", x, params["w"])

    def together(params, x):
        return jnp.einsum("bsi,sio->bo", x, params["w"])

    for fn in (apart, together):
        got, base = lora(fn)({"w": weight}, pair, x), fn({"w": weight + 2.0 * (a @ b)}, x)
        np.testing.assert_allclose(got, base, rtol=1e-5, atol=1e-5)


CHOICES = {
    "a branch for each": lambda v, w, x: jax.vmap(
        lambda x: x @ lax.cond(x[0] > 0, lambda: v, lambda: 2.0 * w)
    )(x),
    "one of three": lambda v, w, x: jax.vmap(
        lambda i, x: x @ lax.switch(i, [lambda: v, lambda: w, lambda: jnp.ones((N, N))])
    )(jnp.argsort(x[:, 0]) % 3, x),
    "a branch in a batch of batches": lambda v, w, x: jax.vmap(
        jax.vmap(lambda x: lax.cond(x[0] > 0, lambda: x @ v.T, lambda: w @ x))
    )(x.reshape(2, 2, N)),
    "one for all": lambda v, w, x: x @ jnp.where(x[0, 0] > 0, v, w),
}


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_choice_between_weights_is_one_between_their_changes(kind):
    """Ranks and scales differ; a frozen array is chosen with no change."""
    params, adapters, x = drawn()
    if kind == "DoRA":
        adapters = {
            name: dataclasses.replace(one, magnitude=jnp.linspace(1.0, 2.0, N))
            for name, one in adapters.items()
        }
    for name, form in CHOICES.items():
        held(lambda p, x, form=form: jnp.tanh(form(p["v"], p["w"], x)), params, adapters, x, name)
