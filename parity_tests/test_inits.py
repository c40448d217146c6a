"""Initialisations that read weights, data or gradients: PEFT's values, and files for PEFT."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga

from lora_jax import (
    LoraConfig,
    initialise,
    load_pretrained,
    lora,
    merge,
    plan,
    relative_to,
    save_pretrained,
)
from lora_jax.errors import AdapterError, ConfigError
from lora_jax.initializers import init_problems
from lora_jax.inits import activations, loftq
from parity_tests.oracle import rel_l2
from parity_tests.tiers import cases

pytestmark = [
    # PEFT's conversion cannot keep these scales; `relative_to` does
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]

UNIT = 2.0**-24
FIELDS = dict(
    r=2,
    lora_alpha=5,
    target_modules=["up", "down"],
    rank_pattern={"down": 3},
    alpha_pattern={"down": 7},
)
KEY = jax.random.key(0)


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 10), torch.nn.Linear(10, 9)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def fn(params, x):
    h = jnp.tanh(x @ params["up.weight"].T + params["up.bias"])
    return h @ params["down.weight"].T + params["down.bias"]


def loss(params, x):
    return (fn(params, x) ** 2).mean()


def model():
    torch.manual_seed(3)
    return Tiny()


def inputs(n=2):
    """Batches whose directions differ clearly in size."""
    rng = np.random.default_rng(4)
    sizes = 1.5 ** -np.arange(8)
    mix = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    return [np.float32(rng.normal(size=(40, 8)) * 2 * sizes @ mix + 0.3) for _ in range(n)]


def ours(fields, batches=None, **options):
    params = {k: jnp.asarray(v.detach().numpy()) for k, v in model().state_dict().items()}
    found = plan(fn, params, LoraConfig(**FIELDS | fields), jnp.ones((2, 8)))
    of = loss if fields["init_lora_weights"] == "lora_ga" else fn
    data = None if batches is None else [(jnp.asarray(x),) for x in batches]
    base, adapters = initialise(found, params, KEY, fn=of, batches=data, **options)
    return found, params, base, adapters


def run_corda(torch_model, config, batches):
    # PEFT's module takes `dataclass` from attrs, which PEFT does not depend on
    sys.modules.setdefault("attr", dataclasses)
    from peft.tuners.lora.corda import preprocess_corda

    def run():
        for x in batches:
            torch_model(torch.from_numpy(x))

    preprocess_corda(torch_model, config, run_model=run)
    return peft.get_peft_model(torch_model, config)


def run_lora_ga(torch_model, config, batches):
    def step():
        for x in batches:
            (torch_model(torch.from_numpy(x)) ** 2).mean().backward()

    preprocess_loraga(torch_model, config, step)
    return peft.get_peft_model(torch_model, config)


def run_eva(torch_model, config, batches):
    wrapped = peft.get_peft_model(torch_model, config, low_cpu_mem_usage=True)
    loader = [dict(x=torch.from_numpy(np.concatenate(batches)))]
    initialize_lora_eva_weights(
        wrapped,
        loader,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return wrapped


def run_weights(torch_model, config, batches):
    return peft.get_peft_model(torch_model, config)


def ga(direction, scale):
    return dict(
        run=run_lora_ga,
        init="lora_ga",
        theirs=dict(lora_ga_config=LoraGAConfig(direction=direction, scale=scale)),
        ours=dict(direction=direction, scaling=scale),
    )


def cor(method):
    config = CordaConfig(corda_method=method)
    options = dict(method=method)
    return dict(run=run_corda, init="corda", theirs=dict(corda_config=config), ours=options)


CASES = {
    "olora": dict(init="olora"),
    "pissa": dict(init="pissa"),
    "pissa with rslora": dict(init="pissa", fields=dict(use_rslora=True)),
    "pissa_niter": dict(init="pissa_niter_200"),
    "mica": dict(init="mica"),
    "eva": dict(run=run_eva, init="eva", theirs=dict(eva_config=EvaConfig(rho=1.0))),
    "eva whitened": dict(
        run=run_eva,
        init="eva",
        theirs=dict(eva_config=EvaConfig(rho=1.0, whiten=True)),
        ours=dict(whiten=True),
    ),
    "corda ipm": cor("ipm"),
    "corda kpm": cor("kpm"),
    "lora_ga": ga("ArB2r", "stable"),
    "lora_ga A2rBr": ga("A2rBr", "gd_scale"),
    "lora_ga ArBr": ga("ArBr", "stable"),
    "lora_ga weight_svd": ga("ArB2r", "weight_svd"),
    "lora_ga unit": ga("ArB2r", "unit"),
}
CHANGING = [name for name in CASES if name not in ("mica", "eva", "eva whitened")]


# One for what each reads; the others are slow.
QUICK = ("olora", "pissa", "eva", "corda ipm", "lora_ga")


@functools.cache
def both(name):
    """Return our result and PEFT's A, B and base by path, in our layout."""
    case = dict(run=run_weights, theirs={}, ours={}, fields={}) | CASES[name]
    fields = case["fields"] | dict(init_lora_weights=case["init"])
    batches = inputs() if case["run"] is not run_weights else None
    # PEFT's incremental PCA sees every batch twice before it stops, so its S is √2 larger
    seen = 2 * batches if case["init"] == "eva" else batches
    mine = ours(fields, seen, **case["ours"])
    wrapped = case["run"](model(), peft.LoraConfig(**FIELDS | fields | case["theirs"]), batches)
    theirs = {}
    for module in ("up", "down"):
        layer = getattr(wrapped.base_model.model, module)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        parts = (a.T, b.T, layer.base_layer.weight)
        theirs[f"{module}.weight"] = [np.float64(x.detach().numpy()) for x in parts]
    return mine, theirs


