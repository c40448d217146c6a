"""What adapters cost in models of narrow weights: what low-rank products must, and no more."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lora_jax import LoraConfig, frugality, plan
from lora_jax.core import contractions
from parity_tests.models import lookalikes
from parity_tests.tiers import cases

R = 6


def report(name, r=R):
    fn, params, x, targets = lookalikes.ALL[name]
    config = LoraConfig(r=r, target_modules=targets)
    return frugality(fn, params, plan(fn, params, config, x).abstract(), x)


def beyond(found):
    """Return what a step costs beyond the base and the low-rank products, in parts of the base."""
    return (found.flops - found.expected) / (found.forward + found.input_gradient)


@pytest.mark.parametrize("name", cases(lookalikes.ALL, quick=("convolutions",)))
def test_a_step_costs_the_base_and_what_low_rank_products_must(name):
    found = report(name)
    # A first layer's input has no gradient, which the figure for low-rank products has in it.
    assert -0.05 < beyond(found) < 0.02, (name, found)
    assert found.weight_sized == (), (name, found)
    shown = 100 * found.low_rank / (found.forward + found.input_gradient)
    assert f"needed by the low-rank products {shown:+.2f} %, beyond it " in str(found)


def test_an_a_for_each_channel_of_a_depthwise_convolution_is_found(monkeypatch):
    """A bug: as many numbers beside each channel as the rank has."""
    monkeypatch.setattr(contractions, "smaller_formed", lambda *sizes: False)
    assert beyond(report("convolutions")) > 0.2


def test_each_row_of_a_ragged_product_meets_one_matrix():
    """On CPUs XLA multiplies all rows with all groups' matrices, and counts that."""
    from lora_jax.rewrite.flops import count

    x, w = jax.ShapeDtypeStruct((48, 30), jnp.float32), jax.ShapeDtypeStruct((8, 30, 20), "float32")
    sizes = jnp.full(8, 6)
    fn = lambda x, w: jax.lax.ragged_dot(x, w, sizes)  # noqa: E731
    assert count(fn, x, w) == 2 * 48 * 30 * 20
    both = jax.grad(lambda x, w: jnp.sum(fn(x, w)), (0, 1))
    assert 2 <= count(both, x, w) / (2 * 48 * 30 * 20) < 2.1  # the product itself is not used


def test_slices_of_one_weight_share_its_a():
    """``x·A`` is formed once, as A is the same for each range of the outputs."""

    def fn(p, x):
        return [x @ part for part in jnp.split(p["w"], [10, 24], axis=1)]

    from lora_jax import lora

    params, x = {"w": jnp.ones((40, 60))}, jnp.ones((200, 40))
    adapters = plan(fn, params, LoraConfig(r=5, target_modules=["w"]), x).init(jax.random.key(0))
    text = str(jax.make_jaxpr(lora(fn))(params, adapters, x))
    if jax.device_count() == 1:
        assert "f32[200,5]" in text and "f32[200,15]" not in text
