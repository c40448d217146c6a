"""Weighted combinations against PEFT's ``add_weighted_adapter``, run on the same numbers."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from lora_jax import Adapter, Full
from lora_jax.adapters.combine import (
    CAT,
    COMBINATIONS,
    clamped,
    combination_error,
    combine,
    keep_mask,
)
from lora_jax.core.delta import delta
from lora_jax.core.errors import AdapterError
from lora_jax.core.initializers import fold_in_path
from parity_tests.parity.oracle import UNIT_ROUNDOFF, Vacuous, assert_within_rule, rel_l2

U = UNIT_ROUNDOFF["float32"]
KEY = jax.random.key(7)
DENSITY = 0.6
TYPES = [CAT, *COMBINATIONS]
# The in and out of a linear layer, the vocabulary and dimension of an embedding.
SIZE = (13, 10)
NAMES = ("embed", "linear")
WEIGHTS = {"positive": (0.7, 0.4, 1.3), "negative": (0.7, -0.3, -1.1)}
RANKS = {True: (4, 4, 4), False: (2, 4, 3)}
ALPHAS = (6, 5, 3)


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(*SIZE)
        self.linear = torch.nn.Linear(*SIZE, bias=False)


def build(same_rank, use_rslora=False, dtype=torch.float32):
    """A PEFT model with three adapters, the third without ``embed``; and the same as ours."""
    torch.manual_seed(0)
    model, trees = None, []
    for n, (r, alpha) in enumerate(zip(RANKS[same_rank], ALPHAS, strict=True)):
        names = list(NAMES[n == 2 :])
        config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=names, use_rslora=use_rslora)
        if model is None:
            model = peft.PeftModel(Tiny().to(dtype), config, adapter_name="0")
        else:
            model.add_adapter(str(n), config)
        tree = {}
        for name in names:
            for half in halves(model, name, str(n)):
                half.data = torch.randn_like(half)
            a, b = (half.data.numpy().T for half in halves(model, name, str(n)))
            scale = layer(model, name).scaling[str(n)]
            tree[name] = Adapter(jnp.asarray(a), jnp.asarray(b), scale, axes_of(name))
        trees.append(tree)
    return model, trees


def axes_of(name):
    return "io" if name == "embed" else "oi"


def layer(model, name):
    return getattr(model.base_model.model, name)


def halves(model, name, adapter):
    one = layer(model, name)
    if name == "embed":
        return one.lora_embedding_A[adapter], one.lora_embedding_B[adapter]
    return one.lora_A[adapter].weight, one.lora_B[adapter].weight


def theirs(model, weights, kind, **options):
    if kind in COMBINATIONS and not COMBINATIONS[kind].prune:
        options.pop("density", None)
    names = [str(n) for n in range(len(weights))]
    model.base_model.add_weighted_adapter(names, list(weights), "new", kind, **options)
    return {
        name: [half.detach().numpy().T for half in halves(model, name, "new")] for name in NAMES
    }


@pytest.fixture
def masks(monkeypatch):
    """Make PEFT draw our masks, in its order: for each module, A's then B's, or the deltas'."""

    def inject(kind, trees):
        parts = ("delta",) if COMBINATIONS[kind].on_delta else ("a", "b")
        found = []
        # PEFT goes through the modules in the model's order.
        for name in NAMES:
            own = fold_in_path(KEY, name)
            holders = [tree[name] for tree in trees if name in tree]
            for part, (k, one) in itertools.product(parts, enumerate(holders)):
                shape = {"a": one.a.shape, "b": one.b.shape}.get(part)
                shape = shape or (one.a.shape[0], one.b.shape[1])
                found.append(np.asarray(keep_mask(own, k, part, DENSITY, (1, *shape)))[0])
        queue = iter(found)

        def bernoulli(p):
            mask = next(queue)
            # An embedding's delta is (vocabulary, dimension), as ours; all else is transposed.
            mask = mask if mask.shape == tuple(p.shape) else mask.T
            assert mask.shape == tuple(p.shape)
            return torch.tensor(np.ascontiguousarray(mask), dtype=p.dtype)

        monkeypatch.setattr(torch, "bernoulli", bernoulli)
        return queue

    return inject


