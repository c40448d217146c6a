"""Models on a mesh with explicit axes, for a process with four devices; run by a test.

``python -m parity_tests.laws.explicit_models`` with ``JAX_NUM_CPU_DEVICES=4``, and names of
initialisations to see those alone.
"""

from __future__ import annotations

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from lora_jax import Adapter, LoraConfig, lora, merge, plan
from lora_jax.adapters.inits import initialise

IDS = np.random.default_rng(1).integers(0, 12, (4, 6))
RNG = np.random.default_rng(0)


def row_and_column(p, x):
    """Tensor parallelism; each product says what becomes of its sum."""
    h = jnp.einsum("btd,df->btf", reshard(x, P()), p["up"])
    return jnp.einsum("btf,fd->btd", jnp.tanh(h), p["down"], out_sharding=P(None, None, "x"))


def fully_sharded(p, x):
    h = jnp.einsum("btd,df->btf", x, reshard(p["up"], P(None, "y")))
    down = reshard(p["down"], P("y", None))
    return jnp.einsum("btf,fd->btd", jnp.tanh(h), down, out_sharding=P("x", None, None))


def heads(p, x):
    kernel = reshard(p["up"], P(None, "y")).reshape((8, 4, 4), out_sharding=P(None, "y", None))
    return jnp.einsum("btd,dhk->bthk", x, kernel)


def experts(p, x):
    return jnp.einsum("ebd,edf->ebf", x, p["experts"])


def experts_in_shards(p, x):
    spec = P("x", None, "y")
    local = partial(jnp.einsum, "ebd,edf->ebf")
    mapped = jax.shard_map(local, in_specs=(P("x"), spec), out_specs=spec)
    return mapped(x, reshard(p["experts"], spec))


def gathered_in_shards(p, x):
    def local(x, w):
        return x @ lax.all_gather(w, "x", tiled=True)

    specs = (P("x"), P("x", "y"))
    return jax.shard_map(local, in_specs=specs, out_specs=P("x", None, "y"))(x, p["up"])


def layers(p, x):
    stack = reshard(p["experts"], P())
    return lax.scan(lambda h, w: (jnp.tanh(h @ w @ w.T), None), x, stack)[0]


def tied(p, x):
    looked_up = p["table"].at[IDS].get(out_sharding=P("x", None, "y"))
    h = jnp.tanh(looked_up * reshard(x, P("x", None, "y")))
    return jnp.einsum("btd,vd->btv", h, p["table"], out_sharding=P("x", None, None))


def padded(p, x):
    """An embedding whose padding token is zero, and one row that the data chooses."""
    looked_up = p["table"].at[IDS].get(out_sharding=P("x", None, "y"))
    h = jnp.where((IDS == 0)[..., None], 0.0, looked_up) * reshard(x, P("x", None, "y"))
    return h + p["table"][jnp.argmax(reshard(x, P())[0, 0])]


def automatic(p, x):
    """A part in which the compiler decides about the sharding."""
    product = jax.sharding.auto_axes(lambda x, w: jnp.tanh(x @ w), out_sharding=P("x", None, "y"))
    return product(x, p["up"])


# What is adapted, and how A and B of it are sharded from the start.
UP, DOWN = (P("x", None), P(None, "y")), (P("y", None), P(None, "x"))
EXPERTS = (P("x", None, None), P("x", None, "y"))
MODELS = {
    row_and_column: {"up": UP, "down": DOWN},
    fully_sharded: {"up": UP, "down": DOWN},
    heads: {"up": UP},
    experts: {"experts": EXPERTS},
    experts_in_shards: {"experts": EXPERTS},
    gathered_in_shards: {"up": UP},
    layers: {"experts": EXPERTS},
    tied: {"table": (P(None, None), P(None, "y"))},
    padded: {"table": (P(None, None), P(None, "y"))},
    automatic: {"up": UP},
}

INITS = ("pissa", "pissa_niter_4", "olora", "mica", "loftq", "eva", "corda", "lora_ga")


