"""Subjects of the laws: slices, joins, loops, branches, shards, and what has no rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from parity_tests.laws.subjects import B, D, E, F, H, K, L, Subject

P = PartitionSpec


def layers_by_index(p, x):
    """Stacked layers, each taken out by a counter that is only known in the loop."""
    return lax.fori_loop(0, L, lambda i, h: jnp.tanh(h @ p["w"][i]), x)


def layers_by_number(p, x):
    for i in range(L):
        x = jnp.tanh(x @ p["w"][i])
    return x


def layers_unstacked(p, x):
    for w in jnp.unstack(p["w"]):
        x = jnp.tanh(x @ w)
    return x


def first_half(p, x):
    """Half of the layers, scanned over."""
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"][: L // 2 + 1])[0]


def stacked_for_scan(p, x):
    layers = jnp.stack([p["a"], p["b"]])
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, layers)[0]


def joined_stacks(p, x):
    layers = jnp.concatenate([p["a"], p["b"]])
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, layers)[0]


def joined_out(p, x):
    """Projections that run as one product; one of them is a plain array."""
    frozen = jnp.ones((D, 2), x.dtype)
    return jnp.tanh(x @ jnp.concatenate([p["a"], frozen, p["b"]], axis=1))


def joined_in(p, x):
    return jnp.tanh(jnp.concatenate([x, x[..., :K]], -1) @ jnp.concatenate([p["a"], p["b"]]))


def loop_and_carry(p, x):
    """A while loop has no reverse derivative: its author stops the gradient."""

    def body(carry):
        i, w, h = carry
        return i + 1, w, jnp.tanh(h @ w)

    frozen = lax.stop_gradient(p["w"])
    looped = lax.while_loop(lambda c: c[0] < 3, body, (0, frozen, lax.stop_gradient(x)))[2]
    return x @ p["w"] + looped


def carried_through_a_scan(p, x):
    def step(carry, _):
        w, h = carry
        return (w, jnp.tanh(h @ w)), None

    return lax.scan(step, (p["w"], x), length=3)[0][1]


def branches(p, x):
    which = (x.sum() > 0).astype(np.int32)
    return lax.switch(which, [lambda h: h @ p["w"], lambda h: jnp.sin(h @ p["w"])], x)


def one_branch(p, x):
    return lax.cond(x.sum() > 1e9, lambda h: h @ p["v"], lambda h: jnp.tanh(h @ p["w"]), x)


def mesh():
    return jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))


def sharded_rows(p, x):
    """Each device holds a part of the in axis; the results are summed."""

    def local(w, x):
        return lax.psum(x @ w, "model")

    specs = (P("model", None), P(None, None, "model"))
    return jax.shard_map(local, mesh=mesh(), in_specs=specs, out_specs=P())(p["w"], jnp.tanh(x))


def gathered(p, x):
    """Each device holds a part of the weight and joins it with the others', as in FSDP."""

    def local(w, x):
        return jnp.tanh(x @ lax.all_gather(w, "model", axis=1, tiled=True).T)

    specs = (P(None, "model"), P())
    return jax.shard_map(local, mesh=mesh(), in_specs=specs, out_specs=P(), check_vma=False)(
        p["w"], x
    )


def constrained(p, x):
    w = lax.with_sharding_constraint(p["w"], NamedSharding(mesh(), P(None, "model")))
    return jnp.tanh(x @ w)


def chosen_for_each(p, x):
    """Each example has its own of two weights: ``vmap`` makes a ``select_n`` of the branches."""

    def one(x):
        return x @ lax.cond(x[0] > 0, lambda: p["a"], lambda: -0.5 * p["b"])

    return jnp.tanh(jax.vmap(one)(x))


def chosen_for_all(p, x):
    first = x.sum() > 0
    return x @ jnp.where(first, p["a"], p["b"]), jnp.tanh(x @ jnp.where(first, p["b"], p["a"]))


def chosen_products(p, x):
    """A branch of products for each example; each weight meets all of them, gradients apart."""

    def one(x):
        return lax.cond(x[0] > 0, lambda x: x @ p["a"], lambda x: jnp.sin(x @ p["b"]), x)

    return jax.vmap(one)(x)


def stacked_shards(p, x):
    """Each device has a part of the weight; the parts come along a new axis."""

    def local(w, x):
        return jnp.tanh(x @ lax.all_gather(w, "model").reshape(D, F))

    specs = (P("model"), P())
    return jax.shard_map(local, mesh=mesh(), in_specs=specs, out_specs=P(), check_vma=False)(
        p["w"], x
    )


def repeated(p, x):
    return jnp.einsum("btd,bdf->btf", x, jnp.broadcast_to(p["w"], (B, D, F)))


def masked(p, x):
    """The weight's elements are used one by one, then in a product."""
    mask = jnp.asarray(np.random.default_rng(5).integers(0, 2, (D, F)), x.dtype)
    return jnp.tanh(x @ (p["w"] * mask))


FORM = {"on_unsupported": "materialize"}