def exact_terms(trees, weights, name):
    return [
        w * tree[name].scale * (np.float64(tree[name].a) @ np.float64(tree[name].b))
        for w, tree in zip(weights, trees, strict=True)
        if name in tree
    ]


@pytest.mark.parametrize("sign", WEIGHTS)
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_gives_pefts_deltas(kind, sign, masks):
    weights = WEIGHTS[sign]
    on_factors = kind in COMBINATIONS and not COMBINATIONS[kind].on_delta
    model, trees = build(same_rank=on_factors)
    options = {"density": DENSITY} if kind in COMBINATIONS and COMBINATIONS[kind].prune else {}
    ours = combine(trees, weights, kind, key=KEY, **options)
    queue = masks(kind, trees) if "dare" in kind else iter(())
    reference = theirs(model, weights, kind, **options)
    assert next(queue, None) is None
    for name, (a, b) in reference.items():
        got, wanted = np.asarray(ours[name].a @ ours[name].b), a @ b
        assert ours[name].scale == 1.0 and np.linalg.norm(wanted) > 0.1
        # Both round differently by a few units in the last place of the largest term.
        size = sum(map(np.linalg.norm, exact_terms(trees, weights, name)))
        assert np.linalg.norm(got - wanted) <= 40 * U * size, name


@pytest.mark.parametrize("kind", ["cat", "linear", "ties", "dare_linear", "dare_ties"])
def test_a_and_b_are_pefts_themselves_where_nothing_is_decomposed(kind, masks):
    weights = WEIGHTS["negative"]
    model, trees = build(same_rank=True)
    options = (
        {"density": DENSITY} if COMBINATIONS.get(kind) not in (None, COMBINATIONS["linear"]) else {}
    )
    if "dare" in kind:
        masks(kind, trees)
    ours = combine(trees, weights, kind, key=KEY, **options)
    for name, (a, b) in theirs(model, weights, kind, **options).items():
        r = ours[name].a.shape[1]
        np.testing.assert_allclose(ours[name].a, a[:, :r], rtol=4e-7, atol=1e-7)
        np.testing.assert_allclose(ours[name].b, b[:r], rtol=4e-7, atol=1e-7)
        # PEFT pads to the sum of the ranks where an adapter lacks the module.
        assert not a[:, r:].any() and not b[r:].any()


def test_a_and_b_of_the_svd_are_pefts_up_to_signs():
    weights, rank = WEIGHTS["negative"], 3
    model, trees = build(same_rank=False)
    ours = combine(trees, weights, "svd", svd_rank=rank)
    for name, (a, b) in theirs(model, weights, "svd", svd_rank=rank).items():
        signs = np.sign(np.sum(np.asarray(ours[name].a) * a, axis=0))
        np.testing.assert_allclose(ours[name].a * signs, a, atol=3e-5)
        np.testing.assert_allclose(ours[name].b * signs[:, None], b, rtol=1e-4, atol=3e-4)


