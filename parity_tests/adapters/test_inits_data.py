"""EVA's ranks, and padding that does not count, for EVA and CorDA."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights

from lora_jax import (
    LoraConfig,
    eva_ranks,
    initialise,
    load_config,
    load_pretrained,
    lora,
    plan,
    save_pretrained,
)
from lora_jax.adapters.inits import activations
from lora_jax.core.errors import ConfigError, PlanError
from parity_tests.laws.init_subjects import KEY, directions, entries, run_corda
from parity_tests.parity.oracle import rel_l2

NAMES = ("q", "k", "v", "up", "down")
WORDS, LENGTHS, T = 23, (9, 5, 12, 7), 12


class Layers(torch.nn.Module):
    """Three weights with the same inputs, and two with inputs of their own."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, 8)
        self.q, self.k, self.v = (torch.nn.Linear(8, n) for n in (6, 5, 7))
        self.up = torch.nn.Linear(18, 9)
        self.down = torch.nn.Linear(9, 10)
        with torch.no_grad():  # directions of clearly different sizes, all larger than others' are
            self.embed.weight.mul_(torch.tensor(20 * 1.6 ** -np.arange(8.0)).float())

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        h = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        return self.down(torch.tanh(self.up(h) / 8))


def fn(params, ids, mask=None):
    x = params["embed.weight"][ids]
    h = [x @ params[f"{n}.weight"].T + params[f"{n}.bias"] for n in "qkv"]
    h = jnp.concatenate(h, -1)
    h = jnp.tanh((h @ params["up.weight"].T + params["up.bias"]) / 8)
    return h @ params["down.weight"].T + params["down.bias"]


def model():
    torch.manual_seed(3)
    return Layers()


def padded():
    """Sentences of different lengths, and where they are."""
    rng = np.random.default_rng(2)
    mask = np.arange(T) < np.array(LENGTHS)[:, None]
    return np.where(mask, rng.integers(1, WORDS, mask.shape), 0), mask.astype(np.int64)


def params_of(module):
    return {k: jnp.asarray(v.detach().numpy()) for k, v in module.state_dict().items()}


FIELDS_HERE = dict(
    r=2,
    lora_alpha=5,
    init_lora_weights="eva",
    target_modules=list(NAMES),
    rank_pattern={"down": 3},
    alpha_pattern={"up": 7},
)


def plan_of(params, **fields):
    ids, mask = padded()
    return plan(fn, params, LoraConfig(**FIELDS_HERE | fields), jnp.asarray(ids))


def pefts(rho, adjust=True, masked=True):
    ids, mask = (torch.from_numpy(x) for x in padded())
    batch = dict(input_ids=ids, attention_mask=mask if masked else torch.ones_like(mask))
    own = EvaConfig(rho=rho, adjust_scaling_factors=adjust, tau=1 - 1e-6)
    config = peft.LoraConfig(**FIELDS_HERE, eva_config=own)
    wrapped = peft.get_peft_model(model(), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(wrapped, [batch], show_progress_bar=False)
    return wrapped


def mine(rho, adjust=True, masked=True, **fields):
    params, (ids, mask) = params_of(model()), padded()
    data = [(jnp.asarray(ids), jnp.asarray(mask))]
    options = dict(fn=fn, batches=data, mask=(lambda ids, mask: mask) if masked else None)
    found = plan_of(params, **fields)
    found = eva_ranks(found, params, rho=rho, adjust_scaling_factors=adjust, **options)
    return found, params, *initialise(found, params, KEY, **options)


def spans(a):
    return np.float64(a) @ np.float64(a).T


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rho", "adjust", "masked"),
    [
        (2.0, True, True),
        (3.0, False, True),
        (1.0, True, True),  # where rho binds
        (2.0, True, False),
    ],
)
def test_ranks_scales_and_directions_are_pefts(rho, adjust, masked):
    found, _, _, adapters = mine(rho, adjust, masked)
    theirs = pefts(rho, adjust, masked).base_model.model
    layers = {n: getattr(theirs, n) for n in NAMES if hasattr(getattr(theirs, n), "lora_A")}
    got = {leaf.path.removesuffix(".weight"): leaf for leaf in found.adapted}
    ranks = {n: (layers[n].r["default"] if n in layers else 0) for n in NAMES}
    own = {n: (got[n].r if n in got else 0) for n in NAMES}
    # weights with the same inputs share what is left over in an order that trees do not have
    assert sorted(own[n] for n in "qkv") == sorted(ranks[n] for n in "qkv")
    assert {n: own[n] for n in ("up", "down")} == {n: ranks[n] for n in ("up", "down")}
    assert sum(own.values()) == 11 and (rho == 1) == (own == dict(q=2, k=2, v=2, up=2, down=3))
    for n in layers:
        if own[n] != ranks[n]:
            continue
        a = layers[n].lora_A["default"].weight.T.detach().numpy()
        np.testing.assert_allclose(spans(adapters[f"{n}.weight"].a), spans(a), atol=2e-3)
        assert got[n].scale == pytest.approx(layers[n].scaling["default"], rel=1e-12)
        assert not adapters[f"{n}.weight"].b.any()


