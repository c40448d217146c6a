"""``target_parameters``: bare parameters and stacks of experts, against PEFT's own."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from lora_jax import (
    LoraConfig,
    frugality,
    load_config,
    load_pretrained,
    lora,
    merge,
    plan,
    save_pretrained,
)
from lora_jax.core.errors import AdapterError, ConfigError, PlanError
from lora_jax.parity.suite.torch_models import copied, trainable
from lora_jax.peft.shapes import experts
from lora_jax.peft.tensors import encode
from lora_jax.peft.without_model import open_adapter
from lora_jax.torch.from_torch import from_torch
from parity_tests.models import moe_models
from parity_tests.parity.oracle import UNIT_ROUNDOFF, assert_within_rule, rel_l2
from parity_tests.tiers import cases

# Roundings in the chain of products behind one output.
CHAIN = 32.0
X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
G = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)


class Stacks(nn.Module):
    """Three stacks of experts, registered in an order that is not the alphabet's, and a router."""

    def __init__(self, count: int = 3, transposed: bool = False):
        super().__init__()
        self.zeta = nn.Parameter(0.4 * torch.randn(count, 5, 7))
        self.alpha = nn.Parameter(0.4 * torch.randn(count, 4, 7))
        self.mid = nn.Parameter(0.4 * torch.randn(count, 4, 6))
        self.gate = nn.Linear(5, count)
        if transposed:
            self.is_transposed = True

    def forward(self, x):
        hidden = torch.tanh(torch.bmm(x.expand(self.zeta.shape[0], *x.shape), self.zeta))
        hidden = torch.tanh(torch.bmm(hidden, self.alpha.transpose(1, 2)))
        weights = torch.softmax(self.gate(x), dim=-1)
        return (torch.bmm(hidden, self.mid) * weights.t()[:, :, None]).sum(dim=0)


class Bare(nn.Module):
    """``x @ w``, not ``x @ w.T``: PEFT's A is of the axis that is kept."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(9, 2))

    def forward(self, x):
        return x @ self.w


class Mixture(nn.Module):
    """Stacks of experts, a linear layer, and a bare matrix that is multiplied from the left."""

    def __init__(self, count: int = 3, transposed: bool = False):
        super().__init__()
        self.moe = nn.ModuleDict({"experts": Stacks(count, transposed)})
        self.mix = nn.Linear(6, 9)
        self.last = Bare()

    def forward(self, x):
        return self.last(self.mix(self.moe["experts"](x)))


@dataclass(frozen=True)
class Subject:
    """A mixture and PEFT's configuration for it."""

    fields: Mapping[str, Any]
    make: Callable[[], nn.Module] = Mixture
    transposed: tuple[str, ...] | None = None


STACKS = ["experts.zeta", "alpha", "moe.experts.mid"]
SUBJECTS = {
    "one stack": Subject(dict(target_parameters=["experts.alpha"])),
    "three stacks": Subject(dict(target_parameters=STACKS)),
    "is_transposed": Subject(
        dict(target_parameters=STACKS), lambda: Mixture(transposed=True), tuple(STACKS)
    ),
    "one expert": Subject(dict(target_parameters=STACKS), lambda: Mixture(count=1)),
    "matrices": Subject(dict(target_parameters=["last.w", "mix.weight"])),
    "modules and biases, too": Subject(
        dict(
            target_parameters=[*STACKS, "mix.weight"],
            target_modules=["gate"],
            bias="all",
            rank_pattern={"experts.alpha": 4, "gate": 3, "mix.weight": 1},
            alpha_pattern={"moe.experts.(zeta|mid)": 7},
            use_rslora=True,
        )
    ),
}


def pefts_config(**fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**fields)


def pefts(subject: Subject) -> Any:
    torch.manual_seed(0)
    plain = dict(r=2, lora_alpha=3, target_modules=[], init_lora_weights=False)
    config = pefts_config(**plain | dict(subject.fields))
    theirs = peft.get_peft_model(subject.make(), config).eval()
    with torch.no_grad():
        for parameter in trainable(theirs).values():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return theirs


def read(subject: Subject, directory: Any) -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(0)
    fn, params = from_torch(subject.make())
    config = replace(load_config(directory), transposed_parameters=subject.transposed)
    found = plan(fn, params, config, X)
    return fn, params, found, load_pretrained(directory, found)


def results(fn: Any, params: Any, found: Any, adapters: Any) -> dict[str, np.ndarray]:
    """Return our output and gradients by the names and in the layout of PEFT's file."""

    def loss(adapters):
        out = lora(fn)(params, adapters, X)
        return (out * G).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(adapters)
    return {"output": np.asarray(out)} | encode(found, gradients)


