"""The PyTorch reference: its laws, its agreement with PEFT's layers, and what it may import."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from lora_torch_ref import (
    A_INITS,
    SCALINGS,
    DoRALinear,
    LinearWithLoRA,
    LoRALayer,
    freeze,
    replace_linear_with_lora,
    trainable_parameters,
)

# alpha / rank = 8/3 is no binary fraction, so a scale that is rounded or left out shows.
RANK, ALPHA = 6, 16
WRAPPERS = [LinearWithLoRA, DoRALinear]
SHAPES = [(3, 5), (7, 2), (9, 16), (17, 11)]

every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
some_shapes = given(
    shape=st.sampled_from(SHAPES),
    batch=st.sampled_from([(), (4,), (2, 3)]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
few_examples = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
)


def trained(wrapper, shape, *, bias=True, seed=0, base=torch.float64, **options):
    """Return a wrapped layer as training leaves it: B is not zero, the magnitude not the norm."""
    torch.manual_seed(seed)
    options = {"dtype": base} | options
    layer = wrapper(nn.Linear(*shape, bias=bias, dtype=base), RANK, ALPHA, **options)
    with torch.no_grad():
        layer.lora.B.normal_()
        if wrapper is DoRALinear:
            layer.magnitude.mul_(1 + torch.rand_like(layer.magnitude))
    return layer


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def gradients(y, *inputs):
    """Return the gradients of a sum of y whose weights differ in every element."""
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weights).sum(), inputs)


class TestLaws:
    @every_wrapper
    @pytest.mark.parametrize("scaling", SCALINGS)
    @pytest.mark.parametrize("a_init", A_INITS)
    @some_shapes
    @few_examples
    def test_identity_at_init(self, wrapper, scaling, a_init, shape, batch, bias, seed):
        torch.manual_seed(seed)
        linear = nn.Linear(*shape, bias=bias)
        layer = wrapper(linear, RANK, ALPHA, scaling=scaling, a_init=a_init, dropout=0.5)
        x = torch.randn(*batch, shape[0])
        assert torch.equal(layer(x), linear(x))
        assert torch.equal(layer.merged().weight, linear.weight)

    @every_wrapper
    @some_shapes
    @few_examples
    def test_merge_equals_wrapped(self, wrapper, shape, batch, bias, seed):
        layer = trained(wrapper, shape, bias=bias, seed=seed, base=torch.float32)
        x = torch.randn(*batch, shape[0])
        wrapped, merged = layer(x), layer.merged()(x)
        assert relative(wrapped, layer.linear(x)) > 0.05
        # The bound is the size of the terms before they cancel: 2.0 was the worst of 3200 draws.
        path = layer.lora.scale * layer.lora.A.abs() @ layer.lora.B.abs()
        terms = F.linear(x.abs(), layer.linear.weight.abs() + path.T)
        assert (merged - wrapped).norm() <= 4 * torch.finfo(x.dtype).eps / 2 * terms.norm()

    @every_wrapper
    @some_shapes
    @few_examples
    def test_weight_gives_output_and_gradients(self, wrapper, shape, batch, bias, seed):
        layer = trained(wrapper, shape, bias=bias, seed=seed)
        freeze(layer.linear)
        x = torch.randn(*batch, shape[0], dtype=torch.float64, requires_grad=True)
        called, read = layer(x), F.linear(x, layer.weight, layer.bias)
        assert relative(called, read) < 1e-12
        wanted = [x, *trainable_parameters(layer).values()]
        for got, other in zip(gradients(called, *wanted), gradients(read, *wanted), strict=True):
            assert relative(got, other) < 1e-12

    @every_wrapper
    def test_merge_returns_a_new_linear(self, wrapper):
        layer = trained(wrapper, (7, 5))
        freeze(layer.linear)
        before = copy.deepcopy(layer.state_dict())
        merged = layer.eval().merged()
        with torch.no_grad():
            merged.weight.zero_()
            merged.bias.zero_()
        assert type(merged) is nn.Linear and not merged.training
        assert not any(p.requires_grad for p in merged.parameters())
        after = layer.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    @every_wrapper
    def test_merge_draws_no_random_numbers(self, wrapper):
        layer = trained(wrapper, (7, 5))
        state = torch.get_rng_state()
        layer.merged()
        assert torch.equal(torch.get_rng_state(), state)

    @every_wrapper
    def test_frozen_base_gets_no_gradient(self, wrapper):
        layer = trained(wrapper, (7, 5), base=torch.float32)
        freeze(layer.linear)
        layer(torch.randn(4, 7)).square().sum().backward()
        assert layer.linear.weight.grad is None and layer.linear.bias.grad is None
        names = {"lora.A", "lora.B"} | ({"magnitude"} if wrapper is DoRALinear else set())
        assert set(trainable_parameters(layer)) == names
        assert all(p.grad.abs().sum() > 0 for p in trainable_parameters(layer).values())

    @every_wrapper
    def test_state_dict_names(self, wrapper):
        names = ["linear.weight", "linear.bias", "lora.A", "lora.B"]
        names += ["magnitude"] if wrapper is DoRALinear else []
        assert sorted(wrapper(nn.Linear(3, 5), 2, 4).state_dict()) == sorted(names)

    @every_wrapper
    def test_dropout_acts_in_training_only(self, wrapper):
        layer = trained(wrapper, (7, 5), dropout=0.5)
        x = torch.randn(4, 7, dtype=torch.float64)
        assert not torch.equal(layer(x), layer(x))
        assert relative(layer.eval()(x), layer.merged()(x)) < 1e-12

    @every_wrapper
    def test_wrapper_of_an_eval_layer_is_in_eval(self, wrapper):
        layer = wrapper(nn.Linear(3, 5).eval(), 2, 4, dropout=0.5)
        assert not any(module.training for module in layer.modules())


class TestPath:
    @pytest.mark.parametrize(("scaling", "scale"), [("alpha", 16), ("alpha/rank", 16 / 6)])
    def test_scale(self, scaling, scale):
        path = LoRALayer(7, 5, RANK, ALPHA, scaling=scaling, dtype=torch.float64)
        nn.init.normal_(path.B)
        x = torch.randn(4, 7, dtype=torch.float64)
        wanted = scale * (x.numpy() @ path.A.detach().numpy() @ path.B.detach().numpy())
        np.testing.assert_allclose(path(x).detach(), wanted, rtol=1e-12)
        np.testing.assert_allclose(x @ path.delta().detach(), wanted, rtol=1e-12)

    def test_scale_defaults_to_alpha_over_rank(self):
        assert LoRALayer(7, 5, RANK, ALPHA).scale == ALPHA / RANK

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_small_integers_are_exact(self, dtype):
        draw = np.random.default_rng(0).integers
        x, w, b = draw(-1, 2, (4, 7)), draw(-1, 2, (5, 7)), draw(-1, 2, 5)
        down, up = draw(-1, 2, (7, 4)), draw(-1, 2, (4, 5))
        layer = LinearWithLoRA(nn.Linear(7, 5, dtype=dtype), rank=4, alpha=8, dtype=dtype)
        values = {"linear.weight": w, "linear.bias": b, "lora.A": down, "lora.B": up}
        layer.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
        wanted = x @ w.T + b + 2 * (x @ down @ up)
        np.testing.assert_array_equal(layer(torch.tensor(x, dtype=dtype)).float().detach(), wanted)

    @pytest.mark.parametrize(("a_init", "fan_in"), [("fan_in_rank", 16), ("fan_in_input", 300)])
    def test_bound_of_a(self, a_init, fan_in):
        a = LoRALayer(300, 5, 16, ALPHA, a_init=a_init).A
        bound = 1 / math.sqrt(fan_in)
        assert 0.99 * bound < a.abs().max() <= bound
        assert a.mean().abs() < 0.05 * bound
        assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)

    def test_equal_seeds_draw_as_torch_does(self):
        def drawn(**options):
            torch.manual_seed(7)
            return LoRALayer(9, 5, RANK, ALPHA, **options).A

        def kaiming(*shape):
            torch.manual_seed(7)
            return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))

        assert torch.equal(drawn(), kaiming(9, RANK))
        assert torch.equal(drawn(a_init="fan_in_input"), kaiming(RANK, 9).T)
        assert drawn(a_init="fan_in_input").is_contiguous()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rank": 0}, "rank: got 0, wanted an integer of at least 1"),
            ({"rank": 2.0}, "rank: got 2.0, wanted an integer of at least 1"),
            ({"in_dim": 0}, "in_dim: got 0, wanted an integer of at least 1"),
            ({"alpha": math.nan}, "alpha: got nan, wanted a finite number"),
            ({"scaling": "rank"}, "scaling: got 'rank', wanted one of 'alpha', 'alpha/rank'"),
            ({"a_init": "he"}, "a_init: got 'he', wanted one of 'fan_in_rank', 'fan_in_input'"),
            ({"dropout": 1}, "dropout: got 1, wanted 0 <= p < 1"),
            ({"dropout": -0.1}, "dropout: got -0.1, wanted 0 <= p < 1"),
        ],
        ids=str,
    )
    def test_bad_argument(self, arguments, message):
        good = {"in_dim": 3, "out_dim": 5, "rank": 2, "alpha": 4}
        with pytest.raises(ValueError) as caught:
            LoRALayer(**good | arguments)
        assert str(caught.value).splitlines()[1:] == [f"  {message}"]

    def test_all_bad_arguments_are_listed_at_once(self):
        with pytest.raises(ValueError, match=r"(?s)rank.*scaling.*dropout"):
            LoRALayer(3, 5, 0, 4, scaling="?", dropout=2)

    @every_wrapper
    def test_only_a_linear_is_wrapped(self, wrapper):
        with pytest.raises(ValueError, match="linear: got LinearWithLoRA, wanted an nn.Linear"):
            wrapper(LinearWithLoRA(nn.Linear(3, 5), 2, 4), 2, 4)

    def test_repr_shows_the_scale(self):
        wanted = "in_dim=3, out_dim=5, rank=6, alpha=16, scale=2.66667"
        assert wanted in repr(LoRALayer(3, 5, RANK, ALPHA))


class TestDtype:
    @every_wrapper
    def test_float32_adapter_beside_a_bfloat16_base(self, wrapper):
        layer = trained(wrapper, (9, 5), base=torch.bfloat16, dtype=torch.float32)
        freeze(layer.linear)
        x = torch.randn(4, 9, dtype=torch.bfloat16)
        y = layer(x)
        assert y.dtype == layer.weight.dtype == layer.merged().weight.dtype == torch.bfloat16
        grads = gradients(y, *trainable_parameters(layer).values())
        assert {g.dtype for g in grads} == {torch.float32}
        wide = copy.deepcopy(layer).float()
        assert relative(y.float(), wide(x.float())) < 2**-7

    def test_new_parameters_are_float32_unless_told(self):
        linear = nn.Linear(3, 5, dtype=torch.bfloat16)
        for options, dtype in [({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)]:
            layer = DoRALinear(linear, 2, 4, **options)
            assert {p.dtype for p in (layer.lora.A, layer.lora.B, layer.magnitude)} == {dtype}

    @every_wrapper
    @pytest.mark.parametrize("base", [torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_identity_in_every_pair_of_dtypes(self, wrapper, base, dtype):
        linear = nn.Linear(9, 5, dtype=base)
        x = torch.randn(4, 9, dtype=base)
        y = wrapper(linear, RANK, ALPHA, dtype=dtype)(x)
        assert y.dtype == base and torch.equal(y, linear(x))

    def test_forward_sums_in_float32_before_it_rounds(self):
        linear = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
        layer = LinearWithLoRA(linear, rank=1, alpha=1)
        with torch.no_grad():
            linear.weight.fill_(1)
            layer.lora.A.fill_(1)
            layer.lora.B.fill_(2**-8 + 2**-17)
        # In bfloat16 the path is 2**-8, and adding 1 to that is a tie that rounds down to 1.
        assert layer(torch.ones(1, dtype=torch.bfloat16)).item() == 1 + 2**-7

    def test_merge_sums_in_float32_before_it_rounds(self):
        linear = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
        layer = LinearWithLoRA(linear, rank=2, alpha=2, dtype=torch.bfloat16)
        with torch.no_grad():
            linear.weight.fill_(1)
            layer.lora.A.fill_(1)
            layer.lora.B.copy_(torch.tensor([[1.0], [2**-7 + 2**-9]]))
        # In bfloat16 the path is 1 + 2**-7, and adding 1 to that is a tie that rounds down to 2.
        assert layer.lora.delta().item() == 1 + 2**-7 + 2**-9
        assert layer.merged().weight.item() == 2 + 2**-6

    def test_new_parameters_are_on_the_device_of_the_linear(self):
        layer = LinearWithLoRA(nn.Linear(3, 5, device="meta"), 2, 4)
        assert layer.lora.A.is_meta and layer.lora.B.is_meta


class TestDora:
    def test_magnitude_starts_as_the_norm_of_each_output(self):
        linear = nn.Linear(7, 5)
        wanted = np.sqrt((linear.weight.detach().numpy() ** 2).sum(axis=1))
        magnitude = DoRALinear(linear, RANK, ALPHA).magnitude.detach()
        np.testing.assert_allclose(magnitude, wanted, rtol=1e-6)

    def test_merged_rows_have_the_magnitude_as_norm(self):
        layer = trained(DoRALinear, (7, 5))
        norms = layer.merged().weight.norm(dim=1)
        assert relative(norms, layer.magnitude) < 1e-12

    def test_norm_is_detached_from_the_gradient(self):
        layer = trained(DoRALinear, (7, 5))
        freeze(layer.linear)
        x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
        a, b, m = layer.lora.A, layer.lora.B, layer.magnitude

        def by_hand(detached):
            v = layer.linear.weight + ALPHA / RANK * (a @ b).T
            norm = v.square().sum(dim=1).sqrt()
            gain = m / (norm.detach() if detached else norm)
            return (x @ v.T) * gain + layer.bias

        assert relative(layer(x), by_hand(True)) < 1e-12
        got = gradients(layer(x), x, m, a, b)
        for g, wanted in zip(got, gradients(by_hand(True), x, m, a, b), strict=True):
            assert relative(g, wanted) < 1e-12
        for g, other in zip(got[2:], gradients(by_hand(False), a, b), strict=True):
            assert relative(g, other) > 1e-2

    def test_output_without_weights_is_an_error(self):
        linear = nn.Linear(3, 4)
        nn.init.zeros_(linear.weight[1:3])
        with pytest.raises(ValueError, match=r"zero weights for outputs \[1, 2\]"):
            DoRALinear(linear, 2, 4)


class TestPeft:
    @every_wrapper
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_forward_and_gradients(self, wrapper, training, dropout, bias, shape):
        ours = trained(wrapper, shape, bias=bias, dropout=dropout).train(training)
        theirs = peft_twin(ours).train(training)
        x = torch.randn(2, 3, shape[0], dtype=torch.float64, requires_grad=True)
        # Equal seeds draw equal dropout masks.
        torch.manual_seed(1)
        got = ours(x)
        torch.manual_seed(1)
        wanted = theirs(x)
        assert relative(wanted, ours.linear(x)) > 0.05
        assert relative(got, wanted) < 1e-12
        got_grads = gradients(got, x, *adapter_of(ours))
        wanted_grads = gradients(wanted, x, *adapter_of_peft(theirs))
        for g, w in zip(got_grads, wanted_grads, strict=True):
            assert relative(g, in_our_layout(w)) < 1e-12

    @every_wrapper
    def test_merge(self, wrapper):
        ours = trained(wrapper, (7, 5))
        theirs = peft_twin(ours)
        theirs.merge()
        assert relative(ours.merged().weight, theirs.base_layer.weight) < 1e-12
        assert torch.equal(ours.merged().bias, theirs.base_layer.bias)

    def test_bound_of_a(self):
        linear = nn.Linear(300, 5)
        ours = LinearWithLoRA(linear, 16, ALPHA, a_init="fan_in_input").lora.A
        theirs = PeftLinear(linear, "default", LoraConfig(), 16, ALPHA).lora_A["default"].weight
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01)


def peft_twin(layer):
    """Return PEFT's layer with the same base, adapter and dropout."""
    config = LoraConfig(lora_dropout=layer.lora.dropout.p, use_dora=isinstance(layer, DoRALinear))
    base = copy.deepcopy(layer.linear)
    twin = PeftLinear(base, "default", config=config, r=RANK, lora_alpha=ALPHA).double()
    assert twin.scaling["default"] == layer.lora.scale
    with torch.no_grad():
        for theirs, ours in zip(adapter_of_peft(twin), adapter_of(layer), strict=True):
            in_our_layout(theirs).copy_(ours)
    return twin


