"""Initialisations that read weights, data or gradients: PEFT's values, and files for PEFT."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig

from lora_jax import load_pretrained, lora, relative_to, save_pretrained
from lora_jax.core.errors import AdapterError
from parity_tests.laws.init_subjects import (
    FIELDS,
    directions,
    entries,
    fn,
    inputs,
    model,
    ours,
    run_corda,
    run_eva,
    run_lora_ga,
    run_weights,
)
from parity_tests.parity.oracle import rel_l2
from parity_tests.tiers import cases

pytestmark = [
    # PEFT's conversion cannot keep these scales; `relative_to` does
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]

UNIT = 2.0**-24


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
    "lora_ga weight_svd": ga("ArB2r", "weight_svd"),
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
    return mine, entries(wrapped)


@functools.cache
def smallest_directions():
    """Return, by path, how far apart two float32 runs of CorDA's smallest directions may be.

    ``A = C⁻¹·U_i`` has the error of the inverse, ``u·κ(C)``, and U and V, the singular vectors of
    ``C·W``, that of a direction of which another is near, ``u·σ₁/gap``; a sum of n roundings that
    are independent has ``√n`` of them, and there are two runs.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, chapters 2.8 and 14.1; Stewart
    and Sun, Matrix Perturbation Theory, chapter V.
    """
    params = {k: np.float64(v.detach().numpy()) for k, v in model().state_dict().items()}
    first = [np.float64(x) for x in inputs()]
    second = [np.tanh(x @ params["up.weight"].T + params["up.bias"]) for x in first]
    found = {}
    for path, batches in (("up.weight", first), ("down.weight", second)):
        r = FIELDS["rank_pattern"].get(path.removesuffix(".weight"), FIELDS["r"])
        scaled = [x / np.abs(x.max()) for x in batches]
        c = np.mean([x.T @ x / len(x) for x in scaled], axis=0)
        c += 0.01 * np.diag(c).mean() * np.eye(len(c))
        s = np.linalg.svd(c @ params[path].T, compute_uv=False)
        gap = np.abs(np.diff(s[-r - 1 :])).min()
        amplified = np.linalg.cond(c) + s[0] / gap
        found[path] = 2 * np.sqrt(len(c)) * UNIT * amplified
    return found


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
        own = {"corda kpm": smallest_directions}.get(name, dict)().get(path)
        apart = tolerance if own is None else dict(rtol=0, atol=own)
        for got, wanted in pairs:
            np.testing.assert_allclose(got / size**2, wanted / size**2, **apart)
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
        # PEFT starts MiCA on no float64 base, so the truth is widened when it is read.
        peft.PeftModel.from_pretrained(model(), tmp_path / "ours").to(dtype)
        for dtype in (torch.float32, torch.float64)
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