def pefts_results(theirs: Any) -> dict[str, np.ndarray]:
    dtype = next(theirs.parameters()).dtype
    out = theirs(torch.from_numpy(X).to(dtype))
    (out * torch.from_numpy(G)).sum().backward()
    found = copied({name: one.grad for name, one in trainable(theirs).items()})
    return {"output": out.detach().numpy()} | found


def check(subject: Subject, directory: Any) -> Any:
    """Raise unless PEFT's file gives PEFT's output and gradients here."""
    theirs = pefts(subject)
    theirs.save_pretrained(directory)
    single, truth = pefts_results(theirs), pefts_results(copy.deepcopy(theirs).double())
    truth = pefts_results(copy.deepcopy(theirs).double())
    fn, params, found, adapters = read(subject, directory)
    got = results(fn, params, found, adapters)
    assert got.keys() == truth.keys()
    assert rel_l2(np.asarray(fn(params, X)), truth["output"]) > 1e-2, "vacuous"
    for name, value in got.items():
        assert_within_rule(value, single[name], truth[name], CHAIN, UNIT_ROUNDOFF["float32"], name)
    return theirs


@pytest.fixture(autouse=True)
def no_warnings_of_pefts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "name", cases(SUBJECTS, slow=("one stack", "one expert", "three stacks", "is_transposed"))
)
def test_pefts_file_gives_pefts_output_and_gradients(name, tmp_path):
    check(SUBJECTS[name], tmp_path)


@pytest.mark.parametrize("name", SUBJECTS)
def test_our_file_gives_peft_the_same_tensors_and_the_same_bytes_twice(name, tmp_path):
    subject = SUBJECTS[name]
    theirs = pefts(subject)
    theirs.save_pretrained(tmp_path / "peft")
    _, _, found, adapters = read(subject, tmp_path / "peft")
    save_pretrained(tmp_path / "ours", found, adapters)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(subject.make(), tmp_path / "ours").eval()
    wanted = theirs.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key
    save_pretrained(tmp_path / "twice", *read(subject, tmp_path / "ours")[2:])
    for path in (tmp_path / "ours").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes(), path.name


def test_merged_parameters_give_pefts_merged_output(tmp_path):
    subject = SUBJECTS["three stacks"]
    theirs = pefts(subject)
    theirs.save_pretrained(tmp_path)
    fn, params, _, adapters = read(subject, tmp_path)
    got = np.asarray(fn(merge(params, adapters), X))
    merged = theirs.merge_and_unload()(torch.from_numpy(X)).detach().numpy()
    truth = pefts_results(pefts(subject).double())["output"]
    assert_within_rule(got, merged, truth, CHAIN, UNIT_ROUNDOFF["float32"])


def blockwise(matrix, packing, count):
    """Read B as several projects did: an expert's ranks side by side."""
    if packing == experts.SLOW:
        return matrix.reshape(count, -1, matrix.shape[1])
    return matrix.reshape(matrix.shape[0], count, -1).transpose(1, 2, 0)


def test_reading_blockwise_is_caught(monkeypatch, tmp_path):
    monkeypatch.setattr(experts, "unpacked", blockwise)
    with pytest.raises(AssertionError, match="further from the truth"):
        check(SUBJECTS["one stack"], tmp_path)


def test_writing_blockwise_is_caught(monkeypatch, tmp_path):
    def written(factors, packing):
        count, r, size = factors.shape
        if packing == experts.SLOW:
            return factors.reshape(count * r, size)
        return factors.reshape(count * r, size).T

    monkeypatch.setattr(experts, "packed", written)
    with pytest.raises(AssertionError):
        test_our_file_gives_peft_the_same_tensors_and_the_same_bytes_twice("one stack", tmp_path)


SIZES = st.integers(1, 5)