def directions(a, b):
    """Return what does not depend on the signs of singular vectors."""
    one_by_one = np.einsum("ir,ro->rio", np.float64(a), np.float64(b))
    return one_by_one, np.float64(a) @ np.float64(a).T, np.float64(b).T @ np.float64(b)


@pytest.mark.parametrize("name", cases(CASES, quick=QUICK))
def test_a_b_and_the_base_are_pefts(name):
    (found, params, base, adapters), theirs = both(name)
    moved = 0
    # what PEFT finds by a randomised or incremental SVD is near, not equal
    near = {"pissa_niter": 2e-3, "eva": 2e-3, "eva whitened": 2e-3, "lora_ga weight_svd": 1e-2}
    tolerance = dict(rtol=0, atol=near.get(name, 2e-5))
    for path, (a, b, w) in theirs.items():
        mine = adapters[path]
        assert mine.a.any() or mine.b.any(), "vacuous"
        size = max(np.abs(a).max(), np.abs(b).max(), 1e-3)
        pairs = zip(directions(mine.a, mine.b), directions(a, b), strict=True)
        if name.startswith("lora_ga"):  # A and B are of different directions, each with its sign
            pairs = [*pairs][1:]
        for got, wanted in pairs:
            np.testing.assert_allclose(got / size**2, wanted / size**2, **tolerance)
        if not name.startswith("lora_ga"):
            np.testing.assert_allclose(base[path], w, **tolerance)
        moved += not np.array_equal(base[path], params[path])
        assert np.array_equal(np.float32(w) != params[path], base[path] != params[path]) or moved
    assert moved == (2 if name in CHANGING else 0)
    assert all(base[k] is v for k, v in params.items() if k not in theirs)


@pytest.mark.parametrize("name", cases(CASES, quick=QUICK))
def test_outputs_stay_and_peft_serves_what_was_trained_on_the_original_weights(name, tmp_path):
    (found, params, base, first), _ = both(name)
    x = jnp.asarray(inputs(1)[0])
    before = fn(params, x)
    assert rel_l2(np.asarray(lora(fn)(base, first, x)), np.float64(before)) < 40 * UNIT
    rng = np.random.default_rng(7)
    trained = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape) / 5, leaf.dtype), first
    )
    mine = np.asarray(lora(fn)(base, trained, x))
    assert rel_l2(mine, np.float64(before)) > 1e-2, "vacuous: training changed nothing"
    saved, plain = found, trained
    if name in CHANGING:
        with pytest.raises(AdapterError, match="relative_to"):
            save_pretrained(tmp_path / "no", found, trained)
        saved, plain = relative_to(found, first, trained)
        assert [x.r for x in saved.adapted] == [2 * x.r for x in found.adapted]
        np.testing.assert_allclose(*([x.scale for x in p.adapted] for p in (saved, found)))
    save_pretrained(tmp_path / "ours", saved, plain)
    torch32, truth = (
        peft.PeftModel.from_pretrained(one, tmp_path / "ours").to(one.up.weight.dtype)
        for one in (model(), copy.deepcopy(model()).double())
    )
    with torch.no_grad():
        theirs = torch32(torch.from_numpy(np.asarray(x).copy())).numpy()
        exact = truth(torch.from_numpy(np.asarray(x).copy()).double()).numpy()
    # the base was rounded once more than the original weights
    assert rel_l2(mine, exact) <= 2 * rel_l2(theirs, exact) + 16 * UNIT
    ours_plain = np.asarray(lora(fn)(params, plain, x))
    assert rel_l2(ours_plain, exact) <= 2 * rel_l2(theirs, exact) + 16 * UNIT
    again = load_pretrained(tmp_path / "ours", saved)
    assert jax.tree.all(jax.tree.map(lambda p, q: bool((p == q).all()), again, plain))


def stacked_fn(params, x):
    """Layers stacked for a scan, then heads: ``sio`` and ``ioo``."""
    x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])
    return jnp.einsum("nd,dhk->nhk", x, params["heads"])


def stacked():
    rng = np.random.default_rng(5)
    params = {
        "layers": jnp.asarray(rng.normal(size=(3, 8, 8)) / 2, jnp.float32),
        "heads": jnp.asarray(rng.normal(size=(8, 2, 5)) / 2, jnp.float32),
    }
    return params, [(jnp.asarray(x),) for x in inputs()]


