"""What the algebra does with weights and adapters that differ from each other.

Each of these once went wrong by hand without a test that noticed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import Adapter, combine, lora, merge
from lora_jax.adapters.combine import CAT, COMBINATIONS
from lora_jax.core import delta as changes


def drawn(seed, shape=(6, 5), r=2, scale=1.0, **fields):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(shape[0], r)), rng.normal(size=(r, shape[1]))
    return Adapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scale, **fields)


JOINED = {
    "columns": lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], axis=1),
    "rows": lambda p, x: jnp.concatenate([x, 2 * x], axis=1) @ jnp.concatenate([p["w"], p["v"]]),
    "stacked": lambda p, x: jnp.einsum(
        "lbi,lio->lbo", jnp.stack([x, 2 * x]), jnp.stack([p["w"], p["v"]])
    ),
    "with another": lambda p, x: x @ jnp.concatenate([p["w"], p["v"], p["w"]], axis=1),
}


def test_joined_weights_keep_their_own_scales_and_ranks():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(6, 5)), jnp.float32) for name in ("w", "v")}
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    for scales in ((0.5, 8.0), (8.0, 0.5), (2.0, 2.0), (1.0, jnp.asarray(3.0))):
        for ranks in ((2, 2), (1, 3)):
            adapters = {
                name: drawn(n, r=ranks[n], scale=scales[n]) for n, name in enumerate(("w", "v"))
            }
            for name, fn in JOINED.items():
                got, wanted = lora(fn)(params, adapters, x), fn(merge(params, adapters), x)
                np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-4, err_msg=name)


def test_a_path_that_some_adapters_lack_has_the_weights_of_the_others():
    """Wherever the adapter stands that lacks it, and in every way to combine."""
    one, two, three = drawn(1, scale=0.5), drawn(2, scale=2.0), drawn(3, scale=1.5)
    trees = [{"w": one, "v": two}, {"v": three}, {"w": three, "u": one}]
    weights = [2.0, 3.0, 7.0]
    wanted = {
        "w": 2 * changes.delta(one) + 7 * changes.delta(three),
        "v": 2 * changes.delta(two) + 3 * changes.delta(three),
        "u": 7 * changes.delta(one),
    }
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        given = [trees[n] for n in order], [weights[n] for n in order]
        for name in (CAT, "svd"):
            got = combine(*given, name, svd_rank=4)
            for path, delta in wanted.items():
                np.testing.assert_allclose(changes.delta(got[path]), delta, rtol=1e-4, atol=1e-4)
    for name in COMBINATIONS:
        got = combine(trees, weights, name, svd_rank=2, density=1.0, key=jax.random.key(0))
        # Of one adapter alone every way makes the same.
        np.testing.assert_allclose(
            changes.delta(got["u"]), wanted["u"], rtol=1e-4, atol=1e-3, err_msg=name
        )


def while_turns(p, x):
    def turn(state):
        n, out = state
        return n + 1, out.at[n].set(x @ p["w"])

    return lax.while_loop(lambda state: state[0] < 4, turn, (0, jnp.zeros((4, 5))))[1]


def fori_turns(p, x):
    return lax.fori_loop(0, 4, lambda n, out: out.at[n].set(x @ p["w"]), jnp.zeros((4, 5)))


def scan_turns(p, x):
    return lax.scan(lambda _, __: (None, x @ p["w"]), None, length=4)[1]


def nested_turns(p, x):
    """Two turns of a while loop, in each two steps of a scan."""

    def turn(state):
        n, out = state
        rows = lax.scan(lambda _, __: (None, x @ p["w"]), None, length=2)[1]
        return n + 1, lax.dynamic_update_slice(out, rows, (2 * n, 0))

    return lax.while_loop(lambda state: state[0] < 2, turn, (0, jnp.zeros((4, 5))))[1]


def test_every_turn_of_a_loop_drops_other_inputs():
    params, x = {"w": jnp.zeros((40, 5))}, jnp.ones(40)
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.normal(size=(40, 1)), jnp.float32)
    adapters = {"w": Adapter(a, jnp.ones((1, 5)), 1.0, dropout=0.5)}
    for fn in (while_turns, fori_turns, scan_turns, nested_turns):
        out = jax.jit(lora(fn))(params, adapters, x, dropout_key=jax.random.key(0))
        again = jax.jit(lora(fn))(params, adapters, x, dropout_key=jax.random.key(0))
        other = jax.jit(lora(fn))(params, adapters, x, dropout_key=jax.random.key(1))
        turns = out[:, 0].tolist()
        assert len(set(turns)) == 4, f"{fn.__name__}: some turns have one mask: {turns}"
        np.testing.assert_array_equal(out, again)
        assert not set(turns) & set(other[:, 0].tolist()), f"{fn.__name__}: the key is not read"


def test_a_cast_of_the_weight_leaves_a_and_b_as_they_are():
    """1 + 2⁻¹⁰ is no bfloat16, and it is all that the adapter has: cast, it would do nothing."""
    a = jnp.array([[1 + 2.0**-10], [-1.0]])
    adapters = {"w": Adapter(a, jnp.full((1, 3), 1024.0), 1.0)}
    params, x = {"w": jnp.zeros((2, 3))}, jnp.ones((4, 2), jnp.bfloat16)
    for name, fn in {
        "cast": lambda p, x: x @ p["w"].astype(jnp.bfloat16),
        "cast and moved": lambda p, x: x @ p["w"].T.astype(jnp.bfloat16).T,
        "cast twice": lambda p, x: x @ p["w"].astype(jnp.float16).astype(jnp.bfloat16),
        "cast in a scan": lambda p, x: lax.scan(
            lambda c, row: (c, row @ p["w"].astype(jnp.bfloat16)), 0, x
        )[1],
    }.items():
        got = lora(fn)(params, adapters, x)
        assert got.dtype == jnp.bfloat16, name
        np.testing.assert_array_equal(np.float32(got), np.ones((4, 3)), err_msg=name)