ALL = [
    Subject("slice", lambda p, x: x @ p["w"][:, 5:29], {"w": (D, F)}, {"w": "io"}),
    Subject("slice_in", lambda p, x: x[..., 4:24:2] @ p["w"][4:24:2], {"w": (D, F)}, {"w": "io"}),
    Subject(
        "split",
        lambda p, x: [jnp.tanh(x @ w) for w in jnp.split(p["w"], [5, 17], axis=1)],
        {"w": (D, F)},
        {"w": "io"},
        sites=3,
    ),
    Subject(
        "slice_of_heads",
        lambda p, x: x @ p["w"].reshape(D, H, K)[:, 1],
        {"w": (D, H * K)},
        {"w": "io"},
    ),
    Subject("layers_by_index", layers_by_index, {"w": (L, D, D)}, {"w": "sio"}),
    Subject("layers_by_number", layers_by_number, {"w": (L, D, D)}, {"w": "sio"}, sites=L),
    Subject("layers_unstacked", layers_unstacked, {"w": (L, D, D)}, {"w": "sio"}, sites=L),
    Subject("layers_first_half", first_half, {"w": (L, D, D)}, {"w": "sio"}),
    Subject(
        "stacked_for_scan", stacked_for_scan, {"a": (D, D), "b": (D, D)}, {"a": "io", "b": "io"}
    ),
    Subject(
        "joined_stacks",
        joined_stacks,
        {"a": (L, D, D), "b": (E, D, D)},
        {"a": "sio", "b": "sio"},
    ),
    Subject("joined_out", joined_out, {"a": (D, F), "b": (D, K)}, {"a": "io", "b": "io"}),
    Subject("joined_in", joined_in, {"a": (D, F), "b": (K, F)}, {"a": "io", "b": "io"}),
    Subject(
        "number_times_weight", lambda p, x: x @ (-0.5 * p["w"] / 3), {"w": (D, F)}, {"w": "io"}
    ),
    Subject(
        "stop_gradient",
        lambda p, x: jnp.tanh(x @ p["w"]) + x @ lax.stop_gradient(p["w"]),
        {"w": (D, F)},
        {"w": "io"},
        sites=2,
    ),
    Subject(
        "barrier", lambda p, x: x @ lax.optimization_barrier(p["w"]), {"w": (D, F)}, {"w": "io"}
    ),
    Subject("while", loop_and_carry, {"w": (D, D)}, {"w": "io"}, sites=2),
    Subject("scan_carry", carried_through_a_scan, {"w": (D, D)}, {"w": "io"}),
    Subject("switch", branches, {"w": (D, F)}, {"w": "io"}, sites=2),
    Subject("cond", one_branch, {"w": (D, F), "v": (D, F)}, {"w": "io"}),
    Subject(
        "chosen_for_each",
        chosen_for_each,
        {"a": (D, F), "b": (D, F)},
        {"a": "io", "b": "io"},
        (B, D),
    ),
    Subject(
        "chosen_products",
        chosen_products,
        {"a": (D, F), "b": (D, F)},
        {"a": "io", "b": "io"},
        (B, D),
    ),
    Subject(
        "chosen_for_all",
        chosen_for_all,
        {"a": (D, F), "b": (D, F)},
        {"a": "io", "b": "io"},
        sites=2,
    ),
    Subject("shard_map_stacked", stacked_shards, {"w": (D, F)}, {"w": "io"}),
    Subject("shard_map", sharded_rows, {"w": (D, F)}, {"w": "io"}),
    Subject("shard_map_gathered", gathered, {"w": (F, D)}, {"w": "oi"}),
    Subject(
        "device_put",
        lambda p, x: x @ jax.device_put(p["w"], jax.memory.Space.Device),
        {"w": (D, F)},
        {"w": "io"},
    ),
    Subject("sharding_constraint", constrained, {"w": (D, F)}, {"w": "io"}),
    Subject("repeated", repeated, {"w": (D, F)}, {"w": "io"}),
    Subject(
        "elementwise", masked, {"w": (D, F)}, {"w": "io"}, materialized=True, options=FORM, sites=0
    ),
    Subject(
        "product_of_weights",
        lambda p, x: x @ (p["a"] @ p["b"]),
        {"a": (D, F), "b": (F, K)},
        {"a": "oi", "b": "io"},
        materialized=True,
        options=FORM,
    ),
    Subject(
        "repeated_heads",
        lambda p, x: jnp.einsum("btd,dhk->bthk", x, jnp.repeat(p["w"], 2, axis=1)),
        {"w": (D, H, K)},
        {"w": "ioo"},
    ),
    Subject(
        "sum_of_two",
        lambda p, x: jnp.tanh(x @ (p["a"] - 0.5 * p["b"])),
        {"a": (D, F), "b": (D, F)},
        {"a": "io", "b": "io"},
    ),
    Subject(
        "sum_of_slices",
        lambda p, x: jnp.tanh(x @ (p["w"][0] + p["w"][1])),
        {"w": (E, D, F)},
        {"w": "sio"},
    ),
    Subject(
        "named", lambda p, x: jnp.tanh(x @ checkpoint_name(p["w"], "w")), {"w": (D, F)}, {"w": "io"}
    ),
]
