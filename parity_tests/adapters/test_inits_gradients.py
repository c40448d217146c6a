"""LoRA-GA: every direction and scale of PEFT's."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import LoraGAConfig

from lora_jax import LoraConfig, plan
from lora_jax.adapters.inits import gradients
from lora_jax.core.initializers import fold_in_path
from parity_tests.laws.init_subjects import (
    FIELDS,
    KEY,
    directions,
    entries,
    fn,
    inputs,
    loss,
    model,
    ours,
    run_lora_ga,
)
from parity_tests.tiers import cases

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

BOTH = [*itertools.product(gradients.DIRECTIONS, gradients.SCALES)]

# Every direction once and every scale once; the others are slow.
QUICK = ("ArB2r-stable", "A2rBr-gd_scale", "ArBr-weight_svd", "random-unit")


def drawn(path, r):
    """Return the permutation that ``initialise`` draws for a weight."""
    own = jax.random.split(fold_in_path(KEY, path), 1)[0]
    return np.asarray(jax.random.permutation(own, 2 * r))


@pytest.mark.parametrize("case", cases(BOTH, quick=QUICK, name="-".join))
def test_a_b_and_the_base_are_pefts(case, monkeypatch):
    direction, scaling = case
    # PEFT draws for one module after the other; here it gets what was drawn for them
    queue = iter([drawn("up.weight", 2), drawn("down.weight", 3)])
    if direction == "random":
        monkeypatch.setattr(torch, "randperm", lambda n: torch.from_numpy(next(queue).copy()))
    own = LoraGAConfig(direction=direction, scale=scaling, stable_gamma=9)
    fields = dict(init_lora_weights="lora_ga")
    config = peft.LoraConfig(**FIELDS | fields, lora_ga_config=own)
    theirs = entries(run_lora_ga(model(), config, inputs()))
    options = dict(direction=direction, scaling=scaling, stable_gamma=9)
    _, params, base, adapters = ours(fields, inputs(), **options)
    assert direction != "random" or next(queue, None) is None
    # the randomised SVD of the weight's largest singular value alone is not exact
    rtol = 1e-2 if scaling == "weight_svd" else 2e-5
    for path, (a, b, w) in theirs.items():
        mine = adapters[path]
        assert a.any() and b.any() and not np.array_equal(base[path], params[path])
        same_directions = direction == "random"
        pairs = zip(directions(mine.a, mine.b), directions(a, b), strict=True)
        for got, wanted in list(pairs)[0 if same_directions else 1 :]:
            np.testing.assert_allclose(got, wanted, atol=rtol * np.abs(wanted).max())
        if same_directions:  # the signs of A and B cancel
            np.testing.assert_allclose(base[path], w, atol=rtol * np.abs(w).max())


@functools.cache
def gradient():
    found, params, _, _ = ours(dict(init_lora_weights="pissa"))
    data = [(jnp.asarray(x),) for x in inputs()]
    return gradients.mean_gradients(loss, params, data, {"up.weight"})["up.weight"].T


def test_the_scales_by_hand():
    """B of the first direction over its singular value, for a scale of 5/2 and 10 outputs."""
    g, w = gradient(), jnp.asarray(model().up.weight.detach().numpy().T)
    s, largest = np.linalg.svd(g)[1], np.linalg.norm(w, 2)
    wanted = {
        "stable": (10**0.25 / 4, 1),
        "weight_svd": (largest / s[2], 1),
        "gd_scale": (0.4, 0.4),
        "unit": (1, 1),
    }
    assert wanted.keys() == set(gradients.SCALES)
    for scaling, (of_b, of_a) in wanted.items():
        a, b = gradients.lora_ga(w, g, 2, 2.5, scaling=scaling)
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), of_a, rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(b, axis=1), of_b * s[2:4], rtol=1e-4)


def test_the_plan_of_the_subject_is_what_the_cases_say():
    _, params, _, _ = ours(dict(init_lora_weights="pissa"))
    found = plan(fn, params, LoraConfig(**FIELDS), jnp.ones((2, 8)))
    assert {leaf.path: leaf.r for leaf in found.adapted} == {"up.weight": 2, "down.weight": 3}
