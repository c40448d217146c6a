"""``trace``: the module where a port goes wrong is named, forward and backward, in every front."""

from __future__ import annotations

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from lora_jax.core import paths
from lora_jax.models.bert import BertConfig, BertModel
from lora_jax.models.huggingface import torch_name
from lora_jax.parity import To, Verdict, tap, trace
from lora_jax.parity.tracing.taps import INPUT, OUTPUT
from parity_tests.laws.trace_subjects import BIASES, FRONTS, KERNELS, LAYERS, TORCH, WIDTH, Act, X
from parity_tests.tiers import cases

# Near twins are slow ones: a clean run of each way of tapping, and each bug in two of them.
QUICK = (
    "linen clean",
    "linen forward",
    "linen backward",
    "nnx backward",
    "tap forward",
    "tap backward",
    "from_torch forward",
)
EACH = {f"{f} {bug or 'clean'}": (f, bug) for f in FRONTS for bug in (None, "forward", "backward")}


@pytest.mark.parametrize("case", cases(EACH, quick=QUICK))
def test_a_bug_is_named_where_it_is(case):
    front, bug = EACH[case]
    model, names = FRONTS[front](bug)
    found = trace(model, TORCH, {"x": X}, names=names)
    layer = "Layer_{}" if front == "linen" else "layers.{}"
    modules = {f"{layer.format(n)}{part}" for n in range(LAYERS) for part in ("", ".dense", ".act")}
    assert {one.name for one in found.taps} == modules and not found.unpaired
    if bug is None:
        assert found.ok and found.first is None
        assert max(max(one.forward.apart, one.backward.apart) for one in found.taps) < 1e-13
        return
    first, act = found.first, layer.format(1) + ".act"
    assert first is not None and first.direction == bug and not found.ok
    assert first.held.verdict.verdict is Verdict.MISMATCH and "another function" in str(first)
    if front == "tap" and bug == "backward":
        # A tap has no input of its own, so the gradient at the one before it is the first to go.
        assert first.name == layer.format(1) + ".dense" and f"the output of {act}" in first.where
    else:
        assert (first.name, first.kind) == (act, OUTPUT if bug == "forward" else INPUT)
    if bug == "backward":
        assert not any(one.forward.diverged for one in found.taps)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + Act(name="act")(nn.Dense(WIDTH, name="dense")(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        return layers(name="layers")(x, None)[0]


def test_a_scanned_layer_has_a_tap_for_each_step_and_compiled_code_hides_none():
    kernels, biases = np.stack(KERNELS), np.stack(BIASES)
    biases[1, 0] += 0.1  # the bug is in the second step
    params = {"layers": {"dense": {"kernel": kernels, "bias": biases}}}
    fn = jax.jit(lambda x: Scanned().apply({"params": params}, x))
    fn(X)

    def names(name):
        return re.sub(r"layers(.*)\[(\d)\]", r"layers.\2\1", name)

    found = trace(fn, TORCH, {"x": X}, names=names)
    assert str(found.first).startswith("layers.dense[1]: forward at its output")
    assert "its inputs agree" in str(found.first) and not found.unpaired
    assert [one.name for one in found.taps if one.kind == OUTPUT] == [
        f"layers{part}[{n}]" for n in range(LAYERS) for part in (".dense", ".act", "")
    ]


def test_a_wrong_gradient_of_a_weight_alone_is_named():
    @jax.custom_vjp
    def dense(x, w):
        return x @ w

    dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, 2 * res[0].T @ g))
    twin = torch.nn.Sequential(torch.nn.Linear(WIDTH, 4, bias=False), torch.nn.Tanh())
    found = trace(
        lambda input, w: jnp.tanh(tap("0", dense(input, w))),
        twin,
        {"input": X, "w": twin[0].weight.detach().numpy().T},
        mapping={"w": To("0.weight", axes=(1, 0))},
    )
    assert str(found.first).startswith(
        "dw: backward, relL2 1e+00; the gradient at every tap agrees"
    )