@pytest.mark.parametrize("init", ["olora", "pissa", "pissa_niter_4", "corda", "lora_ga"])
def test_stacked_layers_and_heads_keep_their_outputs(init):
    params, batches = stacked()
    config = LoraConfig(r=3, init_lora_weights=init, target_modules=["layers", "heads"])
    found = plan(stacked_fn, params, config, *batches[0])

    def of(params, x):
        out = stacked_fn(params, x)
        return (out**2).mean() if init == "lora_ga" else out

    base, adapters = initialise(found, params, KEY, fn=of, batches=batches)
    assert {x.axes for x in found.adapted} == {"sio", "ioo"}
    wanted = np.float64(stacked_fn(params, *batches[0]))
    got = np.asarray(lora(stacked_fn)(base, adapters, *batches[0]))
    assert rel_l2(got, wanted) < 100 * UNIT
    again = merge(base, adapters)
    for path, leaf in params.items():
        assert not np.array_equal(base[path], leaf)
        np.testing.assert_allclose(again[path], leaf, atol=2e-6)


def test_moments_of_stacked_layers_are_those_of_each_layers_inputs():
    params, batches = stacked()
    config = LoraConfig(r=3, init_lora_weights="eva", target_modules=["layers", "heads"])
    found = plan(stacked_fn, params, config, *batches[0])
    for remat in (False, True):
        of = jax.checkpoint(stacked_fn) if remat else stacked_fn
        seen = activations.moments(of, params, found.adapted, batches)
        x = np.concatenate([np.float64(x) for (x,) in batches])
        for k in range(3):
            np.testing.assert_allclose(seen["layers"].gram[k], x.T @ x, rtol=2e-5, atol=1e-4)
            np.testing.assert_allclose(seen["layers"].total[k], x.sum(0), rtol=2e-5, atol=1e-4)
            assert seen["layers"].count[k] == len(x) == 80
            x = np.tanh(x @ np.float64(params["layers"][k]))
        np.testing.assert_allclose(seen["heads"].gram[0], x.T @ x, rtol=2e-5, atol=1e-4)


def test_what_cannot_be_made_is_refused_with_every_reason():
    params = {"embed.weight": jnp.ones((9, 4)), "up.weight": jnp.ones((4, 4))}

    def lookup(params, ids):
        return params["embed.weight"][ids] @ params["up.weight"]

    config = LoraConfig(r=5, init_lora_weights="lora_ga", target_modules=["embed", "up"])
    found = plan(lookup, params, config, jnp.zeros(2, int))
    with pytest.raises(ConfigError, match="(?s)fn: got None.*batches.*embed.*looked up.*up.*r=5"):
        initialise(found, params, KEY)
    with pytest.raises(ConfigError, match="lora_jax.inits.initialise"):
        found.init(KEY)
    assert found.abstract()["up.weight"].a.shape == (4, 5)
    with pytest.raises(ConfigError, match="pissa_niter_N"):
        plan(lookup, params, replace(config, init_lora_weights="pissa_niter_x"), jnp.zeros(2, int))
    small = replace(config, r=2, init_lora_weights="eva", target_modules=["up"])
    found = plan(lookup, params, small, jnp.zeros(2, int))
    with pytest.raises(ConfigError, match="got none"):
        initialise(found, params, KEY, fn=lookup, batches=[])
    with pytest.raises(ConfigError, match="up.weight: no input reaches"):
        initialise(
            found,
            params,
            KEY,
            fn=lambda params, ids: jax.lax.stop_gradient(lookup(params, ids)),
            batches=[(jnp.zeros(2, int),)],
        )


def test_a_layer_of_its_own_has_no_weight_to_read():
    assert "wanted one of True" in init_problems("pissa", 2)[0]
    assert not init_problems("pissa", 2, drawn=False)
    assert "'pissa_niter_N'" in init_problems("pisa", 2, drawn=False)[0]


def test_relative_to_refuses_other_adapters():
    found, _, _, adapters = ours(dict(init_lora_weights="pissa"))
    with pytest.raises(AdapterError, match="(?s)down.weight.*not in both"):
        relative_to(found, adapters, {"up.weight": adapters["up.weight"]})
    wider = replace(adapters["up.weight"], scale=9.0)
    with pytest.raises(AdapterError, match="up.weight: got"):
        relative_to(found, adapters, adapters | {"up.weight": wider})


def test_a_drawn_initialisation_needs_no_more_than_before():
    found, params, base, adapters = ours(dict(init_lora_weights=True))
    assert base is params
    drawn = found.init(KEY)
    assert jax.tree.all(jax.tree.map(lambda p, q: bool((p == q).all()), drawn, adapters))


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
    with pytest.raises(AdapterError, match="loftq"):
        relative_to(found, adapters, adapters)
    with pytest.raises(AdapterError, match="loftq"):
        save_pretrained("nowhere", found, adapters)