def test_padding_changes_the_directions_unless_it_is_masked():
    a, b = (mine(1.0, masked=masked)[3] for masked in (True, False))
    assert max(np.abs(spans(a[n].a) - spans(b[n].a)).max() for n in a) > 0.05


def test_peft_loads_the_redistributed_ranks(tmp_path):
    found, params, base, adapters = mine(3.0, use_rslora=True, bias="lora_only")
    assert len({leaf.r for leaf in found.adapted}) > 1
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape) / 3, leaf.dtype), adapters
    )
    save_pretrained(tmp_path / "eva", found, adapters)
    ids, _ = padded()
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path / "eva")
    truth = copy.deepcopy(theirs).double()
    with torch.no_grad():
        single, exact = (one(torch.from_numpy(ids)).numpy() for one in (theirs, truth))
    got = np.asarray(lora(fn)(params, adapters, jnp.asarray(ids)))
    assert rel_l2(got, exact) <= 2 * rel_l2(single, exact) + 8 * 2.0**-24
    again = plan(fn, params, load_config(tmp_path / "eva"), jnp.asarray(ids))
    assert {x.path: x.r for x in again.adapted} == {x.path: x.r for x in found.adapted}
    assert {x.path: x.scale for x in again.adapted} == {x.path: x.scale for x in found.adapted}
    assert again.full.keys() == found.full.keys()
    loaded = load_pretrained(tmp_path / "eva", again)
    assert jax.tree.all(jax.tree.map(lambda p, q: bool((p == q).all()), loaded, adapters))


def test_a_module_that_explains_too_little_is_no_longer_adapted():
    """The first inputs have eight directions of the same size, the others two."""
    params = params_of(model())
    words = np.random.default_rng(2).normal(size=(WORDS, 8))
    params["embed.weight"] = jnp.asarray(np.linalg.qr(words - words.mean(0))[0], jnp.float32)
    for name in "qkv":
        params[f"{name}.weight"] *= jnp.array([1.0, 1] + 6 * [0])
    params["up.weight"] /= 100
    config = LoraConfig(r=1, init_lora_weights="eva", target_modules=list(NAMES), bias="lora_only")
    ids = np.arange(WORDS)[None]
    found = plan(fn, params, config, jnp.asarray(ids))
    data = [(jnp.asarray(ids),)]
    new = eva_ranks(found, params, fn=fn, batches=data, rho=4)
    gone = {leaf.path for leaf in found.adapted} - {leaf.path for leaf in new.adapted}
    assert gone and sum(leaf.r for leaf in new.adapted) == 5
    assert all("EVA" in leaf.why for leaf in new.leaves if leaf.path in gone)
    assert set(new.config.target_modules) == {leaf.path[:-7] for leaf in new.adapted}
    kept = {path for path in found.full if f"{path[:-5]}.weight" not in gone}
    assert set(new.full) == kept < set(found.full)
    base, adapters = initialise(new, params, KEY, fn=fn, batches=data)
    assert set(adapters) == {leaf.path for leaf in new.adapted} | kept


