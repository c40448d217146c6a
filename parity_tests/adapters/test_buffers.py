"""What is made of adapters or parameters shares no array with them: either may be donated."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax
import lora_jax.nnx
from lora_jax import Adapter, Full, LoraConfig, Rows, linen, plan, stack
from lora_jax.adapters.inits import initialise, relative_to


def pair(r=2, scale=0.5, **fields):
    return Adapter(jnp.ones((3, r)), jnp.full((r, 4), 0.25), scale, **fields)


def model(p, ids):
    return p["embed"][ids] @ p["w"] @ p["v"] + p["bias"]


def params():
    return {
        "w": jnp.arange(12.0).reshape(3, 4) / 7,
        "v": jnp.arange(12.0).reshape(4, 3) / 5,
        "embed": jnp.ones((5, 3)),
        "bias": jnp.ones(3),
    }


def pairs():
    return {"w": pair(), "v": Adapter(jnp.ones((4, 2)), jnp.ones((2, 3)), 2)}


def every():
    full, rows = Full(jnp.ones(3)), Rows(jnp.ones((1, 3)), (2,))
    return {**pairs(), "bias": full, "embed": rows}


def plus(tree, **more):
    return {**tree, **more}


@functools.cache
def related():
    """A plan, and PiSSA's adapters beside a leaf that is trained as it is."""
    config = LoraConfig(
        r=2, init_lora_weights="pissa", target_modules=["w", "v"], modules_to_save=["bias"]
    )
    found = plan(model, params(), config, jnp.array([1]))
    return found, initialise(found, params(), jax.random.key(0))[1]


def started():
    return jax.tree.map(jnp.copy, related()[1])


# The function of what may be donated, and the arguments that make it.
FUNCTIONS = {
    "merge": (lora_jax.merge, lambda: (params(), every())),
    "merge of one": (lora_jax.merge, lambda: (params(), {"w": pair()})),
    "scale_by": (lambda a: lora_jax.scale_by(a, 2.0), lambda: (pairs(),)),
    "add": (lora_jax.add, lambda: (pairs(), {"w": pair()})),
    "add of another": (lora_jax.add, lambda: ({"w": pair()}, pairs())),
    "subtract": (lora_jax.subtract, lambda: ({"w": pair()}, pairs())),
    "rename": (lambda a: lora_jax.rename(a, {"w": "u"}), lambda: (every(),)),
    "resize": (lambda a: lora_jax.resize(a, 2), lambda: (every(),)),
    "resize some": (lambda a: lora_jax.resize(a, {"w": 1}), lambda: (every(),)),
    "combine": (
        lambda a, b: lora_jax.combine([a, b], [1.0, 1.0], "cat"),
        lambda: (pairs(), pairs()),
    ),
    "combine one": (lambda a: lora_jax.combine([a], [1.0]), lambda: ({"w": pair(scale=1.0)},)),
    "combine cat": (
        lambda a, b: lora_jax.combine([a, b], [1.0, 1.0], "cat"),
        lambda: ({"w": pair(scale=1.0)}, {"v": pairs()["v"]}),
    ),
    "without_dora": (
        lora_jax.without_dora,
        lambda: (params(), plus(every(), w=pair(magnitude=jnp.ones(4)))),
    ),
    "stack": (lambda a: stack([a]), lambda: (every(),)),
    "unstack": (lora_jax.unstack, lambda: (stack([every()]),)),
    "select": (lambda s, p: lora_jax.select(s, 0, p), lambda: (stack([every()]), params())),
    "rescale": (lambda s: lora_jax.rescale(s.adapters, s.scales), lambda: (stack([every()]),)),
    "relative_to": (
        lambda start, now: relative_to(related()[0], start, now)[1],
        lambda: (started(), started()),
    ),
    "linen.adapters_of": (
        lambda v: linen.adapters_of(linen.LoRADense(4, r=2), v, jnp.ones((1, 3))),
        lambda: (linen.LoRADense(4, r=2).init(jax.random.key(0), jnp.ones((1, 3))),),
    ),
    "nnx.adapters_of": (
        lambda state: lora_jax.nnx.adapters_of(nnx.merge(layer()[0], state)),
        lambda: (layer()[1],),
    ),
    "plan.init": (
        lambda p: plan(
            model,
            p,
            LoraConfig(r=1, target_modules=["w"], modules_to_save=["v"], bias="all"),
            jnp.array([1]),
        ).init(jax.random.key(0)),
        lambda: (params(),),
    ),
}