def drawn(leaf):
    """Return random values, sharded as the leaf is."""
    values = jnp.asarray(RNG.normal(size=leaf.shape) / 2)
    spec = jax.typeof(leaf).sharding.spec
    return reshard(values, P(*spec)) if any(spec) else values


def relative(got, wanted):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


def check_placed(adapters, shardings):
    for path, (of_a, of_b) in shardings.items():
        adapter = adapters[path]
        assert isinstance(adapter, Adapter)
        assert jax.typeof(adapter.a).sharding.spec == of_a, (path, adapter.a.sharding)
        assert jax.typeof(adapter.b).sharding.spec == of_b, (path, adapter.b.sharding)


def check_init(fn, shardings, params, x, init):
    """An initialisation from weights, data or gradients places A, B and the base as well."""
    config = LoraConfig(
        r=2, target_modules=list(shardings), init_lora_weights=init, use_dora=init == "pissa"
    )
    loss = lambda p, x: jnp.sum(jnp.sin(fn(p, x)))  # noqa: E731
    base, adapters = initialise(
        plan(fn, params, config, x),
        params,
        jax.random.key(0),
        fn=loss if init == "lora_ga" else fn,
        batches=[(x,)],
    )
    check_placed(adapters, shardings)
    for path in shardings:
        assert jax.typeof(base[path]) == jax.typeof(params[path]), path
    far = relative(jax.jit(lora(fn))(base, adapters, x), fn(params, x))
    assert far < (0.2 if init == "loftq" else 1e-6), (init, far)  # A and B are in float32


def check(fn, shardings, params, x, *, dora, dropout):
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=list(shardings), use_dora=dora, lora_dropout=dropout
    )
    adapters = plan(fn, params, config, x).init(jax.random.key(0))
    check_placed(adapters, shardings)
    start = jax.jit(lora(fn))(params, adapters, x)
    assert relative(start, jax.jit(fn)(params, x)) < 1e-6  # init is in float32
    if dropout:
        key = jax.random.key(1)
        jax.jit(lambda a: lora(fn)(params, a, x, dropout_key=key))(adapters)
        return
    adapters = jax.tree.map(drawn, adapters)
    loss = lambda f, a: jnp.sum(jnp.sin(f(a)))  # noqa: E731
    ours, theirs = (lambda a: lora(fn)(params, a, x)), (lambda a: fn(merge(params, a), x))
    got, wanted = jax.jit(ours)(adapters), jax.jit(theirs)(adapters)
    assert relative(got, wanted) < 1e-12
    assert jax.typeof(got) == jax.typeof(wanted)
    grads = [jax.jit(jax.grad(partial(loss, f)))(adapters) for f in (ours, theirs)]
    assert relative(*grads) < 1e-11
    whole = jax.tree.map(lambda leaf: reshard(leaf, P()), adapters)  # as a file has them
    assert relative(jax.jit(ours)(whole), wanted) < 1e-12


def main(inits):
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        shapes = {
            "up": ((8, 16), P("x", "y")),
            "down": ((16, 8), P("y", "x")),
            "experts": ((4, 8, 6), P("x", None, "y")),
            "table": ((12, 8), P(None, "y")),
        }
        params = {
            name: jax.device_put(RNG.normal(size=shape), NamedSharding(mesh, spec))
            for name, (shape, spec) in shapes.items()
        }
        x = jax.device_put(RNG.normal(size=(4, 6, 8)), NamedSharding(mesh, P("x")))
        for fn, shardings in () if inits else MODELS.items():
            for dora in (False, True):
                check(fn, shardings, params, x, dora=dora, dropout=0.0)
            check(fn, shardings, params, x, dora=False, dropout=0.5)
            print(fn.__name__, "holds")
        for init in inits or ("pissa",):
            for fn in (row_and_column, experts) if inits else (row_and_column,):
                check_init(fn, MODELS[fn], params, x, init)
            print(init, "holds")


if __name__ == "__main__":
    main(sys.argv[1:])