def test_what_cannot_be_redistributed_is_refused():
    params = {"layers": jnp.ones((3, 4, 4)), "w": jnp.ones((4, 8))}

    def stacked(params, x):
        x, _ = jax.lax.scan(lambda h, w: (h @ w, None), x, params["layers"])
        return x @ params["w"]

    config = LoraConfig(
        r=2,
        init_lora_weights="eva",
        target_modules=["layers", "w"],
        output_slices={"w": [(0, 3), (4, 8)]},
    )
    found = plan(stacked, params, config, jnp.ones((2, 4)))
    with pytest.raises(ConfigError, match="(?s)rho: got 0.5.*layers: .*stacked.*w.*range"):
        eva_ranks(found, params, fn=stacked, batches=[], rho=0.5)


@pytest.mark.slow
def test_a_masked_covariance_is_that_of_the_sentences_alone():
    """PEFT's CorDA on every sentence without its padding, ours on padded ones."""
    ids, mask = padded()
    fields = FIELDS_HERE | dict(init_lora_weights="corda")
    config = peft.LoraConfig(**fields, corda_config=CordaConfig(corda_method="ipm"))
    lists = [ids[n : n + 1, :size] for n, size in enumerate(LENGTHS)]
    wrapped = run_corda(model(), config, lists)
    params = params_of(model())
    data = [(jnp.asarray(i[None]), jnp.asarray(m[None])) for i, m in zip(ids, mask, strict=True)]
    found = plan_of(params, init_lora_weights="corda")
    base, adapters = initialise(
        found, params, KEY, fn=fn, batches=data, mask=lambda ids, mask: mask
    )
    theirs = entries(wrapped, NAMES)
    for path, (a, b, w) in theirs.items():
        got = adapters[path]
        for one, other in zip(directions(got.a, got.b), directions(a, b), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(other).max())
        np.testing.assert_allclose(base[path], w, atol=1e-4)


@pytest.mark.parametrize("scaled", [False, True])
def test_masked_moments_of_stacked_layers_are_those_of_the_rows_that_count(scaled):
    rng = np.random.default_rng(5)
    params = {"layers": jnp.asarray(rng.normal(size=(3, 4, 4)) / 2, jnp.float32)}
    # below zero, where the largest that counts is below that of padding
    x = np.float32(rng.uniform(-3, -1, size=(2, 6, 4)))
    mask = rng.random((2, 6)) < 0.6

    def stacked(params, x, mask):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]

    batch = (jnp.asarray(x), jnp.asarray(mask))
    config = LoraConfig(r=3, init_lora_weights="eva", target_modules=["layers"])
    found = plan(stacked, params, config, *batch)
    for of in (stacked, jax.checkpoint(stacked)):
        seen = activations.moments(
            of, params, found.adapted, [batch], scaled=scaled, mask=lambda x, mask: mask
        )["layers"]
        rows = np.float64(x[mask])
        for k in range(3):
            unit = rows / abs(rows.max()) if scaled else rows
            np.testing.assert_allclose(seen.gram[k], unit.T @ unit, rtol=2e-5, atol=1e-5)
            weight = len(rows) if scaled else 1
            np.testing.assert_allclose(weight * seen.total[k], unit.sum(0), rtol=1e-4, atol=1e-5)
            assert seen.count[k] == pytest.approx(1 if scaled else len(rows))
            rows = np.tanh(rows @ np.float64(params["layers"][k]))


def test_a_mask_of_other_inputs_is_refused():
    params, (ids, mask) = params_of(model()), padded()
    data = [(jnp.asarray(ids), jnp.asarray(mask[:, :-1]))]
    message = r"q.weight: .*its inputs are \(4, 12\) vectors, and the mask is \(4, 11\)"
    with pytest.raises(PlanError, match=message):
        initialise(plan_of(params), params, KEY, fn=fn, batches=data, mask=lambda ids, mask: mask)
