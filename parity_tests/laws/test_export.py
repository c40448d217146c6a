"""Adapted functions through ``jax.export``, with sizes left open, and adapters as its arguments."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import export

from lora_jax import LoraConfig, alora_mask, lora, plan
from parity_tests.laws import laws, subjects, subjects_products, subjects_structure
from parity_tests.laws.laws import relative

# Those whose first axis of the input is no axis of a weight.
EVERY = [*subjects.ALL, *subjects_products.ALL, *subjects_structure.ALL]
BATCHED = (
    "dense transposed torch_layout heads_out heads_in_swapped merged_heads twice tied two_targets "
    "jitted remat custom_vjp scan scan_in_scan half_precision fused_qkv_query_and_value slice_in "
    "layers_by_index stacked_for_scan joined_out stop_gradient while switch shard_map "
    "conv_2d_strided conv_1d"
).split()
QUICK = ("dense", "two_targets", "scan", "half_precision", "joined_out", "conv_2d_strided")


def symbolic(x, names="b"):
    """Return x's shape with its first axes left open."""
    sizes = [*names, *map(str, x.shape[len(names) :])]
    scope = export.SymbolicScope()
    return jax.ShapeDtypeStruct(export.symbolic_shape(", ".join(sizes), scope=scope), x.dtype)


def check_open(subject, names="b"):
    adapters, fn, params, (x,) = laws.random_adapters(subject)
    call = jax.jit(partial(lora(fn), params, adapters))
    exported = export.export(call)(symbolic(x, names))
    more = jnp.concatenate([x, x[:2]])
    for own in (more, more[:2]):
        assert relative(exported.call(own), call(own)) < (1e-2 if subject.half else 1e-5)


def named(name):
    return next(subject for subject in EVERY if subject.name == name)


def test_a_size_that_is_left_open():
    with laws.quick_compilation():
        for name in QUICK:
            check_open(named(name))
        check_open(named("dense"), "bt")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BATCHED if name not in QUICK])
def test_a_size_that_is_left_open_in_others(name):
    check_open(named(name))


OPTIONS = {
    "dora": dict(use_dora=True),
    "bias": dict(lora_bias=True),
    "dropout": dict(lora_dropout=0.5),
    "masked": dict(alora_invocation_tokens=[7]),
    "columns": dict(output_slices={"w": [(1, 5)]}),
}


def test_options_with_open_sizes_and_adapters_as_arguments():
    """The gradient too, which has A's products the other way round."""
    params = {"w": jnp.ones((3, 8)) / 3}

    def fn(p, x):
        return jnp.tanh(x @ p["w"])

    for name, options in OPTIONS.items():
        x = jnp.linspace(0, 1, 24).reshape(2, 4, 3)
        config = LoraConfig(r=2, target_modules=["w"], **options)
        found = plan(fn, params, config, x)
        adapters = jax.tree.map(lambda leaf: leaf + 0.5, found.init(jax.random.key(0)))
        more, sizes = {}, {}
        if name == "masked":
            more = {"active": alora_mask(jnp.array([[1, 7, 2, 3], [7, 1, 1, 1]]), (7,))}
        if name == "dropout":
            more = {"dropout_key": jax.random.key(1)}
        scope = export.SymbolicScope()
        sizes = {"x": jax.ShapeDtypeStruct(export.symbolic_shape("b, t, 3", scope=scope), x.dtype)}
        if name == "masked":
            shape = export.symbolic_shape("b, t", scope=scope)
            sizes["active"] = jax.ShapeDtypeStruct(shape, bool)
        elif more:
            sizes |= more

        @jax.jit
        def loss(adapters, args):
            args = dict(args)
            return lora(fn)(params, adapters, args.pop("x"), **args).sum()

        exported = export.export(jax.jit(jax.value_and_grad(loss)))(adapters, sizes)
        got = exported.call(adapters, {"x": x, **more})
        assert relative(got, jax.value_and_grad(loss)(adapters, {"x": x, **more})) < 1e-5, name
