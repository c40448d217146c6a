"""The product with a frozen bfloat16 weight: ``lax.dot_general``'s numbers, not widened by XLA."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from lora_jax import LoraConfig, lora, plan
from lora_jax.core.xla import bf16_dot
from lora_jax.linen import LoRADense
from lora_jax.nnx import LoRALinear

BF16 = jnp.bfloat16

# Shapes of both operands, and the dimension_numbers.
PRODUCTS = {
    "rows": ((2, 3, 4), (4, 5), (((2,), (0,)), ((), ()))),
    "weight first": ((5, 4), (2, 3, 4), (((1,), (2,)), ((), ()))),
    "two sums": ((2, 3, 4), (5, 4, 3), (((1, 2), (2, 1)), ((), ()))),
    "batch": ((2, 6, 3, 4), (6, 4, 3, 5), (((2, 3), (2, 1)), ((1,), (0,)))),
    "two batches": ((2, 6, 3), (3, 5, 2), (((), ()), ((0, 2), (2, 0)))),
}


def whole_numbers(*shapes, seed=0):
    """Return bfloat16 arrays whose products and sums are exact in any order."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.integers(-3, 4, shape), BF16) for shape in shapes]


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_and_gradients_are_those_of_dot_general(name):
    left, right, numbers = PRODUCTS[name]
    lhs, rhs = whole_numbers(left, right)

    def both(product):
        y, pull = jax.vjp(lambda lhs, rhs: product(lhs, rhs, numbers), lhs, rhs)
        (g,) = whole_numbers(y.shape, seed=1)
        alone = jax.grad(lambda lhs: jnp.sum(product(lhs, rhs, numbers) * g))(lhs)
        second = jax.grad(
            lambda rhs: jnp.sum(jax.grad(lambda x: jnp.sum(product(x, rhs, numbers) * g))(lhs))
        )(rhs)
        return y, pull(g), alone, second

    same(both(bf16_dot.dot), both(lax.dot_general))


def test_it_is_mapped_and_rematerialised():
    lhs, rhs = whole_numbers((3, 2, 4), (3, 4, 5))
    numbers = (((1,), (0,)), ((), ()))

    def found(product):
        def loss(lhs, rhs):
            return jnp.sum(product(lhs, rhs, numbers) * 2)

        mapped = jax.vmap(jax.value_and_grad(loss, (0, 1)))
        return mapped(lhs, rhs), jax.vmap(jax.grad(jax.checkpoint(loss)), (0, None))(lhs, rhs[0])

    same(found(bf16_dot.dot), found(lax.dot_general))


def widened(fn, *arguments):
    """Tell whether the compiled program converts something to float32 of the weight's shape."""
    text = jax.jit(fn).lower(*arguments).compile().as_text() or ""
    return "f32[48,80]" in text or "f32[80,48]" in text


def linen_layer(x):
    layer = LoRADense(80, param_dtype=BF16, use_bias=False)
    return layer.apply, layer.init(jax.random.key(0), x)


def nnx_layer(x):
    layer = LoRALinear(48, 80, param_dtype=BF16, use_bias=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    return lambda state, x: nnx.merge(graph, state)(x), state


def rewritten(x):
    (w,) = whole_numbers((48, 80))
    adapters = plan(product, {"w": w}, LoraConfig(target_modules=["w"]), x).init(jax.random.key(0))
    return lambda both, x: lora(product)(*both, x), ({"w": w}, adapters)


def product(params, x):
    return x @ params["w"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others multiply bfloat16 as it is")
@pytest.mark.parametrize("make", [rewritten, linen_layer, nnx_layer])
def test_no_copy_of_the_weight_is_made_in_float32(make):
    (x,) = whole_numbers((32, 48))
    apply, params = make(x)
    pulled = jax.grad(lambda x, params: jnp.sum(apply(params, x).astype(jnp.float32) ** 2))
    assert not widened(lambda x: apply(params, x), x)
    assert not widened(pulled, x, params)


def test_the_reader_sees_a_weight_that_is_widened():
    x, w = whole_numbers((32, 48), (48, 80))
    assert widened(lambda x, w: x @ w, x, w) == (jax.default_backend() == "cpu")


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (jnp.float32, {}),
        (BF16, {"preferred_element_type": jnp.float32}),
        (BF16, {"precision": "highest"}),
    ],
)
def test_what_is_not_widened_or_has_wishes_stays_as_it_is(dtype, options):
    x, w = (each.astype(dtype) for each in whole_numbers((2, 3), (3, 4)))
    numbers = (((1,), (0,)), ((), ()))
    ours, theirs = (
        str(jax.make_jaxpr(lambda x, w, f=f: f(x, w, numbers, **options))(x, w))
        for f in (bf16_dot.dot_general, lax.dot_general)
    )
    assert ours == theirs


def test_a_layers_own_dot_general_stays():
    def own(*arguments, **options):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        LoRADense(4, dot_general=own).init(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(ZeroDivisionError):
        LoRALinear(3, 4, dot_general=own, rngs=nnx.Rngs(0))(jnp.ones((2, 3)))
    assert LoRADense(4).dot_general is bf16_dot.dot_general and nn.Dense(4).dot_general is None
