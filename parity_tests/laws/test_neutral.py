"""Every kind of adapter entry has a neutral value: no adapter is the base, bit for bit."""

from __future__ import annotations

from dataclasses import fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax import Adapter, Full, LoraConfig, Rows, lora, merge, per_example, plan, select, stack
from lora_jax.core import paths
from lora_jax.core.adapter import is_number

V, D, F, T, LAYERS, BATCH = 7, 6, 8, 5, 2, 4
SHAPES = {
    "embed.embedding": (V, D),
    "layers.kernel": (LAYERS, D, D),
    "up.kernel": (D, F),
    "up.bias": (F,),
    "conv.kernel": (3, F, 9),
}


def model(params, ids, active=None):
    """A lookup, a scan over stacked layers, a dense layer, a convolution and a tied head."""
    h = params["embed"]["embedding"][ids]
    h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["layers"]["kernel"])
    y = jnp.tanh(h @ params["up"]["kernel"] + params["up"]["bias"])
    numbers = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(
        y, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=numbers
    )
    return h @ params["embed"]["embedding"].T, y


def dense(params, ids):
    """Without what has no rule for a bias, a mask or a range of columns."""
    h = jax.nn.one_hot(ids, D, dtype=params["up"]["kernel"].dtype)
    return jnp.tanh(h @ params["up"]["kernel"] + params["up"]["bias"])


SAVED = ["conv", "embed"]
TIED = dict(ensure_weight_tying=True)
EVERY = ["embed", "layers", "up", "conv"]
KINDS = {
    "pair": (model, dict(target_modules=EVERY)),
    "dora": (model, dict(target_modules=EVERY, use_dora=True)),
    "bias": (dense, dict(target_modules=["up"], lora_bias=True)),
    "columns": (dense, dict(target_modules=["up"], output_slices={"up": [(0, 3), (5, 8)]})),
    "masked": (dense, dict(target_modules=["up"], alora_invocation_tokens=[1, 2])),
    "dropout": (dense, dict(target_modules=["up"], lora_dropout=0.5)),
    "full": (
        model,
        dict(
            target_modules=["up"],
            modules_to_save=["conv", "embed"],
            bias="all",
            ensure_weight_tying=True,
        ),
    ),
    "rows": (
        model,
        dict(target_modules=["up"], trainable_token_indices=[5, 1], ensure_weight_tying=True),
    ),
}


def drawn(dtype, seed=0):
    rng = np.random.default_rng(seed)
    leaves = {path: rng.normal(size=shape) / 2 for path, shape in SHAPES.items()}
    params = {path.split(".")[0]: {} for path in SHAPES}
    for path, value in leaves.items():
        module, leaf = path.split(".")
        params[module][leaf] = jnp.asarray(value, dtype)
    return params, jnp.asarray(rng.integers(0, V, (BATCH, T)))


def away(rng, leaf):
    return leaf + jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype)


def trained(kind, dtype):
    """Two trained adapters of a kind, everything in them away from where it starts."""
    fn, options = KINDS[kind]
    params, ids = drawn(dtype)
    trees = []
    for seed, r in enumerate((2, 3)):
        config = LoraConfig(r=r, lora_alpha=4, **options)
        start = plan(fn, params, config, ids).init(jax.random.key(seed))
        rng = np.random.default_rng(seed)
        trees.append(jax.tree.map(partial(away, rng), start))
    return fn, params, ids, trees


def equal(got, wanted):
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def moved(got, wanted) -> bool:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return any(bool((one != two).any()) for one, two in pairs)


def alone(fn, params, adapters, ids):
    """The base for each example; a leaf trained in full is mapped over, as bits may tell."""
    full = [path for path, entry in adapters.items() if isinstance(entry, Full)]
    leaves = paths.flatten(params)
    copies = {path: jnp.stack([leaves[path]] * len(ids)) for path in full}

    def one(own, row):
        return jax.tree.map(lambda y: y[0], fn(paths.replace(params, own), row[None]))

    return jax.vmap(one)(copies, ids)


def at(tree, where):
    return jax.tree.map(lambda y: y[where], tree)


@pytest.mark.parametrize("kind", [*KINDS][:5])
def test_no_adapter_is_the_base(kind):
    check_neutral(kind, "float32")


@pytest.mark.parametrize("kind", [*KINDS][5:])
def test_no_adapter_is_the_base_of_others(kind):
    check_neutral(kind, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_adapter_is_the_base_of_bfloat16(kind):
    check_neutral(kind, "bfloat16")


def check_neutral(kind, dtype):
    """Alone, in a mixed batch, and merged; op by op, as a compiler may order sums as it likes."""
    fn, params, ids, trees = trained(kind, dtype)
    stacked, index = stack(trees), np.array([0, -1, 1, -1])
    none, chosen = (select(stacked, n, params) for n in (-1, index))
    keywords = dict(active=jnp.ones(ids.shape, bool)) if kind == "masked" else {}
    keywords |= dict(dropout_key=jax.random.key(3)) if kind == "dropout" else {}
    with jax.disable_jit():
        base, apart = fn(params, ids), alone(fn, params, chosen, ids)
        equal(lora(fn)(params, none, ids, **keywords), base)
        mixed = per_example(lora(fn))(params, chosen, ids, **keywords)
    equal(at(mixed, index < 0), at(apart, index < 0))
    for n in (0, 2):
        assert moved(at(mixed, n), at(apart, n)), "vacuous: this adapter does nothing"
    if kind != "masked":
        equal(merge(params, none), params)


def test_every_kind_of_entry_is_among_them():
    """A new kind of entry, or a new field of one, wants a neutral value."""
    kinds, used = set(), set()
    for kind in KINDS:
        *_, trees = trained(kind, "float32")
        for entry in trees[0].values():
            kinds.add(type(entry))
            used |= {
                f.name
                for f in fields(entry)
                if isinstance(entry, Adapter) and getattr(entry, f.name) != f.default
            }
    assert kinds == {Adapter, Full, Rows}
    assert used | {"materialize"} == {f.name for f in fields(Adapter)}


def test_a_magnitude_of_zero_is_none_only_without_a_scale():
    """A column that training brought to zero stays there."""
    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))

    def fn(p, x):
        return x @ p["w"]

    pair = Adapter(jnp.ones((3, 1)), jnp.zeros((1, 2)), 1.0, magnitude=jnp.array([0.0, 1.0]))
    wanted = [0.0, 3 / np.sqrt(3)]
    np.testing.assert_allclose(lora(fn)(params, {"w": pair}, x)[0], wanted, rtol=1e-6)
    chosen = select(stack([{"w": pair}]), 0)
    assert not is_number(chosen["w"].scale)
    np.testing.assert_allclose(lora(fn)(params, chosen, x)[0], wanted, rtol=1e-6)


def test_a_leaf_that_is_narrower_than_the_base_loses_nothing_of_it():
    params = {"w": jnp.full((3, 2), 1.001)}
    narrow = stack([{"w": Full(jnp.ones((3, 2), jnp.bfloat16))}])
    equal(select(narrow, -1, params)["w"].value, params["w"])
    equal(select(narrow, np.array([0, -1]), params)["w"].value[1], params["w"])