def test_the_svd_is_clamped_as_pefts():
    weights, options = WEIGHTS["positive"], {"svd_rank": 2}
    plain = theirs(build(same_rank=False)[0], weights, "svd", **options)
    model, trees = build(same_rank=False)
    ours = combine(trees, weights, "svd", svd_clamp=0.8, **options)
    unclamped = combine(trees, weights, "svd", **options)
    for name, halves_of in theirs(model, weights, "svd", svd_clamp=0.8, **options).items():
        # The quantile is one of signed values, so it depends on the signs that an SVD chose.
        pair = tuple(jnp.asarray(half)[None] for half in plain[name])
        for half, wanted in zip(clamped(pair, 0.8), halves_of, strict=True):
            np.testing.assert_allclose(half[0], wanted, rtol=1e-6)
        # A of an SVD is small; it is B that is cut.
        assert (np.abs(halves_of[1]) == np.abs(halves_of[1]).max()).sum() > 1
        own = unclamped[name]
        a, b = clamped((own.a[None], own.b[None]), 0.8)
        np.testing.assert_array_equal(ours[name].a, a[0])
        np.testing.assert_array_equal(ours[name].b, b[0])


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["ties", "ties_svd"])
def test_both_ways_to_elect_a_sign_are_pefts(kind, method):
    weights = WEIGHTS["negative"]
    model, trees = build(same_rank=True)
    options = dict(density=DENSITY, majority_sign_method=method)
    ours = combine(trees, weights, kind, **options)
    other = {"total": "frequency", "frequency": "total"}[method]
    differing = combine(trees, weights, kind, density=DENSITY, majority_sign_method=other)
    for name, (a, b) in theirs(model, weights, kind, **options).items():
        assert rel_l2(np.asarray(ours[name].a @ ours[name].b), np.float64(a) @ b) < 1e-5
        assert rel_l2(np.asarray(differing[name].a @ differing[name].b), np.float64(a) @ b) > 1e-2


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_cat_and_svd_are_as_close_to_the_weighted_sum_as_pefts(kind):
    weights = WEIGHTS["negative"]
    model, trees = build(same_rank=False)
    options = {"svd_rank": 9} if kind == "svd" else {}
    ours = combine(trees, weights, kind, **options)
    for name, (a, b) in theirs(model, weights, kind, **options).items():
        terms = exact_terms(trees, weights, name)
        truth = sum(terms)
        cond = sum(map(np.linalg.norm, terms)) / np.linalg.norm(truth)
        got = np.asarray(ours[name].a @ ours[name].b)
        assert_within_rule(got, a @ b, truth, cond, 4 * U, name)


def test_linear_is_as_far_off_as_its_report_says():
    weights = WEIGHTS["negative"]
    _, trees = build(same_rank=True)
    combined = combine(trees, weights, "linear")
    errors = combination_error(trees, weights, combined)
    for name, error in errors.items():
        truth = sum(exact_terms(trees, weights, name))
        got = np.asarray(combined[name].a, np.float64) @ np.asarray(combined[name].b)
        assert error == pytest.approx(rel_l2(got, truth), rel=1e-4) and error > 0.5
    exact = combination_error(trees, weights, combine(trees, weights, "cat"))
    assert max(exact.values()) < 1e-6


def test_one_adapter_alone_is_combined_linearly_as_in_peft():
    model, trees = build(same_rank=False)
    ours = combine(trees[:1], [-0.3], "svd")
    for name, (a, b) in theirs(model, [-0.3], "svd").items():
        np.testing.assert_allclose(ours[name].a, a, rtol=4e-7)
        np.testing.assert_allclose(ours[name].b, b, rtol=4e-7)


def test_pefts_result_is_too_large_with_rslora_and_ours_is_not():
    weights = (1.0, 1.0, 1.0)
    model, trees = build(same_rank=False, use_rslora=True)
    ours = combine(trees, weights, "svd", svd_rank=9)
    theirs(model, weights, "svd", svd_rank=9)
    wanted = sum(exact_terms(trees, weights, "linear"))
    served = layer(model, "linear").get_delta_weight("new").detach().numpy().T
    assert rel_l2(np.asarray(ours["linear"].a @ ours["linear"].b), wanted) < 1e-6
    assert rel_l2(served, 3 * wanted) < 1e-6  # √9


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_without_pruning_dare_is_what_is_left_of_it(kind):
    _, trees = build(same_rank=True)
    plain = {"dare_linear": "linear", "dare_linear_svd": "svd"}.get(
        kind, kind.removeprefix("dare_")
    )
    options = {"density": 1.0} if "ties" in plain else {}
    ours = combine(trees, WEIGHTS["positive"], kind, density=1.0, key=KEY)
    for name, wanted in combine(trees, WEIGHTS["positive"], plain, **options).items():
        assert rel_l2(np.asarray(delta(ours[name])), np.float64(delta(wanted))) < 1e-5