def test_an_nnx_model_takes_weights_and_gives_their_gradients():
    model, twin = nnx.Sequential(nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(0)), jnp.tanh), torch.nn
    twin = twin.Sequential(twin.Linear(WIDTH, 4), twin.Tanh())
    params = {"kernel": twin[0].weight.detach().numpy().T, "bias": twin[0].bias.detach().numpy()}
    before = np.asarray(model.layers[0].kernel[...])
    found = trace(
        model,
        twin,
        {"inputs": X, "params": {"layers": {0: params}}},
        mapping={
            "inputs": "input",
            "params.layers.0.kernel": To("0.weight", axes=(1, 0)),
            "params.layers.0.bias": "0.bias",
        },
        names={"layers.0": "0"},
    )
    assert found.ok and str(found.unpaired[0]) == "torch 1: no partner in JAX"
    assert [one.verdict.name for one in found.gradients] == [
        "dinputs",
        "dparams.layers.0.bias",
        "dparams.layers.0.kernel",
    ]
    np.testing.assert_array_equal(before, model.layers[0].kernel[...])


class TorchMasked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.add = TorchAdd()

    def forward(self, x):
        below = torch.ones_like(x).tril() == 0
        return self.add(x, torch.zeros_like(x).masked_fill(below, torch.finfo(x.dtype).min))


class TorchAdd(torch.nn.Module):
    def forward(self, x, mask):
        return torch.softmax(x + mask, dim=-1)


class Add(nn.Module):
    def __call__(self, x, mask):
        return nn.softmax(x + mask)


class Masked(nn.Module):
    upper: bool

    @nn.compact
    def __call__(self, x):
        ones = jnp.ones_like(x)
        seen = jnp.triu(ones) if self.upper else jnp.tril(ones)
        return Add(name="add")(x, jnp.where(seen > 0, 0.0, -jnp.inf).astype(x.dtype))


@pytest.mark.parametrize("wrong", [False, True])
def test_a_mask_is_the_least_number_of_either_dtype(wrong):
    found = trace(lambda x: Masked(upper=wrong).apply({}, x), TorchMasked(), {"x": X})
    assert found.ok is not wrong
    if wrong:
        assert str(found.first).startswith("add: forward at its input")


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, "gelu", "padding"])
def test_a_whole_bert_is_transformers(bug):
    """Its taps pair by name; an embedding's row of padding has no gradient in PyTorch alone."""
    sizes = dict(vocab_size=41, hidden_size=12, num_hidden_layers=2, num_attention_heads=3)
    torch.manual_seed(0)
    twin = transformers.BertModel(
        transformers.BertConfig(
            **sizes, intermediate_size=20, initializer_range=0.3, attn_implementation="eager"
        )
    ).eval()
    config = BertConfig.from_dict(twin.config.to_dict())
    if bug == "gelu":
        config = dataclasses.replace(config, hidden_act="gelu_new")
    ids = np.random.default_rng(0).integers(0 if bug == "padding" else 1, 41, (2, 7))
    assert (ids == 0).any() == (bug == "padding")
    mask = (np.arange(7) < [[5], [7]]).astype(np.int32)
    model, state = BertModel(config), twin.state_dict()
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids, mask)["params"]

    def mapping(path):
        own = path.removeprefix("params.")
        if own == path:
            return path
        return To(torch_name(own), axes=(1, 0) if own.endswith("kernel") else None)

    values = {
        path: mapping(f"params.{path}").back(state[torch_name(path)].numpy(), leaf.shape)
        for path, leaf in paths.flatten(shapes).items()
    }
    found = trace(
        model,
        twin,
        {"params": paths.replace(shapes, values), "input_ids": ids, "attention_mask": mask},
        mapping=mapping,
        outputs={"0": "last_hidden_state", "1": "pooler_output"},
    )
    assert len(found.taps) > 35 and len(found.gradients) == len(values)
    starts = {
        "gelu": "encoder.layer.0.output.dense: forward at its input",
        "padding": "dparams.embeddings.word_embeddings.embedding: backward",
    }
    assert found.ok if bug is None else str(found.first).startswith(starts[bug])
