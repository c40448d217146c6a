"""What is decided as PEFT and PyTorch decide it: which modules a pattern means, and A's draw."""

from __future__ import annotations

import math

import jax
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import LoraModel
from peft.utils.other import get_pattern_key

from lora_jax import LoraConfig
from lora_jax.core.config import lora_config
from lora_jax.core.initializers import draw

MODULES = [
    "query",
    "layer.0.query",
    "layer.0.subquery",
    "layer.1.attn.query",
    "layer.11.attn.query",
    "query.proj",
    "a.query.b",
    "value",
]
PATTERNS = ["query", "0.query", "layer.1.attn.query", "proj", r".*query", r"layer\.1.*", r"(a|b)"]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MODULES),
    st.one_of(st.sampled_from(PATTERNS), st.lists(st.sampled_from(PATTERNS), min_size=1)),
)
def test_target_modules_match_as_in_peft(module, names):
    config = PeftConfig(target_modules=names)
    wanted = bool(LoraModel._check_target_module_exists(config, module))
    assert lora_config.matches(config.target_modules and names, module) == wanted


def test_every_module_is_matched_by_every_pattern_as_in_peft():
    """All pairs, as a drawn sample may miss the one that tells."""
    for module in MODULES:
        for names in [*PATTERNS, *([one] for one in PATTERNS)]:
            wanted = LoraModel._check_target_module_exists(PeftConfig(target_modules=names), module)
            # PEFT makes a set of a list.
            found = lora_config.matches(names, module)
            assert found == bool(wanted), (module, names)


def test_the_first_layer_may_be_chosen():
    for layers in (0, [0]):
        config = LoraConfig(target_modules=["query"], layers_to_transform=layers)
        found = [lora_config.in_chosen_layer(config, f"model.layers.{n}.query") for n in range(3)]
        assert found == [True, False, False]


LAYERS = st.sampled_from([0, 1, 2, 12])


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["model", "decoder", "encoder.stack"]),
    st.lists(st.tuples(st.sampled_from(["layers", "blocks", "experts"]), LAYERS), min_size=1),
    st.one_of(LAYERS, st.lists(LAYERS)),
    st.sampled_from([None, "layers", "blocks", "(?:layers|blocks)", ["blocks", "layers"], []]),
)
def test_layers_are_chosen_as_in_peft(top, lists, layers, pattern):
    module = ".".join([top, *(f"{name}.{n}" for name, n in lists), "query"])
    chosen = dict(target_modules=["query"], layers_to_transform=layers, layers_pattern=pattern)
    wanted = bool(LoraModel._check_target_module_exists(PeftConfig(**chosen), module))
    assert lora_config.in_chosen_layer(LoraConfig(**chosen), module) == wanted


def test_a_group_in_layers_pattern_is_not_the_layer():
    """PEFT reads the first group as the layer's number, and fails for a name."""
    for pattern in ("(layers|blocks)", "(la)(yers)", "layer(s?)", r"(?P<kind>layers)"):
        for layer in (0, 1, 12):
            config = LoraConfig(
                target_modules=["query"], layers_to_transform=[1], layers_pattern=pattern
            )
            found = lora_config.in_chosen_layer(config, f"model.layers.{layer}.attn.query")
            assert found == (layer == 1), (pattern, layer)
    config = LoraConfig(target_modules=["q"], layers_to_transform=[3], layers_pattern="h(2|3)")
    assert not lora_config.in_chosen_layer(config, "model.h3.1.q")
    assert lora_config.in_chosen_layer(config, "model.h2.3.q")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MODULES),
    st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 64)),
    st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 64)),
)
def test_rank_and_alpha_patterns_resolve_as_in_peft(module, ranks, alphas):
    config = LoraConfig(r=5, lora_alpha=7, rank_pattern=ranks, alpha_pattern=alphas)
    r = ranks.get(get_pattern_key(ranks.keys(), module), 5)
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), 7)
    assert lora_config.rank_and_alpha(config, module) == (r, alpha)


def test_kaiming_has_the_bound_of_torch():
    a, _ = draw(jax.random.key(0), True, (40, 30), "io", r=6)
    weight = torch.nn.init.kaiming_uniform_(torch.empty(6, 40), a=math.sqrt(5))
    np.testing.assert_allclose(np.abs(a).max(), weight.abs().max().item(), rtol=0.05)