@given(SIZES, SIZES, SIZES, SIZES, st.booleans())
@settings(max_examples=60, deadline=None)
def test_unpacked_factors_give_pefts_change_exactly(count, r, first, last, transposed):
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(count, first, last))
            self.is_transposed = transposed

    if count == 1 and transposed:
        return  # PEFT's change has its axes exchanged here
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, init_lora_weights=False)
    wrapper = peft.tuners.lora.layer.ParamWrapper(
        Owner(), "default", parameter_name="w", config=config, r=r, lora_alpha=2 * r
    )
    rng = np.random.default_rng(0)
    a, b = (wrapper.get_parameter(f"lora_{half}.default.weight") for half in "AB")
    for weight in (a, b):
        weight.data = torch.from_numpy(rng.integers(-4, 5, weight.shape).astype(np.float32))
    slow = experts.unpacked(a.detach().numpy(), experts.SLOW, count)
    fast = experts.unpacked(b.detach().numpy(), experts.FAST, count)
    one, other = (slow, fast) if transposed else (fast, slow)
    ours = 2 * np.einsum("erf,erl->efl", one, other)
    theirs = wrapper.get_delta_weight("default").detach().numpy()
    np.testing.assert_array_equal(ours, np.broadcast_to(theirs, ours.shape))
    for factors, matrix, packing in ((slow, a, experts.SLOW), (fast, b, experts.FAST)):
        np.testing.assert_array_equal(experts.packed(factors, packing), matrix.detach().numpy())


def test_fresh_adapters_change_nothing_in_peft(tmp_path):
    fn, params = from_torch(Mixture())
    found = plan(fn, params, LoraConfig(r=2, target_parameters=STACKS), X)
    save_pretrained(tmp_path, found, found.init(jax.random.key(0)))
    torch.manual_seed(0)
    model = Mixture().eval()
    base = model(torch.from_numpy(X))
    assert torch.equal(peft.PeftModel.from_pretrained(model, tmp_path)(torch.from_numpy(X)), base)


def stacked_model() -> tuple[Any, dict[str, Any], Mapping[str, str]]:
    """Return a function with its layers stacked, its parameters, and their names in PyTorch."""
    rng = np.random.default_rng(3)
    sizes = {"experts": {"up": {"kernel": (2, 3, 5, 7)}, "down": {"kernel": (2, 3, 7, 5)}}}
    params = jax.tree.map(
        lambda shape: jnp.asarray(0.4 * rng.normal(size=shape), jnp.float32),
        sizes,
        is_leaf=lambda one: isinstance(one, tuple),
    )

    def fn(params, x):
        def layer(x, weights):
            hidden = jnp.tanh(jnp.einsum("td,edf->etf", x, weights["up"]["kernel"]))
            return x + jnp.einsum("etf,efd->td", hidden, weights["down"]["kernel"]), None

        return jax.lax.scan(layer, x, params["experts"])[0]

    table = {
        "experts.up": "layers.{}.experts.gate_up_proj",
        "experts.down": "layers.{}.experts.down_proj",
    }
    return fn, params, table


class Experts(nn.Module):
    """One layer's experts, from a tree of ``stacked_model``."""

    def __init__(self, up: Any, down: Any):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.from_numpy(np.array(up)))
        self.down_proj = nn.Parameter(torch.from_numpy(np.array(down)))

    def forward(self, x):
        hidden = torch.tanh(torch.einsum("td,edf->etf", x, self.gate_up_proj))
        return torch.einsum("etf,efd->td", hidden, self.down_proj)


