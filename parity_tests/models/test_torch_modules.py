"""``from_torch`` on small modules: what is copied, what is constant, what is refused; torchax."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from lora_jax import LoraConfig, lora, plan
from lora_jax.core.errors import AssetError
from lora_jax.torch import compat
from lora_jax.torch.from_torch import from_torch
from parity_tests.parity.oracle import UNIT_ROUNDOFF, assert_within_rule

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


class Function(nn.Module):
    """A linear layer and a function of it and the input."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self.linear, *args, **kwargs)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


class Holder(nn.Module):
    """Tensors wherever a module may keep them, and a forward that writes to all of them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("kept", torch.full((3,), 2.0))
        self.register_buffer("hidden", torch.full((3,), 3.0), persistent=False)
        self.plain = torch.full((3,), 4.0)
        self.listed = [torch.full((3,), 5.0)]

    def forward(self, x):
        out = x * self.weight + self.kept + self.hidden + self.plain + self.listed[0]
        self.kept.add_(1)
        self.hidden = self.hidden + x[0]
        self.plain = x[0]
        self.listed.append(x[0])
        self.calls = x
        return out


def value_of(module, *args):
    fn, params = from_torch(module)
    return fn(params, *args)


def test_tied_parameters_appear_once_under_their_first_name():
    module = Tied()
    fn, params = from_torch(module)
    assert list(params) == ["embed.weight"]
    ids = np.array([[0, 4, 2]], np.int32)
    wanted = module(torch.from_numpy(ids)).detach().numpy()
    np.testing.assert_allclose(fn(params, ids), wanted, rtol=1e-5)
    gradient = jax.grad(lambda p: fn(p, ids)[..., 1].sum())(params)["embed.weight"]
    assert np.any(gradient[1]) and np.any(gradient[4]), "head and embedding share one gradient"


def test_buffers_and_fields_are_constants_and_each_call_starts_from_them():
    module = Holder()
    fn, params = from_torch(module)
    assert list(params) == ["weight"]
    with jax.checking_leaks():
        outs = [jax.jit(fn)(params, X), fn(params, X), fn(params, X)]
    for out in outs:
        np.testing.assert_allclose(out, X + 14, rtol=1e-6)
    assert len(module.listed) == 1 and not hasattr(module, "calls")
    assert torch.equal(module.kept, torch.full((3,), 2.0))


def test_the_module_is_copied_and_may_change_afterwards():
    module = Holder()
    fn, params = from_torch(module)
    with torch.no_grad():
        for tensor in (module.weight, module.kept, module.hidden, module.plain, *module.listed):
            tensor.zero_()
    np.testing.assert_allclose(fn(params, X), X + 14, rtol=1e-6)


def test_eval_mode_without_changing_the_modules_own():
    module = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3)).train()
    module[0].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    np.testing.assert_allclose(value_of(module, X), X / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert [m.training for m in module.modules()] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_is_random_even_in_eval_mode_is_the_same_at_every_call():
    module = Function(lambda linear, x: x + torch.rand_like(x))
    fn, params = from_torch(module)
    with jax.checking_leaks():
        first = jax.jit(fn)(params, X)
    np.testing.assert_allclose(first, fn(params, X), rtol=1e-6)
    assert np.any(first != X)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_grad_inside_is_constant_and_outside_makes_no_difference(mode):
    def forward(linear, x):
        with torch.no_grad():
            gate = linear(x)
        return nn.functional.dropout(linear(x) * gate, training=False)

    module = Function(forward)
    module(torch.from_numpy(X)).sum().backward()
    fn, params = from_torch(module)
    with mode():
        gradients = jax.grad(lambda p: fn(p, X).sum())(params)
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(gradients[name], parameter.grad, rtol=1e-5)


@pytest.mark.parametrize("constant", [torch.no_grad, torch.inference_mode])
def test_a_function_without_gradient_is_constant(constant):
    gate = constant()(lambda linear, x: linear(x))
    fn, params = from_torch(Function(lambda linear, x: linear(x) * gate(linear, x)))
    gradient = jax.grad(lambda p: fn(p, X).sum())(params)["linear.bias"]
    value = X @ params["linear.weight"].T + params["linear.bias"]
    np.testing.assert_allclose(gradient, value.sum(0), rtol=1e-5)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 7 * gradient


def test_an_authors_backward_is_refused():
    fn, params = from_torch(Function(lambda linear, x: Doubled.apply(linear(x))))
    with pytest.raises(AssetError, match="torch.autograd.Function, whose backward"):
        fn(params, X)
    # of integers, as in transformers' masks, there is nothing to differentiate
    counts = np.arange(3)
    np.testing.assert_array_equal(
        value_of(Function(lambda _, x: Doubled.apply(x)), counts), [0, 2, 4]
    )


def test_tensors_made_in_forward_without_a_device():
    def forward(linear, x):
        causal = torch.full((x.shape[0], x.shape[0]), float("-inf")).triu(1)
        return torch.softmax(x @ x.T + causal, -1) @ linear(x) + torch.arange(3) + torch.tensor(2)

    module = Function(forward)
    wanted = module(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(value_of(module, X), wanted, rtol=1e-5)


def test_a_mask_made_by_vmap():
    def forward(linear, x):
        place = torch.arange(x.shape[0], device=x.device)
        window = torch.vmap(lambda q: torch.vmap(lambda k: (k <= q) & (k > q - 2))(place))(place)
        return torch.where(window, x @ x.T, 0.0)

    got = value_of(Function(forward), X)
    np.testing.assert_allclose(got, np.tril(np.triu(X @ X.T, -1)), rtol=1e-5)


def test_a_branch_on_values_says_what_to_do():
    fn, params = from_torch(Function(lambda linear, x: x if (x > 0).all() else -x))
    np.testing.assert_array_equal(fn(params, X), -X)
    with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
        jax.jit(fn)(params, X)
    assert "attn_implementation='eager'" in caught.value.__notes__[0]


def test_bfloat16_stays_bfloat16_beside_float32_adapters():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, 7))
    wanted = module.double()(torch.from_numpy(X).bfloat16().double()).detach().numpy()
    module = module.bfloat16()
    fn, params = from_torch(module)
    x = jnp.asarray(X, jnp.bfloat16)
    assert {value.dtype for value in params.values()} == {jnp.dtype("bfloat16")}
    for name, parameter in module.named_parameters():
        np.testing.assert_array_equal(
            params[name].view(jnp.uint16), parameter.detach().view(torch.uint16).numpy()
        )
    config = LoraConfig(r=2, target_modules=["0", "2"])
    adapters = plan(fn, params, config, x).init(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    out = lora(fn)(params, adapters, x)
    assert out.dtype == jnp.bfloat16
    theirs = module(torch.from_numpy(X).bfloat16()).detach().float().numpy()
    got = np.asarray(out.astype(jnp.float32))
    assert_within_rule(got, theirs, wanted, 4.0, UNIT_ROUNDOFF["bfloat16"], "bf16")


def test_float64_with_x64():
    module = nn.Linear(3, 2).double()
    wanted = module(torch.from_numpy(X).double()).detach().numpy()
    with jax.enable_x64(True):
        got = value_of(module, X.astype(np.float64))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, wanted, rtol=1e-13)


Pair = namedtuple("Pair", ["one", "two"])

OUTPUTS = {
    "tuple": (lambda linear, x: (x, None), (X, None)),
    "list": (lambda linear, x: [x, 3], [X, 3]),
    "namedtuple": (lambda linear, x: Pair(x, "a"), Pair(X, "a")),
    "dict": (lambda linear, x: {"b": {"c": x}, "a": True}, {"b": {"c": X}, "a": True}),
    "view": (lambda linear, x: x[1:].T, X[1:].T),
    "numbers in": (lambda linear, x, scale=1, flag=None: x * scale if flag is None else 0, X),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_keep_their_structure(case):
    function, wanted = OUTPUTS[case]
    got = value_of(Function(function), X)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_one_field_of_the_output():
    module = Function(lambda linear, x: {"logits": 2 * x, "cache": object(), "loss": None})
    fn, params = from_torch(module, output="logits")
    np.testing.assert_array_equal(fn(params, X), 2 * X)
    with pytest.raises(AssetError, match=r"output='loss': the module returns logits, cache"):
        from_torch(module, output="loss")[0](params, X)
    with pytest.raises(
        AssetError, match=r"output\['cache'\]: got object, wanted arrays; .*output="
    ):
        from_torch(module)[0](params, X)


def test_parameters_that_are_not_the_modules_are_all_listed():
    fn, params = from_torch(nn.Linear(3, 2))
    wrong = {"weight": params["weight"].T, "extra": params["bias"]}
    with pytest.raises(AssetError) as caught:
        fn(wrong, X)
    assert str(caught.value).splitlines()[1:] == [
        "  bias: got nothing, wanted (2,)",
        "  extra: got (2,), wanted no such parameter",
        "  weight: got (3, 2), wanted (2, 3)",
    ]


def test_parameters_without_values_are_refused():
    with pytest.raises(AssetError, match=r"load the weights first:\n  weight: .*\n  bias: "):
        from_torch(nn.Linear(3, 2, device="meta"))


# torchax


@pytest.mark.parametrize("missing", ["torch", "torchax"])
def test_a_missing_package_gives_the_command_that_installs_it(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import lora_jax, lora_jax.torch"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and missing in last
    assert last.endswith('pip install "lora_jax[torch]"')


def fail(*args):
    raise AssertionError("not needed here")


def test_nothing_is_patched_where_torchax_imports_by_itself(monkeypatch):
    monkeypatch.setattr(compat, "stand_ins", fail)
    assert compat.import_torchax() is sys.modules["torchax"]


def test_an_overload_that_exists_is_not_replaced(monkeypatch):
    monkeypatch.setattr(compat, "NAMED_DIMENSIONS", {"prod": ("dim_int", "gone")})
    packet, real = torch.ops.aten.prod, torch.ops.aten.prod.dim_int
    with compat.stand_ins() as names:
        assert names == ["aten.prod.gone"]
        assert packet.dim_int is real and hasattr(packet, "gone")
    assert packet.dim_int is real and not hasattr(packet, "gone")


def test_pytorchs_random_state_can_be_forked_beside_torchax():
    torch.manual_seed(0)
    with torch.random.fork_rng():
        torch.rand(3)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


def test_pytorch_compiles_beside_torchax():
    module = torch.nn.Linear(3, 2)
    compiled = torch.compile(module, backend="eager")
    x = torch.ones(1, 3)
    assert torch.equal(compiled(x), module(x))


def test_no_stand_in_outlives_the_import():
    for name, overloads in compat.NAMED_DIMENSIONS.items():
        for overload in overloads:
            found = getattr(getattr(torch.ops.aten, name), overload, None)
            assert found is None or isinstance(found, torch._ops.OpOverload)


def test_versions_that_do_not_fit_give_the_command_and_leave_no_half_of_torchax(monkeypatch):
    def load(name):
        sys.modules["torchax.half"] = torch
        raise AttributeError("no overload name 'other'")

    with monkeypatch.context() as patched:
        patched.setattr("importlib.import_module", load)
        with pytest.raises(ImportError, match=r"'other'; pip install \"lora_jax\[torch\]\""):
            compat.import_torchax()
    assert "torchax.half" not in sys.modules and "torchax" in sys.modules