def adapter_of(layer):
    """Return A, B and, of DoRA, the magnitude."""
    magnitude = [layer.magnitude] if isinstance(layer, DoRALinear) else []
    return [layer.lora.A, layer.lora.B, *magnitude]


def adapter_of_peft(layer):
    parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    return [part["default"].weight for part in parts if "default" in part]


def in_our_layout(peft):
    """Return A and B transposed, a view; x and the magnitude are the same in both."""
    return peft.T if peft.ndim == 2 else peft


class Block(nn.Module):
    """Nested, with a Sequential, a shared layer, and layers that must stay as they are."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.mlp = nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 7, bias=False))
        self.norm = nn.LayerNorm(7)
        self.first = nn.Linear(7, 7)
        self.second = self.first
        self.head = nn.ModuleDict({"out": nn.Linear(7, 3)})

    def forward(self, ids):
        x = self.embed(ids)
        x = self.second(F.relu(self.first(x + self.mlp(x))))
        return self.head["out"](self.norm(x))


PLACES = ["mlp.0", "mlp.2", "first", "second", "head.out"]
IDS = torch.arange(12).view(3, 4)


class TestReplace:
    @every_wrapper
    def test_every_linear_is_wrapped(self, wrapper):
        model = Block()
        before, kept = model(IDS), {name: model.get_submodule(name) for name in PLACES}
        assert replace_linear_with_lora(model, RANK, ALPHA, layer=wrapper) == PLACES
        for name in PLACES:
            layer = model.get_submodule(name)
            assert type(layer) is wrapper and layer.linear is kept[name]
        assert type(model.embed) is nn.Embedding and type(model.norm) is nn.LayerNorm
        assert torch.equal(model(IDS), before)

    def test_only_adapters_train(self):
        model = freeze(Block())
        replace_linear_with_lora(model, 2, 4)
        places = [name for name in PLACES if name != "second"]
        assert list(trainable_parameters(model)) == [
            f"{name}.lora.{letter}" for name in places for letter in "AB"
        ]
        model(IDS).square().sum().backward()
        graded = {name for name, p in model.named_parameters() if p.grad is not None}
        assert graded == set(trainable_parameters(model))

    def test_options_reach_every_layer(self):
        model = Block()
        options = {"scaling": "alpha", "dropout": 0.25, "dtype": torch.float64}
        replace_linear_with_lora(model, 2, 4, **options, a_init="fan_in_input")
        paths = [module for module in model.modules() if isinstance(module, LoRALayer)]
        assert {(p.scale, p.dropout.p, p.A.dtype) for p in paths} == {(4, 0.25, torch.float64)}
        assert all(p.A.abs().max() <= 1 / math.sqrt(p.A.shape[0]) for p in paths)

    @every_wrapper
    def test_twice_does_not_nest(self, wrapper):
        model = Block()
        replace_linear_with_lora(model, 2, 4, exclude=["out"], layer=wrapper)
        once = dict(model.named_modules())
        assert replace_linear_with_lora(model, 2, 4, exclude=["out"]) == []
        assert dict(model.named_modules()) == once
        assert replace_linear_with_lora(model, 2, 4) == ["head.out"]

    @pytest.mark.parametrize(
        ("exclude", "left_out"),
        [
            (["mlp.0"], ["mlp.0"]),
            (["out"], ["head.out"]),
            ("out", ["head.out"]),
            (("0", "2"), ["mlp.0", "mlp.2"]),
            (["second"], ["first", "second"]),
        ],
        ids=str,
    )
    def test_exclude(self, exclude, left_out):
        model = Block()
        replaced = replace_linear_with_lora(model, 2, 4, exclude=exclude)
        assert replaced == [name for name in PLACES if name not in left_out]
        assert all(type(model.get_submodule(name)) is nn.Linear for name in left_out)

    def test_shared_linear_gets_one_wrapper(self):
        model = Block()
        replace_linear_with_lora(model, 2, 4)
        assert isinstance(model.first, LinearWithLoRA) and model.first is model.second

    def test_shared_parent_gets_one_wrapper(self):
        block = nn.Sequential(nn.Linear(7, 7))
        model = nn.Sequential(block, block)
        assert replace_linear_with_lora(model, 2, 4) == ["0.0", "1.0"]
        assert model[0] is model[1] is block and type(block[0].linear) is nn.Linear

    def test_draws_are_those_of_a_loop_over_the_layers(self):
        model = Block()
        torch.manual_seed(5)
        replace_linear_with_lora(model, RANK, ALPHA)
        torch.manual_seed(5)
        for name, in_dim in {"mlp.0": 7, "mlp.2": 11, "first": 7, "head.out": 7}.items():
            a = nn.init.kaiming_uniform_(torch.empty(in_dim, RANK), a=math.sqrt(5))
            assert torch.equal(model.get_submodule(name).lora.A, a)

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no_grad"])
    def test_owners_that_read_the_weight_see_the_adapter(self, training, enabled):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True).train(training)
        plain = copy.deepcopy(model)
        names = replace_linear_with_lora(model, 2, 4)
        assert names == ["self_attn.out_proj", "linear1", "linear2"]
        for name in names:
            nn.init.normal_(model.get_submodule(name).lora.B)
            merged = plain.get_submodule(name)
            merged.weight = model.get_submodule(name).merged().weight
        x = torch.randn(2, 5, 8)
        with torch.set_grad_enabled(enabled):
            got, wanted = model(x), plain(x)
        assert relative(got, wanted) < 1e-5
        if enabled:
            got.square().sum().backward()
            assert model.self_attn.out_proj.lora.B.grad.abs().sum() > 0

    @pytest.mark.parametrize(
        ("model", "options", "message"),
        [
            (nn.Linear(3, 5), {}, "the model is itself an nn.Linear.*LinearWithLoRA"),
            (nn.Sequential(nn.ReLU()), {}, "no nn.Linear to replace: the model has none"),
            (Block(), {"exclude": ["ut"]}, "exclude names 'ut', which match no .*: mlp.0, mlp.2"),
            (Block(), {"exclude": ["out", "x", "y"]}, "exclude names 'x', 'y'"),
            (Block(), {"exclude": ["0", "2", "first", "out"]}, "exclude leaves out all of mlp.0"),
            (Block(), {"rank": 0}, "rank: got 0"),
            (Block(), {"scaling": "?"}, "scaling: got"),
        ],
        ids=["linear", "none", "suffix", "several", "all", "rank", "scaling"],
    )
    def test_errors_leave_the_model_as_it_was(self, model, options, message):
        before = dict(model.named_modules())
        with pytest.raises(ValueError, match=message):
            replace_linear_with_lora(model, **{"rank": 2, "alpha": 4} | options)
        assert dict(model.named_modules()) == before

    def test_error_of_a_layer_names_it(self):
        model = Block()
        nn.init.zeros_(model.head["out"].weight)
        with pytest.raises(ValueError) as caught:
            replace_linear_with_lora(model, 2, 4, layer=DoRALinear)
        assert caught.value.__notes__ == ["while wrapping 'head.out'"]
        assert type(model.first) is nn.Linear


class TestFloor:
    def test_imports_torch_only(self):
        assert loaded_by("import lora_torch_ref") == set()

    def test_a_forbidden_import_is_seen(self):
        assert "flax" in loaded_by("import lora_torch_ref, flax")


def loaded_by(statement):
    """Return which forbidden packages a fresh interpreter holds after the statement."""
    forbidden = {"jax", "jaxlib", "flax", "peft", "transformers", "lora_jax"}
    code = f"{statement}\nimport sys\nprint(*(sys.modules.keys() & {forbidden}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())