class Layers(nn.Module):
    """``stacked_model`` in PyTorch."""

    def __init__(self, params: Any):
        super().__init__()
        up, down = (params["experts"][name]["kernel"] for name in ("up", "down"))
        layers = [nn.ModuleDict({"experts": Experts(up[n], down[n])}) for n in range(2)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer.get_submodule("experts")(x)
        return x


@pytest.mark.slow
def test_stacked_layers_go_to_peft_and_back_by_a_table(tmp_path):
    fn, params, table = stacked_model()
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_parameters=["experts.down.kernel", "experts.up.kernel"],
        init_lora_weights=False,
        rank_pattern={"up.kernel": 3},
    )
    found = plan(fn, params, config, X)
    assert {leaf.axes for leaf in found.adapted} == {"ssio"}
    adapters = found.init(jax.random.key(1))
    save_pretrained(tmp_path / "a", found, adapters, names=table)
    theirs = peft.PeftModel.from_pretrained(Layers(params), tmp_path / "a").eval()
    got = np.asarray(lora(fn)(params, adapters, X))
    single = theirs(torch.from_numpy(X)).detach().numpy()
    truth = theirs.double()(torch.from_numpy(X).double()).detach().numpy()
    assert_within_rule(got, single, truth, CHAIN, UNIT_ROUNDOFF["float32"])
    assert rel_l2(np.asarray(fn(params, X)), truth) > 1e-2, "vacuous"
    again = plan(fn, params, load_config(tmp_path / "a", names=table, params=params), X)
    back = load_pretrained(tmp_path / "a", again, names=table)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    save_pretrained(tmp_path / "b", again, back, names=table)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_what_peft_refuses_beside_target_parameters_is_one_error():
    bad = dict(lora_dropout=0.1, use_dora=True, lora_bias=True)
    with pytest.raises(ConfigError) as error:
        LoraConfig(target_parameters=["w"], **bad)
    assert all(name in str(error.value) for name in bad)
    for name, value in bad.items():
        fields = dict(target_modules=[], target_parameters=["alpha"]) | {name: value}
        with pytest.raises(ValueError, match="does not work"):
            peft.get_peft_model(Mixture(), pefts_config(**fields))
    for given_ in ("alpha", [1], ["w", "w"]):
        with pytest.raises(ConfigError, match="target_parameters"):
            LoraConfig(target_parameters=given_)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(target_parameters=["alpha", "nope", "experts"]), ["'nope'", "'experts'"]),
        (dict(target_parameters=["alpha"], rank_pattern={"experts": 3}), ["rank_pattern"]),
        (dict(target_parameters=["alpha"], layers_to_transform=[0]), ["layers_to_transform"]),
        (dict(target_parameters=["alpha"], exclude_modules=["nope"]), ["exclude_modules"]),
        (dict(target_parameters=["mix.bias", "gate.bias"]), ["moe.experts.gate.bias", "mix.bias"]),
        (dict(target_parameters=["mix.weight"], target_modules=["mix"]), ["means it, too"]),
        (dict(target_parameters=["mix.weight"], target_modules="all-linear"), ["means it, too"]),
        (dict(target_parameters=["mix.weight"], modules_to_save=["mix"]), ["in full"]),
    ],
    ids=str,
)
def test_what_has_no_effect_or_cannot_be_is_an_error(fields, words):
    fn, params = from_torch(Mixture())
    with pytest.raises(PlanError) as error:
        plan(fn, params, LoraConfig(**fields), X)
    assert all(word in str(error.value) for word in words), error.value


def test_excluded_modules_and_layers_leave_parameters_alone_as_in_peft():
    fields = dict(
        target_modules=["gate"], exclude_modules=["mix"], target_parameters=["mix.weight"]
    )
    fn, params = from_torch(Mixture())
    paths = {leaf.path for leaf in plan(fn, params, LoraConfig(**fields), X).adapted}
    theirs = peft.get_peft_model(Mixture(), pefts_config(**fields))
    keys = {key.split(".lora_A")[0] for key in peft.get_peft_model_state_dict(theirs)}
    owners = {key.split(".lora_B")[0] for key in keys}
    assert {f"base_model.model.{path.removesuffix('.weight')}" for path in paths} == owners


EINSUMS = {
    "each expert sees the same": ("td,edf->etf", (8, 5), (3, 5, 7)),
    "and the weight comes first": ("edf,td->eft", (8, 5), (3, 5, 7)),
    "what they say is summed": ("etd,edf->tf", (3, 8, 5), (3, 5, 7)),
    "transposed": ("td,efd->tef", (8, 5), (3, 7, 5)),
    "a batch axis, too": ("btd,bedf->btef", (4, 8, 5), (4, 3, 5, 7)),
    "summed beside a batch axis": ("bted,bedf->btf", (4, 8, 3, 5), (4, 3, 5, 7)),
}


