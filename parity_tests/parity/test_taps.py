"""Taps: which are compared, in which layout, and which cannot be."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lora_jax.core.errors import ParityError
from lora_jax.parity import To, tap, trace
from lora_jax.parity.tracing.taps import INPUT, OUTPUT, Place, pair
from parity_tests.laws.trace_subjects import TORCH, TorchAct, X


class NHWC(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Conv(5, (2, 3), padding="VALID", use_bias=False, name="conv")(x)
        return nn.Dense(2, name="extra")(y).sum() * 0 + nn.relu(y).mean((1, 2))


class NCHW(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, (2, 3), bias=False)
        self.act = torch.nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.conv(x)).mean((2, 3))


def test_layouts_are_mapped_and_what_has_no_partner_is_listed():
    twin, x = NCHW(), np.random.default_rng(1).normal(size=(2, 6, 7, 3)).astype(np.float32)
    nchw = (0, 3, 1, 2)
    params = {
        "conv": {"kernel": twin.conv.weight.detach().numpy().transpose(2, 3, 1, 0)},
        "extra": {"kernel": np.ones((5, 2), np.float32), "bias": np.zeros(2, np.float32)},
    }
    found = trace(
        lambda x: NHWC().apply({"params": params}, x),
        twin,
        {"x": x},
        mapping={"x": To("x", axes=nchw)},
        names={"conv": To("conv", axes=nchw)},
    )
    assert found.ok and [one.kind for one in found.taps] == [INPUT, OUTPUT]
    text = str(found)
    assert "first divergence: none" in text and "torch act: no partner in JAX" in text
    assert "jax extra: no input of PyTorch's 'extra'; no output" in text


def place(name, *calls, kind=OUTPUT, shape=(2, 3)):
    return {Place(name, kind, 0, call): shape for call in calls or (0,)}


def test_calls_of_one_module_are_told_apart():
    ours, theirs = place("act", 0, 1), place("act", 0, 1)
    pairs, unpaired = pair(ours, theirs)
    assert [(one.label, one.theirs.call) for one in pairs] == [("act[0]", 0), ("act[1]", 1)]
    assert not unpaired
    theirs = place("act1") | place("act2")
    pairs, unpaired = pair(ours, theirs, {"act[0]": "act1", "act[1]": "act2"})
    assert [one.theirs.name for one in pairs] == ["act1", "act2"] and not unpaired
    pairs, unpaired = pair(ours, place("act"))
    assert len(pairs) == 1 and "has a partner already" in str(unpaired)
    pairs, unpaired = pair(
        place("a") | place("b"),
        place("act", 0, 1),
        lambda n: {"a": "act[1]"}[n] if n == "a" else "act[0]",
    )
    assert [one.theirs.call for one in pairs] == [1, 0]


def test_shapes_that_differ_are_listed_and_names_that_do_not_exist_raise():
    pairs, unpaired = pair(place("q", shape=(2, 3, 4)), place("q", shape=(3, 2, 4)))
    assert not pairs and "jax (2, 3, 4), torch (3, 2, 4)" in str(unpaired[0])
    names = {"q": To("q", axes=(1, 0, 2))}
    pairs, _ = pair(place("q", shape=(2, 3, 4)), place("q", shape=(3, 2, 4)), names)
    assert pairs[0].to.axes == (1, 0, 2)
    with pytest.raises(ParityError, match="qq: no tap of JAX's; close: q") as caught:
        pair(place("q"), place("q"), {"qq": "q", "q": "k"})
    assert "q: 'k' is no tap of PyTorch's" in str(caught.value)


def test_a_tap_is_the_identity_under_every_transform():
    def fn(x):
        return jax.lax.scan(lambda c, v: (tap("c", jnp.sin(c + v)), tap("v", c * v)), x[0], x)

    def bare(x):
        return jax.lax.scan(lambda c, v: (jnp.sin(c + v), c * v), x[0], x)

    for transform in (
        lambda f: f,
        jax.jit,
        jax.vmap,
        lambda f: jax.grad(lambda x: f(x)[1].sum() + f(x)[0].sum()),
    ):
        jax.tree.map(np.testing.assert_array_equal, transform(fn)(X), transform(bare)(X))
    assert tap("n", {"ids": 1, "x": None}) == {"ids": 1, "x": None}


def test_a_tap_where_nothing_can_be_read_is_an_error():
    def loop(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: tap("act", x + 1), x)

    @jax.custom_jvp
    def own(x):
        return tap("dense", x)

    own.defjvp(lambda x, d: (own(*x), *d))
    with pytest.raises(ParityError, match="act: inside while") as caught:
        trace(lambda x: loop(own(x)), TORCH, {"x": X})
    assert "dense: inside custom_jvp_call" in str(caught.value)


def test_a_random_module_is_refused():
    twin = torch.nn.Sequential(torch.nn.Dropout(0.5))
    with pytest.raises(ParityError, match="call .eval()"):
        trace(lambda input: input, twin, {"input": X})
    assert trace(lambda input: input, twin.eval(), {"input": X}).ok


def test_a_module_that_changes_its_callers_tensor_is_refused():
    class InPlace(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.act = torch.nn.ReLU(inplace=True)

        def forward(self, x):
            y = 2 * x
            self.act(y)
            return y

    with pytest.raises(ParityError, match="works in place"):
        trace(jax.nn.relu, InPlace(), {"x": X})


def test_a_trace_without_pairs_says_so():
    found = trace(lambda x: jnp.sin(x), TorchAct(), {"x": X})
    assert "no tap has a partner" in str(found.first)
