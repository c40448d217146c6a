"""PyTorch's random numbers, and the adapters that it draws from a seed: equal bit for bit."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_jax import LoraConfig, plan
from lora_jax.core.errors import ConfigError
from lora_jax.core.initializers import INITIALIZERS, draw
from lora_jax.parity.suite.torch_random import TorchGenerator, init_like_peft, init_like_reference
from lora_torch_ref import replace_linear_with_lora

DTYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
}

seeds = st.integers(0, 2**63)
shapes = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)
bounds = st.tuples(st.floats(-500, 500, width=16), st.floats(-500, 500, width=16)).map(sorted)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def same(ours: np.ndarray, theirs: torch.Tensor) -> bool:
    return np.array_equal(ours.astype(np.float64), theirs.double().numpy())


@each_dtype
@settings(max_examples=60, deadline=None)
@example(seed=2**63, shapes=[(16,), (15,)], bounds=[-0.0357, 0.9])
@given(seed=seeds, shapes=st.lists(shapes, min_size=1, max_size=3), bounds=bounds)
def test_uniform_numbers_are_pytorchs(dtype, seed, shapes, bounds):
    torch.manual_seed(seed % 2**63)
    generator = TorchGenerator(seed % 2**63)
    for shape in shapes:  # one stream
        wanted = torch.empty(shape, dtype=dtype).uniform_(*bounds)
        assert same(generator.uniform(shape, *bounds, dtype=DTYPES[dtype]), wanted)


@each_dtype
@settings(max_examples=40, deadline=None)
@given(seed=seeds, shape=st.lists(st.integers(1, 30), min_size=2, max_size=4), a=st.floats(0, 9))
def test_kaiming_uniform_is_pytorchs(dtype, seed, shape, a):
    torch.manual_seed(seed % 2**63)
    generator = TorchGenerator(seed % 2**63)
    for slope in (math.sqrt(5), a):
        wanted = torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=dtype), a=slope)
        assert same(generator.kaiming_uniform(shape, slope, DTYPES[dtype]), wanted)


def test_rand_is_pytorchs_in_bits_and_signs():
    torch.manual_seed(7)
    wanted = torch.rand(1000).numpy().view(np.uint32)
    np.testing.assert_array_equal(TorchGenerator(7).uniform((1000,)).view(np.uint32), wanted)


def test_the_rounding_is_one():
    """Without the fused instruction the last bit is another one: the test can fail."""
    fused, not_fused = (
        TorchGenerator(0, fused=f).uniform((1000,), -0.3, 0.3) for f in (True, False)
    )
    torch.manual_seed(0)
    wanted = torch.empty(1000).uniform_(-0.3, 0.3)
    assert same(fused, wanted) and not same(not_fused, wanted)
    with pytest.raises(ValueError, match="int32, wanted one of float64"):
        TorchGenerator(0).uniform((1,), dtype=np.int32)


def test_the_initialiser_draws_as_pytorch_under_every_transformation():
    key = jax.random.key(11)
    torch.manual_seed(11)
    wanted = [torch.nn.init.kaiming_uniform_(torch.empty(6, 40), a=math.sqrt(5)) for _ in range(3)]
    for init in (draw, jax.jit(draw, static_argnums=(1, 2, 3, 4))):
        a, b = init(key, "torch", (3, 40, 5), "sio", 6)
        assert all(same(np.asarray(one).T, two) for one, two in zip(a, wanted, strict=True))
        assert not b.any()
    many = jax.vmap(lambda key: INITIALIZERS["torch"](key, 1, 40, 6, 5)[0])(
        jax.random.split(key, 2)
    )
    assert (many[0] != many[1]).any()


class Tiny(torch.nn.Module):
    """Two blocks whose modules stand in another order than the alphabet's."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict(self.block()) for _ in range(2))
        self.head = torch.nn.Linear(12, 5)

    @staticmethod
    def block():
        return {"up": torch.nn.Linear(12, 20), "down": torch.nn.Linear(20, 12, bias=False)}

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


def in_jax(params, x):
    for n in range(2):
        hidden = x @ params[f"blocks.{n}.up.weight"].T + params[f"blocks.{n}.up.bias"]
        x = x + jnp.tanh(hidden) @ params[f"blocks.{n}.down.weight"].T
    return x @ params["head.weight"].T + params["head.bias"]


def planned(model, **fields):
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in model.named_parameters()}
    config = LoraConfig(lora_alpha=7, **fields)
    return plan(in_jax, params, config, jnp.ones((3, 12))), [n for n, _ in model.named_modules()]


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("seed", [0, 2**40 + 3])
def test_a_peft_model_is_drawn_bit_for_bit(init, seed):
    fields = dict(r=3, target_modules=["up", "down"], init_lora_weights=init)
    fields["rank_pattern"] = {"1.down": 5}
    model = Tiny()
    found, modules = planned(model, **fields)
    torch.manual_seed(seed)
    theirs = peft.get_peft_model(model, peft.LoraConfig(lora_alpha=7, **fields))
    ours = init_like_peft(found, seed, modules)
    wanted = {name: p.detach() for name, p in theirs.named_parameters() if "lora_" in name}
    assert len(wanted) == 2 * len(ours) == 8
    for path, adapter in ours.items():
        stem = f"base_model.model.{path.removesuffix('.weight')}.lora_"
        assert same(np.asarray(adapter.a).T, wanted[f"{stem}A.default.weight"]), path
        assert same(np.asarray(adapter.b).T, wanted[f"{stem}B.default.weight"]), path
    # In the alphabet's order the numbers go to other modules: the test can fail.
    wrong = init_like_peft(found, seed, sorted(modules))
    assert any((wrong[path].a != ours[path].a).any() for path in ours)


@pytest.mark.parametrize("fan_in", ["rank", "input"])
def test_the_reference_is_drawn_bit_for_bit(fan_in):
    model = Tiny()
    found, modules = planned(model, r=4, target_modules=["up", "down", "head"])
    torch.manual_seed(9)
    names = replace_linear_with_lora(
        model, 4, 7, a_init=f"fan_in_{'rank' if fan_in == 'rank' else 'input'}"
    )
    assert len(names) == len(found.adapted) == 5
    ours = init_like_reference(found, 9, modules, fan_in=fan_in)
    layers = dict(model.named_modules())
    for path, adapter in ours.items():
        lora = layers[path.removesuffix(".weight")].lora
        assert same(np.asarray(adapter.a), lora.A.detach()), path
        assert not lora.B.any() and not adapter.b.any()


def test_what_is_not_known_is_said():
    found, modules = planned(Tiny(), r=3, target_modules=["up", "down"])
    with pytest.raises(ConfigError, match="modules: got None"):
        init_like_peft(found, 0)
    with pytest.raises(ConfigError, match=r"blocks.1.up: adapted, but not among"):
        init_like_reference(found, 0, ["blocks.0.up"])
    gaussian, _ = planned(Tiny(), r=3, target_modules=["up"], init_lora_weights="gaussian")
    with pytest.raises(ConfigError, match="'gaussian', wanted True or False"):
        init_like_peft(gaussian, 0, modules)