def test_dare_keeps_the_share_and_the_mean():
    ones = {"w": Adapter(jnp.ones((200, 50)), jnp.ones((50, 3)), 1.0)}
    keys = jax.random.split(KEY, 2)
    one, two = (combine([ones, ones], [1.0, 1.0], "dare_linear", density=0.25, key=k) for k in keys)
    values, counts = np.unique(np.asarray(one["w"].a), return_counts=True)
    np.testing.assert_allclose(values, [0, 4, 8])
    # 10,000 draws of two: 6 standard deviations.
    np.testing.assert_allclose(counts / 1e4, [0.5625, 0.375, 0.0625], atol=0.03)
    assert (one["w"].a != two["w"].a).any()
    again = combine([ones, ones], [1.0, 1.0], "dare_linear", density=0.25, key=keys[0])
    assert (one["w"].a == again["w"].a).all()


@pytest.mark.parametrize("kind", TYPES)
def test_stacked_and_split_axes_are_combined_one_by_one(kind):
    rng = np.random.default_rng(1)
    axes, stacked, fan_in, out, r = "sioo", 3, 13, (2, 5), 4

    def draw():
        a, b = rng.normal(size=(stacked, fan_in, r)), rng.normal(size=(stacked, r, *out))
        return Adapter(jnp.float32(a), jnp.float32(b), 0.5, axes)

    trees = [{"w": draw()}, {"w": draw()}]
    # A random mask is drawn for the whole; without one, each layer is a module of its own.
    options = {"density": 1.0 if "dare" in kind else DENSITY, "key": KEY}
    got = np.asarray(delta(combine(trees, [0.8, -0.5], kind, **options)["w"]))
    for n in range(stacked):
        layers = [{"w": Adapter(t["w"].a[n], t["w"].b[n].reshape(r, -1), 0.5, "io")} for t in trees]
        wanted = delta(combine(layers, [0.8, -0.5], kind, **options)["w"])
        assert rel_l2(got[n].reshape(fan_in, -1), np.float64(wanted)) < 1e-5


def test_what_cannot_be_combined_is_listed_at_once():
    one = {"w": Adapter(jnp.ones((3, 2)), jnp.ones((2, 4)), 1.0), "c": Full(jnp.ones(3))}
    two = {
        "w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 5)), 1.0),
        "v": Adapter(jnp.ones((3, 1)), jnp.ones((1, 5)), None),
    }
    with pytest.raises(AdapterError) as raised:
        combine([one, two], [1.0], "dare_ties", majority_sign_method="loudest")
    said = str(raised.value)
    for part in ("weights", "density", "key", "loudest", "c: trained in full", "v: scale got None"):
        assert part in said
    assert "w: shape" in said and "w: rank" in said
    with pytest.raises(AdapterError, match="'tie'.*wanted one of cat, dare_linear"):
        combine([two, two], [1.0, 1.0], "tie")
    with pytest.raises(AdapterError, match="adapters: got none"):
        combine([], [])


def test_a_comparison_with_zero_would_be_vacuous():
    _, trees = build(same_rank=True)
    zero = {k: Adapter(v.a, v.b * 0, v.scale, v.axes) for k, v in trees[0].items()}
    assert all(np.linalg.norm(delta(one)) for tree in trees for one in tree.values())
    with pytest.raises(Vacuous):
        assert_within_rule(*[np.zeros((2, 2))] * 3, 1.0, U)
    assert combination_error([zero, zero], [1.0, 1.0], zero)["linear"] == 0.0


@pytest.mark.parametrize("kind", ["cat", "linear", "ties", "svd", "ties_svd"])
def test_bfloat16_is_combined_in_float32_and_rounded_once(kind):
    _, trees = build(same_rank=True)
    small = [jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree) for tree in trees]
    wide = [jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree) for tree in small]
    options = {"density": DENSITY} if "ties" in kind else {}
    with jax.numpy_dtype_promotion("strict"):
        got, wanted = (combine(t, WEIGHTS["negative"], kind, **options) for t in (small, wide))
    for name, one in wanted.items():
        assert got[name].a.dtype == got[name].b.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got[name].a, one.a.astype(jnp.bfloat16))
        np.testing.assert_array_equal(got[name].b, one.b.astype(jnp.bfloat16))
