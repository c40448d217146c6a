"""``trainable_token_indices`` from the configuration to the file, and what is refused there."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import (
    Adapter,
    LoraConfig,
    Rows,
    add,
    frugality,
    load_config,
    load_pretrained,
    lora,
    merge,
    open_adapter,
    per_example,
    plan,
    save_pretrained,
    scale_by,
    select,
    stack,
    unstack,
    write_adapter,
)
from lora_jax.adapters.inits import initialise
from lora_jax.cli.checkpoint import read_checkpoint
from lora_jax.cli.diff import DiffOptions, diff_files
from lora_jax.cli.inspect import InspectOptions, inspect_files
from lora_jax.cli.merge import merge_files
from lora_jax.cli.stored_weights import place
from lora_jax.core.adapter import count
from lora_jax.core.errors import AdapterError, ConfigError, PlanError
from lora_jax.optim.adapter_entries import labelled
from lora_jax.optim.optimizers import loraplus
from lora_jax.peft.keys import ROWS

V, D, F, T = 41, 30, 37, 11
RNG = np.random.default_rng(0)
SHAPES = {
    "model.embed_tokens.weight": (V, D),
    "model.positions.weight": (T, D),
    "model.up.weight": (F, D),
    "lm_head.weight": (V, F),
}
PARAMS = {path: jnp.asarray(RNG.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}
IDS = jnp.asarray(RNG.integers(0, V, (2, T)))
EMBEDDING, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.up.weight"
CONFIG = LoraConfig(r=2, target_modules=["up"], trainable_token_indices=[7, 3])


def fn(params, ids):
    x = params[EMBEDDING][ids] + params["model.positions.weight"][jnp.arange(ids.shape[1])]
    return jnp.tanh(x @ params[UP].T) @ params[HEAD].T


def tied(params, ids):
    x = params[EMBEDDING][ids]
    return jnp.tanh(jnp.tanh(x @ params[UP].T) @ params[UP]) @ params[EMBEDDING].T


def drawn(found, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), found.abstract()
    )


def with_(**fields):
    return dataclasses.replace(CONFIG, **fields)


@pytest.fixture(scope="module")
def given_():
    found = plan(fn, PARAMS, CONFIG, IDS)
    return found, drawn(found)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_fresh_rows_are_the_weights_own_and_the_plan_says_so(given_):
    found, _ = given_
    fresh = found.init(jax.random.key(0))
    np.testing.assert_array_equal(fresh[EMBEDDING].values, PARAMS[EMBEDDING][jnp.array([7, 3])])
    assert fresh[EMBEDDING].indices == (7, 3)
    with jax.disable_jit():
        np.testing.assert_array_equal(lora(fn)(PARAMS, fresh, IDS), fn(PARAMS, IDS))
    assert jax.tree.map(jnp.shape, found.abstract()) == jax.tree.map(jnp.shape, fresh)
    line = next(line for line in str(found).splitlines() if line.startswith(EMBEDDING))
    assert "2 rows trained" in line
    assert found.trainable == count(fresh) == 2 * D + 2 * (D + F)
    same(initialise(found, PARAMS, jax.random.key(0))[1], fresh)


def test_a_name_means_every_weight_that_ends_so():
    config = with_(trainable_token_indices={"tokens.weight"[:6]: [1], "head": [2, 40]})
    found = plan(fn, PARAMS, config, IDS)
    rowed = {leaf.path: (leaf.rows, leaf.row_axis) for leaf in found.leaves if leaf.rows}
    assert rowed == {EMBEDDING: ((1,), 0), HEAD: ((2, 40), 0)}
    adapters = drawn(found)
    got, wanted = lora(fn)(PARAMS, adapters, IDS), fn(merge(PARAMS, adapters), IDS)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert adapters[HEAD].values.shape == (2, F)


def test_tokens_count_along_the_axis_that_is_looked_up_or_kept(tmp_path):
    def flax(params, ids):
        x = jnp.moveaxis(jnp.take(params["embed_tokens.kernel"], ids, axis=1), 0, -1)
        return jnp.tanh(x @ params["up.kernel"]) @ params["lm_head.kernel"]

    params = {"embed_tokens.kernel": PARAMS[EMBEDDING].T, "up.kernel": PARAMS[UP].T}
    params["lm_head.kernel"] = PARAMS[HEAD].T
    config = with_(trainable_token_indices={"embed_tokens": [7, 3], "lm_head": [40]})
    found = plan(flax, params, config, IDS)
    axes = {leaf.path: (leaf.axes, leaf.row_axis) for leaf in found.leaves if leaf.rows}
    assert axes == {"embed_tokens.kernel": ("oi", 1), "lm_head.kernel": ("io", 1)}
    adapters = drawn(found)
    got, wanted = lora(flax)(params, adapters, IDS), flax(merge(params, adapters), IDS)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    save_pretrained(tmp_path / "a", found, adapters)
    file = safetensors.numpy.load_file(tmp_path / "a" / "adapter_model.safetensors")
    shapes = {key.split(".")[2]: value.shape for key, value in file.items() if ROWS in key}
    assert shapes == {"embed_tokens": (2, D), "lm_head": (1, F)}
    same(load_pretrained(tmp_path / "a", found), adapters)


REFUSED = {
    "no such row": (with_(trainable_token_indices=[3, V]), f"{V} is not below {V}"),
    "no such module": (with_(trainable_token_indices={"wte": [3]}), "wte: got no module"),
    "a pair of the same weight": (with_(target_modules=["up", "embed_tokens"]), "adapts it, too"),
    "the whole weight, too": (with_(modules_to_save=["embed_tokens"]), "trains all of it, too"),
    "a linear layer": (with_(trainable_token_indices={"up": [3]}), "rows of it are looked up"),
    "two lists": (
        with_(trainable_token_indices={"embed_tokens": [3], "tokens": [4]}),
        "wanted one list",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_without_sense_is_refused(name):
    config, message = REFUSED[name]
    if name == "a linear layer":
        config = dataclasses.replace(config, target_modules=["lm_head"])
    with pytest.raises(PlanError, match=message):
        plan(fn, PARAMS, config, IDS)


def test_a_list_needs_one_embedding_that_it_can_mean():
    params = {path.replace("embed_tokens", "first"): x for path, x in PARAMS.items()}

    def renamed(params, ids):
        return fn({path.replace("first", "embed_tokens"): x for path, x in params.items()}, ids)

    with pytest.raises(PlanError, match=r"model\.first\.weight, model\.positions\.weight"):
        plan(renamed, params, CONFIG, IDS)


def test_a_head_with_a_bias_is_refused():
    def biased(params, ids):
        return fn(params, ids) + params["lm_head.bias"]

    config = with_(trainable_token_indices={"lm_head": [1]})
    with pytest.raises(PlanError, match="bias, which PEFT leaves out"):
        plan(biased, PARAMS | {"lm_head.bias": jnp.ones(V)}, config, IDS)


@pytest.mark.parametrize(
    "tokens", [[], [-1], [1, 1], [True], ["1"], 3, "13", {}, {"": [1]}, {"wte": 3}, {"wte": [2, 2]}]
)
def test_a_configuration_without_sense_is_refused(tokens):
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        LoraConfig(trainable_token_indices=tokens)


def test_rows_that_do_not_fit_are_listed_together():
    good = Rows(jnp.ones((2, D)), (1, 2))
    bad = {
        EMBEDDING: dataclasses.replace(good, indices=(1, V)),
        "model.positions.weight": Rows(jnp.ones((3, D)), (1, 2)),
        UP: dataclasses.replace(good, axes="ii"),
        "nowhere": good,
    }
    with pytest.raises(AdapterError) as caught:
        merge(PARAMS, bad)
    assert all(path in str(caught.value) for path in bad)
    with pytest.raises(AdapterError, match="beside adapters of its columns"):
        pair = Adapter(jnp.ones((V, 1)), jnp.ones((1, 2)), 1.0, columns=(0, 2))
        merge(PARAMS, {EMBEDDING: good, f"{EMBEDDING}[0:2]": pair})
    with pytest.raises(AdapterError, match="no product uses it"):
        lora(lambda params: params[UP].sum())(PARAMS, {EMBEDDING: good})


def test_a_bf16_weight_keeps_float32_rows_and_rounds_once():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    found = plan(fn, half, CONFIG, IDS)
    assert found.init(jax.random.key(0))[EMBEDDING].values.dtype == jnp.float32
    adapters = {EMBEDDING: drawn(found)[EMBEDDING]}

    def look(params, ids):
        return params[EMBEDDING][ids]

    got, wanted = (
        f(IDS)
        for f in (
            lambda ids: lora(look)(half, adapters, ids),
            lambda ids: look(merge(half, adapters), ids),
        )
    )
    assert got.dtype == jnp.bfloat16
    # Rounded to float32 before: at most one number of bfloat16's apart, and seldom.
    gap = np.abs(np.asarray(got, np.float32) - np.asarray(wanted, np.float32))
    assert (gap <= 2**-7 * np.abs(np.asarray(wanted, np.float32))).all()
    assert np.mean(gap > 0) < 0.01


def test_frugality_counts_rows():
    found = plan(tied, PARAMS, CONFIG, IDS)
    report = frugality(tied, PARAMS, found.abstract(), IDS)
    assert report.weight_sized == () and report.low_rank > 0


def test_optimizers_see_rows_as_leaves(given_):
    _, adapters = given_
    names = labelled(adapters, lambda name, field, leaf: field)
    assert names[EMBEDDING].values == "values"
    plus = loraplus(0.5, ratio=4, optimizer=lambda rate, decay: optax.sgd(rate))
    updates, _ = plus.update(adapters, plus.init(adapters), adapters)
    # They go with A, as in PEFT.
    np.testing.assert_array_equal(updates[EMBEDDING].values, -0.5 * adapters[EMBEDDING].values)


def test_many_rows_at_once(given_):
    found, _ = given_
    many = [drawn(found, seed) for seed in range(3)]
    stacked = stack(many)
    for one, other in zip(unstack(stacked), many, strict=True):
        same(one, other)
    ids = IDS[jnp.array([0, 1, 0])]
    got = per_example(lora(fn))(PARAMS, select(stacked, jnp.array([2, 0, -1]), PARAMS), ids)
    wanted = [lora(fn)(PARAMS, many[k], ids[n : n + 1])[0] for n, k in ((0, 2), (1, 0))]
    np.testing.assert_allclose(got[:2], jnp.stack(wanted), rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(got[2], fn(PARAMS, ids[2:])[0], rtol=2e-4, atol=2e-4)
    with pytest.raises(AdapterError, match="needs its value from params"):
        select(stacked, -1)
    other = many[1] | {EMBEDDING: dataclasses.replace(many[1][EMBEDDING], indices=(3, 7))}
    with pytest.raises(AdapterError, match="indices of adapter 1 is"):
        stack([many[0], other])


def test_arithmetic_refuses_rows_by_name(given_):
    _, adapters = given_
    for act in (lambda a: add(a, a), lambda a: scale_by(a, 2.0)):
        with pytest.raises(AdapterError, match=f"{EMBEDDING}: rows trained as they are"):
            act(adapters)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)).map(lambda order: order[:5]), st.booleans(), st.booleans())
def test_files_round_trip_in_any_order(tmp_path_factory, tokens, by_name, renames):
    directory = tmp_path_factory.mktemp("rows")
    config = with_(trainable_token_indices={"embed_tokens": tokens} if by_name else tokens)
    found = plan(fn, PARAMS, config, IDS)
    adapters = drawn(found)
    options: Any = {"names": lambda path: f"base.{path.removesuffix('.weight')}"} if renames else {}
    save_pretrained(directory / "a", found, adapters, **options)
    read = load_config(directory / "a", **options, **({"params": PARAMS} if renames else {}))
    again = plan(fn, PARAMS, read, IDS)
    assert [leaf.rows for leaf in again.leaves] == [leaf.rows for leaf in found.leaves]
    same(load_pretrained(directory / "a", again, **options), adapters)
    save_pretrained(directory / "b", again, adapters, **options)
    for path in (directory / "a").iterdir():
        if not (renames and path.suffix == ".json"):  # names in full, the second time
            assert path.read_bytes() == (directory / "b" / path.name).read_bytes()
    file, bare = open_adapter(directory / "a")
    (one,) = (entry for entry in bare.values() if isinstance(entry, Rows))
    same(one, adapters[EMBEDDING])
    write_adapter(directory / "c", file, bare)
    contents = [(directory / x / "adapter_model.safetensors").read_bytes() for x in "ac"]
    assert contents[0] == contents[1]


def _edited(directory, tensors=lambda t: t, config=lambda c: c):
    path = directory / "adapter_model.safetensors"
    safetensors.numpy.save_file(tensors(dict(safetensors.numpy.load_file(path))), path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(config(json.loads(path.read_text()))))


KEY = f"base_model.model.model.embed_tokens.{ROWS}"
BROKEN = {
    "another order": (dict(config=lambda c: c | {"trainable_token_indices": [3, 7]}), r"\[3, 7\]"),
    "more tokens": (dict(config=lambda c: c | {"trainable_token_indices": [7, 3, 1]}), "wanted"),
    "no tokens": (dict(config=lambda c: c | {"trainable_token_indices": None}), "None|not name"),
    "no tensor": (dict(tensors=lambda t: {k: x for k, x in t.items() if k != KEY}), "missing|of 0"),
    "fewer rows": (dict(tensors=lambda t: t | {KEY: t[KEY][:1]}), "wanted"),
    "NaN": (dict(tensors=lambda t: t | {KEY: t[KEY] * np.nan}), "NaN"),
    "another module": (
        dict(tensors=lambda t: t | {KEY.replace("embed_tokens", "other"): t[KEY]}),
        "unexpected|got rows of 2",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_differs_is_refused(name, tmp_path, given_):
    found, adapters = given_
    edit, message = BROKEN[name]
    save_pretrained(tmp_path / "a", found, adapters)
    _edited(tmp_path / "a", **edit)
    with pytest.raises(AdapterError, match=message):
        load_pretrained(tmp_path / "a", found)
    with pytest.raises(AdapterError, match=message) if name != "another order" else nullcontext():
        open_adapter(tmp_path / "a")
    with pytest.warns(UserWarning, match="loaded in part"):
        fit, report = load_pretrained(tmp_path / "a", found, strict=False)
    assert (EMBEDDING in fit) == (name == "another module") and UP in fit
    assert report.problems


def test_the_commands_know_rows(tmp_path, given_):
    found, adapters = given_
    (tmp_path / "model").mkdir()
    stored = {path: np.asarray(value) for path, value in PARAMS.items()}
    safetensors.numpy.save_file(stored, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    save_pretrained(tmp_path / "a", found, adapters)
    report = merge_files(tmp_path / "model", tmp_path / "a", tmp_path / "out")
    assert f"{EMBEDDING}: 2 rows replaced" in report
    got = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for path, wanted in merge(PARAMS, adapters).items():
        np.testing.assert_allclose(got[path], wanted, rtol=0 if path != UP else 1e-6, atol=1e-6)
    said = inspect_files(InspectOptions(tmp_path / "a"))
    assert "model.embed_tokens: rows 7, 3 trained, (2, 30) float32" in said
    changed = dataclasses.replace(adapters[EMBEDDING], values=2 * adapters[EMBEDDING].values)
    save_pretrained(tmp_path / "b", found, adapters | {EMBEDDING: changed})
    said = diff_files(DiffOptions(tmp_path / "a", tmp_path / "b"))
    assert "rows trained, 1" in said and "equal" in said
    small = dataclasses.replace(adapters[EMBEDDING], indices=(7, V))
    with pytest.raises(AdapterError, match=f"{V} is not below {V}"):
        place({"model.embed_tokens": small}, read_checkpoint(tmp_path / "model"))


def test_other_rows_than_the_plans_are_not_saved(tmp_path, given_):
    found, adapters = given_
    other = dataclasses.replace(adapters[EMBEDDING], indices=(3, 7))
    with pytest.raises(AdapterError, match=r"got the rows \(3, 7\), wanted \(7, 3\)"):
        save_pretrained(tmp_path / "a", found, adapters | {EMBEDDING: other})
    with pytest.raises(AdapterError, match=r"got Adapter, wanted the rows \(7, 3\)"):
        save_pretrained(tmp_path / "a", found, adapters | {EMBEDDING: adapters[UP]})
