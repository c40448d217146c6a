"""Four devices give what one gives: weights sharded inside the model, and by the caller."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from lora_jax import LoraConfig, lora, merge, plan

jax.config.update("jax_enable_x64", True)
assert jax.device_count() == 4
mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
params = {"up": normal(12, 20), "down": normal(20, 12), "experts": normal(4, 12, 8)}
x = normal(8, 12)


def plain(p, x):
    h = jnp.tanh(x @ p["up"]) @ p["down"]
    return jnp.einsum("bd,edf->bef", h, p["experts"])


config = LoraConfig(r=3, lora_alpha=4, target_modules=["up", "down", "experts"])
found = plan(plain, params, config, x)
adapters = jax.tree.map(lambda leaf: normal(*leaf.shape), found.abstract())
loss = lambda fn: lambda a, p: jnp.sum(jnp.sin(lora(fn)(p, a, x)))
wanted = jax.jit(jax.value_and_grad(loss(plain)))(adapters, params)


def check(got):
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-11, atol=1e-11)
"""

BODIES = {
    "shard_map_inside_the_model": """
        def sharded(p, x):
            def local(p, x):
                h = lax.psum(jnp.tanh(x @ p["up"]) @ p["down"], "model")
                return jnp.einsum("bd,edf->bef", h, p["experts"])

            specs = {"up": P(None, "model"), "down": P("model", None), "experts": P("model")}
            out = P(None, "model")
            return jax.shard_map(local, mesh=mesh, in_specs=(specs, P()), out_specs=out)(p, x)

        check(jax.jit(jax.value_and_grad(loss(sharded)))(adapters, params))
    """,
    "shards_stacked_along_a_new_axis": """
        def sharded(p, x):
            def local(p, x):
                up = lax.all_gather(p["up"], "model", axis=1).reshape(12, 20)
                down = lax.all_gather(p["down"], "model").reshape(20, 12)
                h = jnp.tanh(x @ up) @ down
                experts = lax.all_gather(p["experts"], "model")[:, 0]
                return jnp.einsum("bd,edf->bef", h, experts)

            specs = {"up": P(None, "model"), "down": P("model", None), "experts": P("model")}
            return jax.shard_map(
                local, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False
            )(p, x)

        check(jax.jit(jax.value_and_grad(loss(sharded)))(adapters, params))
    """,
    "shards_of_another_axis": """
        from lora_jax.core.errors import PlanError

        def sharded(p, x):
            def local(p, x):  # parts of the in axis, side by side as if they were outputs
                return x[:, :3] @ lax.all_gather(p["up"], "model", axis=1, tiled=True)

            return jax.shard_map(
                local, mesh=mesh, in_specs=(P("model"), P()), out_specs=P(), check_vma=False
            )(p, x)

        for call in (
            lambda: plan(sharded, params, LoraConfig(r=3, target_modules=["up"]), x),
            lambda: lora(sharded)(params, {"up": adapters["up"]}, x),
        ):
            try:
                call()
            except PlanError as error:
                assert "shards of one axis are joined along another" in str(error)
            else:
                raise AssertionError("it was adapted")
    """,
    "sharded_jit": """
        specs = {"up": P(None, "model"), "down": P("model", None), "experts": P("model")}
        placed = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()}
        check(jax.jit(jax.value_and_grad(loss(plain)))(adapters, placed))
    """,
    "shard_map_around_the_model": """
        def local(adapters, p, x):
            return jnp.sum(jnp.sin(lora(plain)(p, adapters, x)))

        def whole(a, p):
            parts = jax.shard_map(
                lambda a, p, x: local(a, p, x)[None],
                mesh=mesh, in_specs=(P(), P(), P("model")), out_specs=P("model"),
            )(a, p, x)
            return parts.sum()

        check(jax.jit(jax.value_and_grad(whole))(adapters, params))
    """,
}


@pytest.mark.parametrize("name", BODIES)
def test_four_devices_give_what_one_gives(name):
    code = PRELUDE + textwrap.dedent(BODIES[name])
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