def layer():
    """Return an NNX layer's structure and its arrays."""
    return nnx.split(lora_jax.nnx.LoRALinear(3, 4, r=2, rngs=nnx.Rngs(0)))


def donate(tree):
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    used = jax.jit(lambda leaves: [leaf * 2 for leaf in leaves], donate_argnums=0)(arrays)
    jax.block_until_ready(used)
    assert all(leaf.is_deleted() for leaf in arrays)


def alive(tree) -> bool:
    return not any(
        leaf.is_deleted() for leaf in jax.tree.leaves(tree) if hasattr(leaf, "is_deleted")
    )


def values(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def test_either_may_be_donated():
    for name, (fn, made) in FUNCTIONS.items():
        given = made()
        result = fn(*given)
        before = values(result), values(given)
        assert before[0], f"{name}: vacuous"
        donate(result)
        assert alive(given), f"{name}: donating the result deletes what it was made from"
        for one, two in zip(values(given), before[1], strict=True):
            np.testing.assert_array_equal(one, two, err_msg=name)
        result = fn(*given)
        donate(given)
        assert alive(result), f"{name}: donating the input deletes the result"
        for one, two in zip(values(result), before[0], strict=True):
            np.testing.assert_array_equal(one, two, err_msg=name)


def test_inside_a_compiled_function_nothing_is_copied():
    text = str(jax.make_jaxpr(lora_jax.merge)(params(), {"w": pair()}))
    assert "copy" not in text
    shared = params()
    assert lora_jax.core.buffers.apart({"a": shared["w"]}, {"b": 1})["a"] is shared["w"]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_merging_into_float8_rounds_once(dtype):
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(30, 40)), dtype)
    a, b = (jnp.asarray(rng.normal(size=s) / 2, jnp.float32) for s in ((30, 2), (2, 40)))
    exact = np.float64(weight) + 0.5 * np.float64(a) @ np.float64(b)
    for own, wanted in (
        (Adapter(a, b, 0.5), exact),
        (Adapter(a, b, 0.5, magnitude=jnp.ones(40)), exact / np.linalg.norm(exact, axis=0)),
    ):
        got = lora_jax.merge({"w": weight}, {"w": own})["w"]
        assert got.dtype == dtype
        # The float32 sum is another at a middle between two values only.
        nearest = wanted.astype(weight.dtype)
        assert (np.asarray(got) != nearest).mean() < 0.002
        assert 0 < lora_jax.merge_report({"w": weight}, {"w": own})["w"].error < 0.5
    part = Adapter(a, b[:, :7], 0.5, columns=(0, 7))
    got = lora_jax.merge({"w": weight}, {"w[0:7]": part})["w"]
    assert (np.asarray(got)[:, :7] != exact.astype(weight.dtype)[:, :7]).mean() < 0.01
    np.testing.assert_array_equal(np.asarray(got)[:, 7:], np.asarray(weight)[:, 7:])


def test_a_sum_that_float8_cannot_hold_is_refused():
    weight = {"w": jnp.full((3, 4), 400.0, jnp.float8_e4m3fn)}
    with pytest.raises(lora_jax.LoraError, match="w: 12 values are not finite in float8_e4m3fn"):
        lora_jax.merge(weight, {"w": pair(scale=400.0)})
