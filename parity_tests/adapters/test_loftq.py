"""LoftQ: the two grids, the alternation, and the file beside a quantised base."""

from __future__ import annotations

import copy
import statistics
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft import LoftQConfig, import_utils
from peft.utils import loftq_utils
from torch.overrides import TorchFunctionMode

from lora_jax import for_changed_base, lora, relative_to, save_pretrained
from lora_jax.adapters.inits import loftq
from lora_jax.core.errors import AdapterError
from parity_tests.laws.init_subjects import FIELDS, directions, entries, fn, inputs, model, ours
from parity_tests.parity.oracle import assert_within_rule, rel_l2


def test_nf4_is_made_of_the_quantiles_of_a_normal_distribution():
    def quantiles(n):
        tail = np.linspace(0.9677083, 0.5, n)[:-1]
        return [statistics.NormalDist().inv_cdf(p) for p in tail]

    values = np.sort([*quantiles(9), 0, *(-np.array(quantiles(8)))])
    np.testing.assert_allclose(loftq.NF4, values / values.max(), atol=2e-7)


def by_hand(w, bits):
    """Round PyTorch's ``(out, in)`` weight, number by number."""
    out, grid = np.empty_like(w), np.array(loftq.NF4)
    if bits == 8:
        for n, row in enumerate(w):
            step = np.abs(row).max() / 127
            out[n] = np.round(row / step) * step
        return out
    flat, done = w.reshape(-1), out.reshape(-1)
    for start in range(0, flat.size, 64):
        block = flat[start : start + 64]
        largest = np.abs(block).max()
        nearest = np.abs(block[:, None] / largest - grid).argmin(1)
        done[start : start + 64] = grid[nearest] * largest
    return out


class OnCPU(TorchFunctionMode):
    """PEFT moves the weight to a GPU first."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            args = [x for x in args if x != "cuda"]
            kwargs = {k: v for k, v in kwargs.items() if v != "cuda"}
        return func(*args, **kwargs)


def grid(bits):
    """Return a stand-in of bitsandbytes' quantised parameters, rounded by hand."""

    class Quantised:
        SCB = quant_state = None

        def __init__(self, weight, **_):
            rounded = by_hand(weight.numpy().copy(), bits)
            self.data = torch.from_numpy(np.float32(rounded))

        def to(self, device):
            return self

    return Quantised


@pytest.fixture
def bitsandbytes(monkeypatch):
    """PEFT's own LoftQ, with numpy in the place of bitsandbytes, which it wants a GPU for."""
    functional = SimpleNamespace(
        dequantize_4bit=lambda data, state: data, int8_vectorwise_dequant=lambda data, scb: data
    )
    module = SimpleNamespace(
        nn=SimpleNamespace(Params4bit=grid(4), Int8Params=grid(8)), functional=functional
    )
    for name in ("is_bnb_available", "is_bnb_4bit_available"):
        getattr(import_utils, name)()  # the rest of PEFT remembers that there is none
        monkeypatch.setattr(loftq_utils, name, lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    with OnCPU():
        yield


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_b_and_the_base_are_pefts(bits, iterations, bitsandbytes):
    """PEFT leaves the scale out of its A and B, so it is 1 here."""
    fields = dict(init_lora_weights="loftq", lora_alpha=2, alpha_pattern={"down": 3})
    config = LoftQConfig(loftq_bits=bits, loftq_iter=iterations)
    theirs = entries(
        peft.get_peft_model(model(), peft.LoraConfig(**FIELDS | fields, loftq_config=config))
    )
    found, params, base, adapters = ours(fields, bits=bits, iterations=iterations)
    assert [leaf.scale for leaf in found.adapted] == [1, 1]
    for path, (a, b, w) in theirs.items():
        mine = adapters[path]
        np.testing.assert_allclose(base[path], w, atol=2e-6)
        assert 1e-4 < np.abs(w - params[path]).max()
        for got, wanted in zip(directions(mine.a, mine.b), directions(a, b), strict=True):
            np.testing.assert_allclose(got, wanted, atol=3e-5 * max(np.abs(wanted).max(), 1e-2))


def test_peft_serves_the_file_beside_the_quantised_base(tmp_path):
    found, params, base, first = ours(dict(init_lora_weights="loftq"))
    rng = np.random.default_rng(7)
    trained = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape) / 5, leaf.dtype), first
    )
    save_pretrained(tmp_path / "ours", for_changed_base(found), trained)
    quantised = model()
    quantised.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in base.items()})
    x = inputs(1)[0]
    single, truth = (
        peft.PeftModel.from_pretrained(one, tmp_path / "ours").to(one.up.weight.dtype)
        for one in (quantised, copy.deepcopy(quantised).double())
    )
    with torch.no_grad():
        theirs, exact = single(torch.from_numpy(x)), truth(torch.from_numpy(x).double())
    mine = np.asarray(lora(fn)(base, trained, jnp.asarray(x)))
    assert_within_rule(mine, theirs.numpy(), exact.numpy(), 4.0, 2.0**-24, "y")
    assert rel_l2(np.asarray(fn(params, jnp.asarray(x))), exact.numpy()) > 1e-2, "vacuous"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_alternates_between_rounding_and_the_best_low_rank(bits, iterations):
    fields = dict(init_lora_weights="loftq")
    found, params, base, adapters = ours(fields, bits=bits, iterations=iterations)
    for leaf in found.adapted:
        w = np.float64(params[leaf.path])
        rest, low = w, 0
        for _ in range(iterations):
            q = by_hand(rest, bits)
            u, s, vt = np.linalg.svd(w - q)
            low = u[:, : leaf.r] * s[: leaf.r] @ vt[: leaf.r]
            rest = w - low
        mine = adapters[leaf.name]
        np.testing.assert_allclose(base[leaf.path], q, atol=1e-6)
        np.testing.assert_allclose(leaf.scale * (mine.a @ mine.b).T, low, atol=1e-5)
        lost = np.linalg.norm(w - q)
        assert 0.05 * lost < np.linalg.norm(w - q - low) < 0.95 * lost
    with pytest.raises(AdapterError, match="loftq.*for_changed_base"):
        relative_to(found, adapters, adapters)
    with pytest.raises(AdapterError, match="loftq.*for_changed_base"):
        save_pretrained("nowhere", found, adapters)
