"""Meshes with explicit axes: what types of arrays say about sharding holds with adapters, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lora_jax import LoraConfig, lora, merge, plan
from parity_tests.laws import explicit_models, laws

P = PartitionSpec


def test_a_weight_that_is_no_target_breaks_no_plan():
    """The reshaped weight's sharding is what a later `shard_map` wants."""

    def fn(p, x):
        kernel = p["conv"].reshape((4, 2, 8), out_sharding=P("x", None, None))
        repeated = jax.lax.broadcast_in_dim(p["bias"], (4, 2, 8), (1, 2), out_sharding=P("x"))
        h = jax.sharding.reshard((x @ p["w"]).reshape(3, 4, 2), P(None, "x", None))
        return jax.shard_map(
            lambda h, c, b: jnp.einsum("bgi,gik->bgk", h, c + b), out_specs=P(None, "x", None)
        )(h, kernel, repeated)

    rng = np.random.default_rng(0)
    shapes = {"w": (8, 8), "conv": (8, 8), "bias": (2, 8)}
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))):
        params = {name: jnp.asarray(rng.normal(size=n), jnp.float32) for name, n in shapes.items()}
        x = params["w"][:3]
        found = plan(fn, params, LoraConfig(r=2, target_modules=["w"]), x)
        assert [leaf.path for leaf in found.adapted] == ["w"]
        adapters = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), found.abstract()
        )
        wanted = fn(merge(params, adapters), x)
        assert laws.relative(lora(fn)(params, adapters, x), wanted) < 1e-5


def test_a_rule_that_fails_is_a_reason_in_the_plan(monkeypatch):
    """Whatever a rule meets in a weight that is no target, the plan of the others stands."""
    from lora_jax.rewrite import RULES

    def broken(call, weight):
        raise ValueError("something nobody thought of\nand its details")

    monkeypatch.setitem(RULES, "cos", broken)
    params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 3))}
    found = plan(
        lambda p, x: x @ p["w"] @ jnp.cos(p["v"]),
        params,
        LoraConfig(r=2, target_modules=["w"]),
        jnp.ones((2, 4)),
    )
    (other,) = (leaf for leaf in found.leaves if leaf.path == "v")
    assert "ValueError: something nobody thought of (" in other.why and other.sites == 0


def on_four_devices(*arguments):
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path[:1]]),
    }
    run = subprocess.run(
        [sys.executable, "-m", "parity_tests.laws.explicit_models", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_models_on_four_devices():
    """Values, gradients and shardings are those of the merged weights; see `explicit_models`."""
    on_four_devices()


@pytest.mark.slow
def test_every_initialisation_on_four_devices():
    """A, B and the base are sharded as the weight is, and the outputs stay."""
    on_four_devices(*explicit_models.INITS)
