"""The layers' fields, each by what it does to the output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.core.errors import AdapterError
from lora_jax.linen import LoRADense, LoRADenseGeneral, adapters_of
from lora_jax.nnx import LoRALinear, LoRALinearGeneral

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)


def of_linen(**fields):
    """Return A, B and what the path adds, of a layer whose B is all ones."""
    layer = LoRADense(5, r=2, **fields)
    variables = layer.init(jax.random.key(0), X)
    a = variables["lora"]["lora_a"]
    b = jnp.ones_like(variables["lora"]["lora_b"])
    own = {"params": variables["params"], "lora": {"lora_a": a, "lora_b": b}}
    return a, b, layer.apply(own, X) - layer.apply(variables, X)


def of_nnx(**fields):
    layer = LoRALinear(4, 5, r=2, rngs=nnx.Rngs(0), **fields)
    before = layer(X)
    layer.lora_b[...] = jnp.ones_like(layer.lora_b[...])
    return layer.lora_a[...], layer.lora_b[...], layer(X) - before


def test_alpha_r_and_rslora_make_the_scale():
    cases = (({"lora_alpha": 6}, 3.0), ({"lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5))
    for made in (of_linen, of_nnx):
        for fields, scale in cases:
            a, b, added = made(**fields)
            wanted = scale * np.float64(X) @ np.float64(a) @ np.float64(b)
            np.testing.assert_allclose(added, wanted, rtol=1e-4, atol=1e-5)


def test_a_and_b_have_the_dtype_that_is_asked_for():
    for made in (of_linen, of_nnx):
        for dtype in (None, jnp.bfloat16):
            a, b, _ = made(**({} if dtype is None else {"lora_dtype": dtype}))
            assert a.dtype == b.dtype == (dtype or jnp.float32)


def test_axes_that_are_named_out_of_order_are_summed_as_the_kernel_has_them():
    """Flax sorts them: the kernel's first axis is the input's that comes first."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 4)), jnp.float32)
    for axis in ((-1, -2), (2, 1), (1, 2)):
        layer = LoRADenseGeneral((5,), axis=axis, r=2, lora_alpha=6)
        variables = layer.init(jax.random.key(0), x)
        own = variables["lora"] | {"lora_b": jnp.ones_like(variables["lora"]["lora_b"])}
        of_linen = layer.apply({**variables, "lora": own}, x) - layer.apply(variables, x)
        assert own["lora_a"].shape == (3, 4, 2)
        wanted = 3 * np.einsum("bij,ijr,ro->bo", *map(np.float64, (x, *own.values())))
        np.testing.assert_allclose(of_linen, wanted, rtol=1e-4, atol=1e-5)
        layer = LoRALinearGeneral((3, 4), (5,), axis=axis, r=2, lora_alpha=6, rngs=nnx.Rngs(0))
        before = layer(x)
        layer.lora_b[...] = jnp.ones_like(layer.lora_b[...])
        both = map(np.float64, (x, layer.lora_a[...], layer.lora_b[...]))
        wanted = 3 * np.einsum("bij,ijr,ro->bo", *both)
        np.testing.assert_allclose(layer(x) - before, wanted, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_no_layer_uses_is_told():
    layer = LoRADense(5, r=2)
    variables = layer.init(jax.random.key(0), X)
    lost = {"other": variables["lora"]}
    with pytest.raises(AdapterError, match="other.lora_a: no layer uses it"):
        adapters_of(layer, {**variables, "lora": variables["lora"] | lost}, X)
