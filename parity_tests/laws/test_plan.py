"""Planning: PEFT's pattern semantics, the table, and an error for everything without effect."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from lora_jax import Adapter, Full, LoraConfig, lora, merge, plan
from lora_jax.adapters.inits import initialise
from lora_jax.core.adapter import count
from lora_jax.core.errors import AdapterError, ConfigError, PlanError
from parity_tests.laws import subjects

X = jnp.ones((3, 6))
PARAMS = {
    "embed": {"embedding": jnp.ones((9, 6))},
    "layers": {
        "0": {"attn": {"query": {"kernel": jnp.ones((6, 6)), "bias": jnp.ones(6)}}},
        "1": {"attn": {"query": {"kernel": jnp.ones((6, 6)), "bias": jnp.ones(6)}}},
    },
    "norm": {"scale": jnp.ones(6)},
    "score": {"kernel": jnp.ones((6, 2))},
    "spare": {"kernel": jnp.ones((6, 6))},
}


def model(params, x):
    x = x + jnp.take(params["embed"]["embedding"], jnp.array([0, 1, 2]), axis=0)
    for layer in params["layers"].values():
        query = layer["attn"]["query"]
        x = jnp.tanh(x @ query["kernel"] + query["bias"]) * params["norm"]["scale"]
    return x @ params["score"]["kernel"]


def adapted(**fields):
    return [leaf.path for leaf in plan(model, PARAMS, LoraConfig(**fields), X).adapted]


def test_targets_by_suffix_regex_and_all_linear():
    both = ["layers.0.attn.query.kernel", "layers.1.attn.query.kernel"]
    assert adapted(target_modules=["query"]) == both
    assert adapted(target_modules=["attn.query"]) == both
    assert adapted(target_modules=["layers.1.attn.query"]) == both[1:]
    assert adapted(target_modules=r"layers\.0\..*") == both[:1]
    assert adapted(target_modules="all-linear") == both
    assert adapted(target_modules=["query"], exclude_modules=["layers.0.attn.query"]) == both[1:]
    assert adapted(target_modules=["query", "score"], modules_to_save=["score"]) == both


@pytest.mark.parametrize(
    "fields, names",
    [
        (dict(target_modules=["quary"]), ["target_modules", "quary", "query"]),
        (dict(target_modules=["query", "nope"]), ["target_modules", "nope"]),
        (dict(target_modules=r".*\.quer"), ["target_modules", "quer"]),
        (dict(target_modules=["query"], exclude_modules=["nope"]), ["exclude_modules", "nope"]),
        (dict(target_modules=["query"], modules_to_save=["nope"]), ["modules_to_save", "nope"]),
        (dict(target_modules=["query"], rank_pattern={"nope": 2}), ["rank_pattern", "nope"]),
        (dict(target_modules=["query"], alpha_pattern={"nope": 2}), ["alpha_pattern", "nope"]),
        (
            dict(target_modules=["query"], output_slices={"nope": [(0, 2)], "query": [(0, 1)]}),
            ["output_slices: got 'nope'"],
        ),
        (
            dict(target_modules=["query"], output_slices={"score": [(0, 2)]}),
            ["output_slices: got 'score'"],
        ),
        (dict(target_modules=["query"], on_unsupported=["nope"]), ["on_unsupported", "nope"]),
        (dict(target_modules=["norm"]), ["target_modules", "norm"]),
        (dict(target_modules=None), ["target_modules is not set", "layers.0.attn.query"]),
        (dict(target_modules=["spare"]), ["spare.kernel", "never uses"]),
        (dict(target_modules=["query"], init_lora_weights="magic"), ["magic", "gaussian"]),
        (
            dict(target_modules=["query"], init_lora_weights="orthogonal", r=3),
            ["layers.0.attn.query.kernel", "layers.1.attn.query.kernel", "even"],
        ),
    ],
)
def test_what_has_no_effect_is_an_error_that_names_it(fields, names):
    with pytest.raises((PlanError, ConfigError)) as error:
        plan(model, PARAMS, LoraConfig(**fields), X)
    for name in names:
        assert name in str(error.value)


def test_config_lists_every_bad_field():
    with pytest.raises(ConfigError) as error:
        LoraConfig(
            r=0,
            lora_alpha=float("nan"),
            lora_dropout=1.0,
            bias="some",
            rank_pattern={"q": 0, "(": 2},
            target_modules="(",
            modules_to_save="score",
        )
    for name in ("r:", "lora_alpha", "lora_dropout", "bias", "rank_pattern['q']", "'('", "score"):
        assert name in str(error.value)


def test_scale_rank_patterns_and_totals():
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["query"],
        rank_pattern={r"layers\.1\.attn\.query": 2},
        alpha_pattern={"query": 10},
        modules_to_save=["score"],
        bias="lora_only",
    )
    found = plan(model, PARAMS, config, X)
    assert [(leaf.r, leaf.scale) for leaf in found.adapted] == [(4, 5.0), (2, 10 / np.sqrt(2))]
    assert found.trainable == 4 * 12 + 2 * 12 + 12 + 2 * 6
    adapters = found.init(jax.random.key(0))
    assert count(adapters) == found.trainable
    full = {path for path, leaf in adapters.items() if isinstance(leaf, Full)}
    biases = {f"layers.{n}.attn.query.bias" for n in (0, 1)}
    assert full == biases | {"score.kernel"}
    table = str(found)
    for leaf in found.leaves:
        assert leaf.path in table and leaf.why in table
    for word in ("(6, 4)", "(2, 6)", "sites", f"trainable {found.trainable:,}", "targeted", "base"):
        assert word in table


def test_bias_all_trains_every_bias():
    config = LoraConfig(target_modules=["layers.0.attn.query"], bias="all")
    found = plan(model, PARAMS, config, X)
    assert set(found.full) == {f"layers.{n}.attn.query.bias" for n in (0, 1)}


def test_a_parameter_draws_the_same_whatever_else_is_adapted():
    one = plan(model, PARAMS, LoraConfig(target_modules=["layers.1.attn.query"]), X)
    two = plan(model, PARAMS, LoraConfig(target_modules=["query"]), X)
    path, key = "layers.1.attn.query.kernel", jax.random.key(3)
    np.testing.assert_array_equal(one.init(key)[path].a, two.init(key)[path].a)


def test_leaves_trained_in_full_are_copies():
    config = LoraConfig(target_modules=["query"], modules_to_save=["score"])
    adapters = plan(model, PARAMS, config, X).init(jax.random.key(0))
    value = adapters["score.kernel"].value
    assert value.unsafe_buffer_pointer() != PARAMS["score"]["kernel"].unsafe_buffer_pointer()


def test_abstract_parameters_plan_without_computing():
    shapes = jax.eval_shape(lambda: PARAMS)
    config = LoraConfig(target_modules=["query"])
    found = plan(model, shapes, config, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert found.leaves == plan(model, PARAMS, config, X).leaves


# Uses that this registry has no rule for: each is named with path and primitive.
LOUD = {
    "plus_data": (lambda p, x: x @ (p["w"] + x[:1].T), "the data is added"),
    "part_of_a_row": (
        lambda p, x: x[0, 0] * p["w"][jnp.array([0, 2]), jnp.array([1, 1])],
        "gather",
    ),
    "sorted": (lambda p, x: x @ jnp.sort(p["w"]), "sort"),
    "chosen": (
        lambda p, x: x @ jax.lax.cond(x.sum() > 0, lambda: p["w"], lambda: 2 * p["w"]),
        "a branch returns the weight",
    ),
    "one_row": (lambda p, x: (x @ p["w"]) * p["w"][2], "one by one"),
    "returned": (lambda p, x: (x @ p["w"], p["w"]), "returns it"),
    "mixed_merge": (lambda p, x: p["w"].reshape(36)[None] * x[0, 0] * jnp.ones(36), "mul"),
    "looped": (
        lambda p, x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: 2 * c, p["w"]),
        "the loop changes the weight",
    ),
    "scanned_the_wrong_way": (
        lambda p, x: (x @ p["w"], jax.lax.scan(lambda c, w: (c + w, None), x[0], p["w"])[0]),
        "add",
    ),
    "part_of_an_axis": (
        lambda p, x: jnp.einsum("bk,hkd->bhd", x[:, :3], p["w"].reshape(2, 3, 6)),
        "only a part of axis 0",
    ),
    "two_uses": (lambda p, x: jnp.einsum("bd,bdf->bf", x, p["w"][None] + 0 * x[:, :, None]), "add"),
}


@pytest.mark.parametrize("name", LOUD)
def test_a_use_without_a_rule_names_path_and_primitive(name):
    fn, word = LOUD[name]
    params, x = {"w": jnp.eye(6)}, jnp.ones((4, 6))
    with pytest.raises(PlanError) as error:
        plan(fn, params, LoraConfig(r=2, target_modules=["w"]), x)
    assert "w: " in str(error.value) and word in str(error.value)
    adapters = {"w": Adapter(jnp.ones((6, 2)), jnp.ones((2, 6)), 1.0)}
    with pytest.raises(PlanError) as error:
        lora(fn)(params, adapters, x)
    assert "w: " in str(error.value)


@pytest.mark.parametrize("name", LOUD)
def test_materialize_gives_the_merged_models_outputs_and_says_so(name):
    fn, _ = LOUD[name]
    rng = np.random.default_rng(0)
    params, x = {"w": jnp.asarray(rng.normal(size=(6, 6)) / 3, jnp.float32)}, jnp.ones((4, 6))
    config = LoraConfig(r=2, target_modules=["w"], on_unsupported="materialize")
    found = plan(fn, params, config, x)
    assert "W + AB is formed: " in str(found)
    a, b = (jnp.asarray(rng.normal(size=s) / 3, jnp.float32) for s in ((6, 2), (2, 6)))
    adapters = {"w": found.adapted[0].adapter(a, b)}
    got, wanted = lora(fn)(params, adapters, x), fn(merge(params, adapters), x)
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_materialize_can_be_allowed_for_some_modules_alone():
    def fn(params, x):
        return x @ jnp.sort(params["layer_0"]["w"]) @ jnp.sort(params["layer_1"]["w"])

    params = {f"layer_{n}": {"w": jnp.eye(6)} for n in (0, 1)}
    config = LoraConfig(target_modules=["layer_0", "layer_1"], on_unsupported=["layer_1"])
    with pytest.raises(PlanError) as error:
        plan(fn, params, config, X)
    assert "layer_0.w: sort" in str(error.value).replace("/", ".")
    assert "layer_1" not in str(error.value)
    assert "test_plan.py:" in str(error.value), "the author's line"
    found = plan(fn, params, dataclasses.replace(config, on_unsupported=r"layer_\d"), X)
    assert all(leaf.materialized for leaf in found.adapted)


def test_a_target_that_the_call_does_not_reach_is_refused_before_it():
    params = {"text": {"q": jnp.eye(6)}, "vision": {"q": jnp.eye(6)}, "seen": {"q": jnp.eye(6)}}

    def fn(p, x):
        p["seen"]["q"].T.reshape(36)  # of no use
        return x @ p["text"]["q"]

    for formed in ("error", "materialize", ["q"]):
        config = LoraConfig(target_modules=["q"], on_unsupported=formed)
        with pytest.raises(PlanError) as error:
            plan(fn, params, config, X)
        for path in ("vision.q", "seen.q"):
            assert f"{path}: the function never uses it" in str(error.value)
        assert "text.q" not in str(error.value)
    assert plan(fn, params, dataclasses.replace(config, target_modules=["text.q"]), X).adapted


def test_every_bad_target_is_listed_at_once():
    params = {"u": jnp.eye(6), "v": jnp.eye(6), "w": jnp.eye(6)}
    config = LoraConfig(target_modules=["u", "v", "w"])
    with pytest.raises(PlanError) as error:
        plan(
            lambda p, x: (
                x @ jnp.exp(p["u"]) @ p["v"].sum(0, keepdims=True).T @ jnp.sort(p["w"])[:1]
            ),
            params,
            config,
            X,
        )
    assert all(f"{path}: " in str(error.value) for path in params)


def test_conflicting_uses_of_one_weight_are_an_error():
    def both(p, x):
        return jnp.einsum("bd,dfg->bfg", x, p["w"]), jnp.einsum("bd,bdf->bf", x, p["w"])

    with pytest.raises(PlanError, match="used with axes"):
        plan(both, {"w": jnp.ones((6, 6, 6))}, LoraConfig(target_modules=["w"]), jnp.ones((6, 6)))


def test_lora_lists_adapters_that_do_not_fit_or_are_never_applied():
    params = {"w": jnp.eye(6), "unused": jnp.eye(6)}
    fit = Adapter(jnp.ones((6, 2)), jnp.ones((2, 6)), 1.0)
    wrong = Adapter(jnp.ones((5, 2)), jnp.ones((2, 7)), 1.0)
    fn = lora(lambda p, x: x @ p["w"])
    with pytest.raises(AdapterError, match=r"unused: no product uses it"):
        fn(params, {"w": fit, "unused": fit}, X)
    with pytest.raises(AdapterError) as error:
        fn(params, {"w": wrong, "nope": fit, "unused": Full(jnp.ones(3))}, X)
    for text in ("w: A got (5, 2), wanted (6, 2)", "B got (2, 7)", "nope: no such", "(3,)"):
        assert text in str(error.value)
    with pytest.raises(AdapterError, match="w: A got"):
        merge(params, {"w": wrong})
    for axes in ("i", "xx", "ss"):
        with pytest.raises(AdapterError):
            fn(params, {"w": Adapter(jnp.ones((6, 2)), jnp.ones((2, 6)), 1.0, axes=axes)}, X)
    square = Adapter(jnp.ones((6, 2)), jnp.ones((2, 6)), 1.0, axes="oi")
    fn(params, {"w": square}, X)  # in and out exchanged is another orientation of the same pair
    stacked = Adapter(jnp.ones((6, 6, 2)), jnp.ones((6, 2, 6)), 1.0, axes="sio")
    with pytest.raises(PlanError, match="used with axes 'ioo'"):
        lora(lambda p, x: jnp.einsum("bd,dfg->bfg", x, p["w"]))(
            {"w": jnp.ones((6, 6, 6))}, {"w": stacked}, X
        )


class Mlp(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.relu(linen.Dense(7)(x))
        return linen.DenseGeneral((3, 5))(x)


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 7, rngs=rngs), nnx.Linear(7, 5, rngs=rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def test_linen_modules_unmodified():
    module = Mlp()
    variables = module.init(jax.random.key(0), X)
    config = LoraConfig(target_modules=["Dense_0", "DenseGeneral_0"], lora_alpha=16, r=2)
    found = plan(module.apply, variables, config, X, train=False)
    assert sorted(leaf.axes for leaf in found.adapted) == ["io", "ioo"]
    check_merge(module.apply, variables, found)


def test_nnx_modules_unmodified():
    graph, state = nnx.split(NnxMlp(nnx.Rngs(0)))

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    found = plan(apply, state, LoraConfig(target_modules=["layers.1"], r=2), X)
    assert [leaf.path for leaf in found.adapted] == ["layers.1.kernel"]
    check_merge(apply, state, found)


def check_merge(fn, params, found):
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), found.abstract()
    )
    got, wanted = lora(fn)(params, adapters, X), fn(merge(params, adapters), X)
    assert np.linalg.norm(got - fn(params, X)) > 1e-2
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_static_arguments_and_outputs_stay_python_values():
    def fn(params, x, mode, scale=2):
        assert mode == "train" and isinstance(scale, int)
        return {"y": scale * (x @ params["w"]), "mode": mode, "none": None, "n": 3}

    params, adapters = {"w": jnp.eye(6), "name": "eye"}, {}
    out = lora(fn)(params, adapters, X, "train", scale=3)
    assert out["mode"] == "train" and out["n"] == 3 and out["none"] is None
    np.testing.assert_array_equal(out["y"], 3 * X)


def test_swapping_adapters_does_not_recompile():
    subject = subjects.ALL[0]
    params, x = subject.draw()
    found = plan(subject.fn, params, LoraConfig(target_modules=["w"]), x)
    step = jax.jit(lora(subject.fn))
    outs = [step(params, found.init(jax.random.key(seed)), x) for seed in range(3)]
    assert step._cache_size() == 1 and len(outs) == 3


def dropped(fn, params, x, key, rate=0.5):
    config = LoraConfig(r=3, target_modules=list(params), lora_dropout=rate)
    adapters = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape), plan(fn, params, config, x).abstract()
    )
    return lora(fn)(params, adapters, x, dropout_key=key)


def test_dropout_needs_a_key_and_leaves_the_base_path_alone():
    params, x = {"w": jnp.zeros((40, 5))}, jnp.ones((200, 40))
    fn = lambda p, x: x @ p["w"] + 7  # noqa: E731
    off = dropped(fn, params, x, None)
    np.testing.assert_array_equal(off, dropped(fn, params, x, jax.random.key(0), rate=0.0))
    on = dropped(fn, params, x, jax.random.key(0))
    np.testing.assert_array_equal(on, dropped(fn, params, x, jax.random.key(0)))
    assert not np.array_equal(on, dropped(fn, params, x, jax.random.key(1)))
    low_rank, full = on - 7, off - 7
    kept = np.asarray(low_rank / full * 40 / 2)
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
    assert 0.9 < float(np.mean(low_rank / full)) < 1.1


def test_each_site_and_each_scan_step_draws_its_own_mask():
    x = jnp.ones((4, 40))
    twice = dropped(
        lambda p, x: (x @ p["w"], x @ p["w"]), {"w": jnp.zeros((40, 5))}, x, jax.random.key(0)
    )
    assert not np.array_equal(*twice)

    def scanned(p, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), 0.0, p["w"])[1]

    steps = dropped(scanned, {"w": jnp.zeros((3, 40, 5))}, x, jax.random.key(0))
    assert not np.array_equal(steps[0], steps[1]) and not np.array_equal(steps[1], steps[2])


def test_dropout_inside_an_authors_derivative_is_refused():
    with pytest.raises(PlanError, match="lora_dropout"):
        dropped(
            lambda p, x: subjects.scaled_backward(p["w"], x),
            {"w": jnp.zeros((40, 5))},
            jnp.ones((2, 4, 40)),
            jax.random.key(0),
        )


START = dict(r=2, target_modules=["w", "v"], use_dora=True, modules_to_save=["head"], bias="all")


def started(params, x):
    y = x @ params["w"]["kernel"] @ params["v"]["kernel"] + params["v"]["bias"]
    return params["embed"]["embedding"][jnp.array([1])] + y @ params["head"]["kernel"]


def test_a_plan_of_shapes_starts_from_given_parameters():
    """DoRA's magnitudes, rows and leaves trained in full are values of the weights."""
    rng = np.random.default_rng(0)
    shapes = {"w.kernel": (3, 4), "v.kernel": (4, 5), "v.bias": (5,), "head.kernel": (5, 6)}
    params: dict = {}
    for path, shape in (shapes | {"embed.embedding": (7, 6)}).items():
        module, leaf = path.split(".")
        params.setdefault(module, {})[leaf] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    config = LoraConfig(trainable_token_indices={"embed": [2, 5]}, **START)
    abstract = jax.eval_shape(lambda: params)
    key = jax.random.key(0)
    wanted = plan(started, params, config, jnp.ones((2, 3))).init(key)
    found = plan(started, abstract, config, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    got = found.init(key, params=params)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, two)
    assert jax.eval_shape(lambda: wanted) == found.abstract()
    with pytest.raises(ConfigError, match="was made from shapes") as caught:
        found.init(key)
    assert caught.value.problems == (
        "head.kernel: trained in full",
        "v.bias: trained in full",
        "v.kernel: its norms are DoRA's",
        "w.kernel: its norms are DoRA's",
        "embed.embedding: rows of it",
    )
    wrong = {**params, "w": {"kernel": jnp.ones((4, 3))}, "embed": {}}
    with pytest.raises(ConfigError, match="not the plan's") as caught:
        found.init(key, params=wrong)
    assert caught.value.problems == (
        "embed.embedding: got None, not (7, 6)",
        "w.kernel: got (4, 3), not (3, 4)",
    )
    plain = LoraConfig(r=2, target_modules=["w"])
    plan(started, abstract, plain, jnp.ones((2, 3))).init(key)  # needs no values
    read = dataclasses.replace(plain, init_lora_weights="pissa", modules_to_save=["head"])
    _, adapters = initialise(plan(started, abstract, read, jnp.ones((2, 3))), params, key)
    np.testing.assert_array_equal(adapters["head.kernel"].value, params["head"]["kernel"])
