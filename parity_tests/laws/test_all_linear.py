"""What ``all-linear`` cannot adapt: named, warned of, formed on request, and never nothing."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax import LoraConfig, lora, merge, plan
from lora_jax.core.errors import PlanError
from parity_tests.laws import laws, test_frameworks, test_laws
from parity_tests.models import third_party

D, F, L = 6, 4, 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, D)), jnp.float32)


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape) / 3, jnp.float32)


SCALE, MASK = jnp.linspace(0.5, 1.5, F), jnp.asarray(drawn(D, F) > 0)


def fake_quantised(w):
    """Rounded to steps, its gradient passed straight through."""
    step = jnp.max(jnp.abs(w), axis=0) / 7
    return w + lax.stop_gradient(jnp.clip(jnp.round(w / step), -7, 7) * step - w)


@jax.custom_vjp
def quantised_product(x, w):
    return x @ fake_quantised(w)


quantised_product.defvjp(
    lambda x, w: (quantised_product(x, w), (x, w)), lambda res, ct: (ct @ res[1].T, res[0].T @ ct)
)

# What models do to a weight on its way to the product; each has the path ``w``.
BEHIND = {
    "masked": lambda w, x: x @ (w * MASK.astype(w.dtype)),
    "scaled": lambda w, x: x @ (w * SCALE),
    "clipped": lambda w, x: x @ jnp.clip(w, -0.1, 0.1),
    "chosen": lambda w, x: x @ jnp.where(MASK, w, 0.0),
    "normed": lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0)),
    "fake_quantised": lambda w, x: x @ fake_quantised(w),
    "authors_product": lambda w, x: quantised_product(x, w),
    "lower_triangle": lambda w, x: x @ jnp.tril(w),
    "dropped": lambda w, x: x @ (w * jax.random.uniform(jax.random.key(0), w.shape)),
    "jitted": lambda w, x: jax.jit(lambda w: x @ jnp.sort(w))(w),
    "in_a_branch": lambda w, x: lax.cond(
        x.sum() > 0, lambda: x @ (w * MASK.astype(w.dtype)), lambda: x @ w
    ),
    "also_penalised": lambda w, x: x @ w + (w**2).sum(),
}
NAMED = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
FORMED = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", on_unsupported="materialize")


def beside(behind):
    """Return a model with one such weight and a plain one."""
    return lambda p, x: jnp.tanh(behind(p["w"], x)) @ p["plain"]


def test_what_is_left_out_is_named_and_warned_of_and_formed_on_request():
    params = {"plain": drawn(F, D), "w": drawn(D, F)}
    for name, behind in BEHIND.items():
        fn = beside(behind)
        with pytest.warns(UserWarning, match="all-linear.*leaves out") as caught:
            found = plan(fn, params, NAMED, X)
        assert [leaf.path for leaf in found.adapted] == ["plain"], name
        why = {leaf.path: leaf.why for leaf in found.leaves}["w"]
        assert why.startswith("no rule: ") and why in str(found), name
        assert f"w: {why.removeprefix('no rule: ')}" in str(caught[0].message), name
        found = plan(fn, params, FORMED, X)
        assert [leaf.path for leaf in found.adapted] == ["plain", "w"], name
        adapters = jax.tree.map(lambda leaf: jnp.ones(leaf.shape) / 4, found.abstract())
        got, wanted = lora(fn)(params, adapters, X), fn(merge(params, adapters), X)
        assert laws.relative(got, wanted) < 1e-5, name


def test_it_is_said_once_for_all_and_not_of_what_the_user_leaves_out():
    params = {f"w{n}": drawn(D, D) for n in range(40)} | {"plain": drawn(D, D)}

    def fn(p, x):
        for n in range(40):
            x = x @ jnp.sort(p[f"w{n}"])
        return x @ p["plain"]

    with pytest.warns(UserWarning) as caught:
        plan(fn, params, NAMED, X)
    (message,) = (str(one.message) for one in caught)
    assert "w0: sort" in message and "and 28 more" in message and "test_all_linear.py" in message
    for fields in (
        dict(exclude_modules=r"w\d+"),
        dict(modules_to_save=[f"w{n}" for n in range(40)]),
    ):
        config = LoraConfig(r=2, target_modules="all-linear", **fields)
        assert [leaf.path for leaf in plan(fn, params, config, X).adapted] == ["plain"]


def test_a_plan_that_adapts_nothing_is_an_error_with_every_reason():
    params = {"w": drawn(D, F), "embed": drawn(5, D), "score": drawn(F, 2), "spare": drawn(2, 2)}

    def fn(p, ids):
        return jnp.sum(p["embed"][ids] @ (p["w"] * SCALE), 0) @ p["score"]

    with pytest.raises(PlanError) as error:
        plan(fn, params, NAMED, jnp.array([1, 2]))
    for line in ("w: no rule: mul", "embed: an embedding", "score: output head", "spare: never"):
        assert line in str(error.value)
    with pytest.raises(PlanError, match="the parameters hold no matrix"):
        plan(lambda p, x: x * p["scale"], {"scale": jnp.ones(D)}, NAMED, X)


QUANTISED = {
    "scale_after": lambda p, x: (x @ p["q"].astype(x.dtype)) * p["scale"],
    "scale_before": lambda p, x: x @ (p["q"].astype(x.dtype) * p["scale"]),
    "zero_points": lambda p, x: x @ ((p["q"] - p["zero"]).astype(x.dtype) * p["scale"]),
    "packed": lambda p, x: x @ jnp.concatenate([p["q"] & 15, p["q"] >> 4], 0)[:D].astype(x.dtype),
}


def test_quantised_weights_are_named_whatever_holds_them():
    values = jnp.asarray(np.random.default_rng(2).integers(-7, 8, (D, F)))
    params = {"scale": SCALE, "zero": jnp.int8(1)}
    for dtype in (jnp.int8, jnp.int4):
        for name, fn in QUANTISED.items():
            if dtype == jnp.int4 and name in ("packed", "zero_points"):
                continue
            with pytest.raises(PlanError, match=f"q: no rule: its {jnp.dtype(dtype)} values"):
                plan(fn, params | {"q": values.astype(dtype)}, NAMED, X)
    both = lambda p, x: QUANTISED["scale_after"](p, x) @ p["plain"]  # noqa: E731
    with pytest.warns(UserWarning, match="q: its int8 values have no low-rank sum"):
        plan(both, params | {"q": values.astype(jnp.int8), "plain": drawn(F, D)}, FORMED, X)


# Matrices that are no weights: they meet the data element by element, or are looked up.
NO_WEIGHTS = {
    "stacked_scales": (
        (L, D),
        lambda e, x: lax.scan(lambda h, s: (h * s, None), x, e)[0],
    ),
    "stacked_biases": ((L, D), lambda e, x: lax.scan(lambda h, b: (h + b, None), x, e)[0]),
    "positions": ((2, D), lambda e, x: (x + e) * 2),
    "heads_scales": ((2, 3), lambda e, x: (x.reshape(2, 2, 3) * e).reshape(2, D)),
    "latents": ((2, D), lambda e, x: x + jax.nn.standardize(e) @ jnp.ones((D, D))),
    "mask": ((2, D), lambda e, x: jnp.where(e > 0, x, 0)),
}


def test_what_is_no_weight_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, (shape, use) in NO_WEIGHTS.items():
            fn = lambda p, x, use=use: use(p["e"], x) @ p["plain"]  # noqa: E731
            params = {"e": drawn(*shape), "plain": drawn(D, F)}
            found = plan(fn, params, NAMED, X)
            assert [leaf.path for leaf in found.adapted] == ["plain"], name
        ids = {"table": drawn(5, D), "buffer": jnp.array([[0, 3]]), "plain": drawn(D, F)}
        fn = lambda p, x: (x + p["table"][p["buffer"][0]]) @ p["plain"]  # noqa: E731
        assert [leaf.path for leaf in plan(fn, ids, NAMED, X).adapted] == ["plain"]


def test_what_a_weight_is_multiplied_with_is_none():
    """Learned queries are parameters, and data of the projection that the inputs meet, too."""
    params = {"q": drawn(2, D), "bias": drawn(2, D), "w": drawn(D, D)}
    fn = lambda p, x: (p["q"] + p["bias"]) @ p["w"] @ (x @ p["w"]).T  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = plan(fn, params, NAMED, X)
    assert [leaf.path for leaf in found.adapted] == ["w"]
    adapters = jax.tree.map(lambda leaf: jnp.ones(leaf.shape) / 4, found.abstract())
    got, wanted = lora(fn)(params, adapters, X), fn(merge(params, adapters), X)
    assert laws.relative(got, wanted) < 1e-5


MODELS = [*test_frameworks.SUBJECTS, *third_party.ALL]


@pytest.mark.parametrize(
    "subjects", [test_laws.SUBJECTS, pytest.param(MODELS, marks=pytest.mark.slow)]
)
def test_no_public_model_is_warned_of(subjects):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for subject in subjects:
            fn, params, args = subject.build(np.float32)
            try:
                plan(fn, params, NAMED, *args)
            except PlanError as error:  # of one convolution, embedding or product of weights
                assert "adapts nothing" in str(error) or str(subject) == "product_of_weights"
