"""However the low-rank products are written, they and all their derivatives are the formula's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import Adapter
from lora_jax.core import delta, lowrank
from lora_jax.core.xla import product_layout

# Shapes of x, A and B, the weight's letters, what is summed and batched, and W on the left.
LAYOUTS = {
    "rows": ((5, 4, 6), (6, 2), (2, 7), "io", ([2], [0]), ((), ()), False),
    "weight first": ((5, 4, 6), (6, 2), (2, 7), "io", ([2], [0]), ((), ()), True),
    "transposed": ((5, 4, 7), (6, 2), (2, 7), "io", ([2], [1]), ((), ()), False),
    "two sums": ((5, 3, 6, 4), (6, 4, 2), (2, 7), "iio", ([2, 3], [0, 1]), ((), ()), False),
    "two out": ((5, 4, 6), (6, 2), (2, 7, 3), "ioo", ([2], [0]), ((), ()), False),
    "sum in front": ((6, 5, 4), (6, 2), (2, 7), "io", ([0], [0]), ((), ()), False),
    "sum between": ((5, 6, 4), (6, 2), (2, 7), "io", ([1], [0]), ((), ()), False),
    "stacked": ((3, 5, 4, 6), (3, 6, 2), (3, 2, 7), "sio", ([3], [1]), ([0], [0]), False),
}


@pytest.fixture(
    params=[(0, 1), (0, 2), (10**6, 1), (10**6, 2)], ids="many {0[0]} devices {0[1]}".format
)
def written(request, monkeypatch):
    """Write the products in each way; what was traced in another is forgotten."""
    many, devices = request.param
    monkeypatch.setattr(product_layout, "MANY", many)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", LAYOUTS)
def test_value_and_derivatives_are_those_of_the_whole_change(name, written):
    x_shape, a_shape, b_shape, axes, contract, batch, weight_first = LAYOUTS[name]
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        given = tuple(jnp.asarray(rng.normal(size=s)) for s in (x_shape, a_shape, b_shape))

        def ours(x, a, b):
            adapter = Adapter(a, b, 0.5, axes)
            return lowrank.dot(x, adapter, contract, batch, weight_first=weight_first)

        def theirs(x, a, b):
            change = delta.delta(Adapter(a, b, 0.5, axes))
            operands = (change, x) if weight_first else (x, change)
            order = slice(None, None, -1 if weight_first else 1)
            return jax.lax.dot_general(*operands, (contract[order], batch[order]))

        y = theirs(*given)
        g, along = jnp.asarray(rng.normal(size=y.shape)), tuple(v + 1 for v in given)

        def everything(product):
            mapped = jax.vmap(product, (None, 0, None))(
                given[0], jnp.stack([given[1]] * 2), given[2]
            )
            return (
                product(*given),
                jax.vjp(product, *given)[1](g),
                jax.jvp(product, given, along),
                mapped,
            )

        jax.tree.map(
            lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-11, atol=1e-11),
            everything(ours),
            everything(theirs),
        )