@pytest.mark.parametrize("name", cases(EINSUMS, quick=("each expert sees the same",)))
def test_experts_have_a_pair_each_however_they_are_multiplied(name):
    spec, x_shape, w_shape = EINSUMS[name]
    rng = np.random.default_rng(5)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (x_shape, w_shape))
    g = jnp.asarray(rng.normal(size=jnp.einsum(spec, *_operands(spec, x, w)).shape), jnp.float32)

    def fn(params, x):
        return jnp.einsum(spec, *_operands(spec, x, params["moe"]["w_"]))

    params = {"moe": {"w_": w}}
    config = LoraConfig(r=2, lora_alpha=3, target_parameters=["w_"], init_lora_weights=False)
    found = plan(fn, params, config, x)
    assert found.adapted[0].axes in ("sio", "soi", "ssio")
    adapters = found.init(jax.random.key(0))
    got, wanted = lora(fn)(params, adapters, x), fn(merge(params, adapters), x)
    assert rel_l2(np.asarray(fn(params, x)), np.asarray(wanted, np.float64)) > 1e-2, "vacuous"
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    ours = jax.grad(lambda adapters: (lora(fn)(params, adapters, x) * g).sum())(adapters)
    chain = jax.grad(lambda adapters: (fn(merge(params, adapters), x) * g).sum())(adapters)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(chain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_nothing_of_the_size_of_the_experts_is_formed():
    def fn(params, x):
        hidden = jnp.einsum("td,edf->etf", x, params["moe"]["up"])
        return jnp.einsum("etf,efd->td", hidden, params["moe"]["down"])

    shapes = {"moe": {"up": (4, 64, 48), "down": (4, 48, 64)}}
    params = {"moe": {name: jnp.ones(shape) for name, shape in shapes["moe"].items()}}
    x, config = jnp.ones((3, 64)), LoraConfig(r=2, target_parameters=["moe.up", "moe.down"])
    adapters = plan(fn, params, config, x).init(jax.random.key(0))
    assert frugality(fn, params, adapters, x).weight_sized == ()


def _operands(spec, x, w):
    return (w, x) if spec.startswith("edf") else (x, w)


def test_what_cannot_be_a_pair_for_each_expert_is_an_error_and_formed_where_asked():
    def heads(params, x):
        return jnp.einsum("td,dhf->thf", x, params["moe"]["w_"])

    params = {"moe": {"w_": jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 7)))}}
    config = LoraConfig(r=2, target_parameters=["w_"], init_lora_weights=False)
    with pytest.raises(PlanError, match=r"moe.w_: dot_general uses it with axes 'ioo'"):
        plan(heads, params, config, X)
    found = plan(heads, params, replace(config, on_unsupported="materialize"), X)
    adapters = found.init(jax.random.key(0))
    got, wanted = lora(heads)(params, adapters, X), heads(merge(params, adapters), X)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_has_no_place_in_pefts_file_is_listed(tmp_path):
    def fn(params, x):
        return x @ params["moe"]["w"][0] @ params["top"]

    params = {"moe": {"w": jnp.ones((1, 2, 5, 7))[0]}, "top": jnp.ones((7, 4))}
    top = plan(fn, params, LoraConfig(target_parameters=["top"]), X)
    with pytest.raises(AdapterError, match="top: at the top of the model"):
        save_pretrained(tmp_path, top, top.init(jax.random.key(0)))


def test_files_are_read_strictly(tmp_path):
    subject = SUBJECTS["three stacks"]
    pefts(subject).save_pretrained(tmp_path)
    torch.manual_seed(0)
    fn, params = from_torch(subject.make())
    config = load_config(tmp_path)
    with pytest.raises(AdapterError, match=r"experts.base_layer.lora_A.weight: unexpected"):
        one = plan(fn, params, replace(config, target_parameters=("mid",)), X)
        load_pretrained(tmp_path, one)
    swapped = replace(config, target_parameters=tuple(STACKS[::-1]))
    with pytest.raises(AdapterError, match=r"lora_A.weight: got \(6, 6\), wanted \(6, 7\)"):
        load_pretrained(tmp_path, plan(fn, params, swapped, X))
    with pytest.raises(AdapterError, match="only the model can tell apart"):
        open_adapter(tmp_path)


def test_a_file_without_modules_says_so(tmp_path):
    """Where they are null, PEFT adapts those it has a list of for the architecture."""
    fn, params = from_torch(Mixture())
    found = plan(fn, params, LoraConfig(target_parameters=["mid", "alpha"]), X)
    save_pretrained(tmp_path, found, found.init(jax.random.key(0)))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["target_modules"] == []
    assert fields["target_parameters"] == ["mid", "alpha"]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_dense_blocks_are_those_of_transformers(family):
    model = moe_models.MODELS[family]
    routed = model.make().double()
    dense = moe_models.densely_routed(copy.deepcopy(routed))
    kinds = (MixtralSparseMoeBlock, Qwen2MoeSparseMoeBlock)
    blocks = [one for one in routed.modules() if isinstance(one, kinds)]
    others = [one for one in dense.modules() if isinstance(one, kinds)]
    assert len(blocks) == len(others) == 2
    for block, other in zip(blocks, others, strict=True):
        assert list(block.state_dict()) == list(other.state_dict())
        x = torch.randn(2, 9, next(block.parameters()).shape[1], dtype=torch.float64)
        said: list[list[np.ndarray]] = []
        for one in (block, other):
            out, scores = one(x)
            (out**2).sum().backward()
            gradients = [p.grad for p in one.parameters()]
            said.append([value.detach().numpy() for value in (out, scores, *gradients)])
        # Routing weights are float32 in transformers.
        assert max(rel_l2(got, wanted) for wanted, got in zip(*said, strict=True)) < 1e-6
