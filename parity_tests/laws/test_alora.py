"""aLoRA: the mask and the adapted model against PEFT's, the laws of a mask, and every refusal."""

from __future__ import annotations

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from peft.tuners.lora.variants import calculate_alora_offsets

from lora_jax import (
    Adapter,
    LoraConfig,
    alora_mask,
    load_config,
    load_pretrained,
    lora,
    merge,
    merge_report,
    model_card,
    open_adapter,
    per_example,
    plan,
    save_pretrained,
    select,
    stack,
    write_adapter,
)
from lora_jax.core.errors import AdapterError, ConfigError, PlanError
from lora_jax.parity.suite.torch_models import trainable
from lora_jax.peft import AdapterFile, config_json
from lora_jax.peft.tensors import encode
from lora_jax.torch.from_torch import from_torch
from parity_tests.laws import laws
from parity_tests.laws.laws import relative
from parity_tests.models.test_torch_front import (
    MODELS,
    Wide,
    arrays,
    check,
    outputs_and_gradients,
    rel_l2,
)
from parity_tests.tiers import cases

TOKENS = (7, 8)


def pefts_mask(ids: np.ndarray, tokens: tuple[int, ...]) -> np.ndarray:
    config = {
        "default": peft.LoraConfig(alora_invocation_tokens=list(tokens), task_type="CAUSAL_LM")
    }
    offsets = calculate_alora_offsets(config, "default", torch.from_numpy(ids))
    return np.arange(ids.shape[1]) >= ids.shape[1] - np.array([[n or 0] for n in offsets])


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_the_mask_is_pefts(data):
    length = data.draw(st.sampled_from([2, 9]))
    tokens = tuple(data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=3)))
    row = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    ids = np.array(data.draw(st.lists(row, min_size=3, max_size=3)))
    got = jax.jit(alora_mask, static_argnums=1)(ids, tokens)
    np.testing.assert_array_equal(got, pefts_mask(ids, tokens))


# Once, twice, never, at the start of an example with padding behind, and cut off by the end.
IDS = np.array(
    [
        [3, 5, 7, 8, 11, 2, 9, 4],
        [7, 8, 5, 30, 7, 8, 40, 1],
        [7, 6, 8, 21, 8, 7, 3, 2],
        [7, 8, 19, 4, 0, 0, 0, 0],
        [3, 7, 8, 1, 6, 5, 2, 7],
    ]
)
ATTENTION = np.ones(IDS.shape, np.int32)
ATTENTION[3, 4:] = 0
BATCH = dict(input_ids=IDS, attention_mask=ATTENTION, labels=np.where(ATTENTION == 1, IDS, -100))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """PEFT's aLoRA of a tiny Llama, drawn at random, and what we read of it."""
    model = MODELS["llama"]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=4,
        target_modules=list(model.targets),
        init_lora_weights=False,
        alora_invocation_tokens=list(TOKENS),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(5)
    theirs = peft.get_peft_model(model.make(), config).eval()
    with torch.no_grad():
        for parameter in trainable(theirs).values():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("alora")
    theirs.save_pretrained(directory)
    fn, params = from_torch(model.make())
    found = plan(fn, params, load_config(directory), **BATCH)
    return directory, theirs, fn, params, found, load_pretrained(directory, found)


@pytest.mark.slow
def test_logits_and_gradients_are_pefts(llama):
    _, theirs, fn, params, found, adapters = llama

    def loss(adapters, active):
        out = lora(fn)(params, adapters, active=active, **BATCH)
        return out["loss"], out["logits"]

    active = alora_mask(IDS, found.config.alora_invocation_tokens)
    assert active.sum(1).tolist() == [6, 4, 0, 8, 7]
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), gradients = step(adapters, active)
    ours = arrays({"loss": value, "logits": logits} | encode(found, gradients))
    truth = outputs_and_gradients(copy.deepcopy(theirs).double(), BATCH, Wide)
    check(ours, outputs_and_gradients(theirs, BATCH), truth)
    # What would be wrong: everywhere, and nowhere.
    for other in (jnp.ones(IDS.shape, bool), jnp.zeros(IDS.shape, bool)):
        assert rel_l2(np.asarray(step(adapters, other)[0][1]), truth["logits"]) > 1e-2
    # The cache of what comes before the tokens is the base model's.
    base = fn(params, **BATCH)["logits"]
    np.testing.assert_allclose(logits[~active], base[~active], rtol=2e-5, atol=2e-5)


def test_generated_tokens_are_pefts(llama):
    _, theirs, fn, params, _, adapters = llama
    prompt, new = IDS[:3], 4
    with torch.no_grad():
        wanted = theirs.generate(
            input_ids=torch.from_numpy(prompt), max_new_tokens=new, do_sample=False, use_cache=True
        ).numpy()
    start, active = prompt.shape[1], alora_mask(prompt, TOKENS)
    # No token sees those behind it, so the room for the new ones changes nothing.
    ids, active = np.pad(prompt, ((0, 0), (0, new))), jnp.pad(active, ((0, 0), (0, new)), "edge")
    apply = jax.jit(lambda active, ids: lora(fn)(params, adapters, active=active, input_ids=ids))
    for place in range(start, start + new):
        ids[:, place] = np.argmax(apply(active, ids)["logits"][:, place - 1], -1)
    np.testing.assert_array_equal(ids, wanted)


def test_the_file_comes_back_and_peft_reads_it(llama, tmp_path):
    directory, theirs, _, _, found, adapters = llama
    saved = save_pretrained(tmp_path / "a", found, adapters, task_type="CAUSAL_LM")
    again = peft.PeftModel.from_pretrained(MODELS["llama"].make(), saved)
    assert again.active_peft_config.alora_invocation_tokens == list(TOKENS)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    file, opened = open_adapter(directory)
    assert all(one.masked for one in opened.values())
    write_adapter(tmp_path / "b", file, opened)
    assert load_config(tmp_path / "b").alora_invocation_tokens == TOKENS
    plain = everywhere(opened)
    with pytest.raises(AdapterError, match="alora_invocation_tokens deny"):
        write_adapter(tmp_path / "c", file, plain)


def test_the_order_of_the_tokens_is_kept():
    config = LoraConfig(target_modules=["b", "a"], alora_invocation_tokens=[9, 3, 5, 3])
    content = config_json.encode(AdapterFile(config))
    assert json.loads(content)["alora_invocation_tokens"] == [9, 3, 5, 3]
    assert config_json.decode(content).config.alora_invocation_tokens == (9, 3, 5, 3)


def test_a_file_with_other_tokens_than_the_plans_is_refused(llama):
    directory, _, fn, params, found, _ = llama
    for tokens in ((8, 7), None):
        config = dataclasses.replace(found.config, alora_invocation_tokens=tokens)
        other = plan(fn, params, config, **BATCH)
        with pytest.raises(AdapterError, match="alora_invocation_tokens: the file has"):
            load_pretrained(directory, other)


# Functions of one token after another: where the mask is False they must give the base's values.
def dense(params, x):
    return jnp.tanh(x @ params["one"]) @ params["two"]


def flat(params, x):
    return dense(params, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def torch_layout(params, x):
    hidden = jnp.tanh(lax.dot_general(x, params["one"].T, (((2,), (1,)), ((), ()))))
    return lax.dot_general(hidden, params["two"], (((2,), (0,)), ((), ())))


def heads(params, x):
    one = params["one"].reshape(6, 2, 5)
    two = params["two"].reshape(2, 5, 6)
    return jnp.einsum("bthd,hdo->bto", jnp.tanh(jnp.einsum("btd,dhk->bthk", x, one)), two)


def weight_first(params, x):
    hidden = jnp.tanh(jnp.einsum("io,bti->bto", params["one"], x))
    return jnp.einsum("io,bti->bto", params["two"], hidden)


def looped(params, x):
    stacked = (jnp.stack([params["one"], -params["one"]]), jnp.stack([params["two"]] * 2))
    return lax.scan(lambda h, w: (h + jnp.tanh(h @ w[0]) @ w[1], None), x, stacked)[0]


def jitted(params, x):
    return jax.checkpoint(jax.jit(dense))(params, x)


def mapped(params, x):
    return jax.vmap(dense, (None, 0))(params, x)


def tied(params, x):
    return jnp.tanh(x @ params["one"]) @ params["one"].T + x @ params["two"].T @ params["two"]


FUNCTIONS = (dense, flat, torch_layout, heads, weight_first, looped, jitted, mapped, tied)
RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"one": (6, 10), "two": (10, 6)}.items()
}
X = jnp.asarray(RNG.normal(size=(3, 4, 6)), jnp.float32)
MASK = jnp.asarray(RNG.integers(0, 2, (3, 4)), bool)
CONFIG = LoraConfig(r=2, target_modules=["one", "two"], alora_invocation_tokens=TOKENS)


def adapters_of(fn, params=PARAMS, config=CONFIG, x=X):
    found = plan(fn, params, config, x)
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), found.abstract()
    )


def everywhere(adapters):
    return {name: dataclasses.replace(one, masked=False) for name, one in adapters.items()}


QUICK = ("flat", "looped")


@pytest.mark.parametrize("fn", cases(FUNCTIONS, quick=QUICK, name=lambda fn: fn.__name__))
def test_the_adapters_act_where_the_mask_is_true(fn):
    adapters = adapters_of(fn)

    def ours(adapters, x):
        return lora(fn)(PARAMS, adapters, x, active=MASK)

    def wanted(adapters, x):
        whole = lora(fn)(PARAMS, everywhere(adapters), x)
        return jnp.where(MASK[..., None], whole, fn(PARAMS, x))

    def value_and_gradients(function):
        def loss(adapters, x):
            out = function(adapters, x)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(adapters, X)

    with laws.quick_compilation():
        (_, out), gradients = value_and_gradients(ours)
        (_, out_wanted), gradients_wanted = value_and_gradients(wanted)
        base = fn(PARAMS, X)
    assert relative(out_wanted, base) > 0.1, "vacuous"
    assert relative(out, out_wanted) < 1e-6
    assert relative(gradients, gradients_wanted) < 1e-5


def test_inside_a_map_the_mask_is_what_it_maps():
    adapters = adapters_of(dense)
    got = jax.vmap(lambda x, active: lora(dense)(PARAMS, adapters, x, active=active))(X, MASK)
    assert relative(got, lora(dense)(PARAMS, adapters, X, active=MASK)) < 1e-6


def test_each_example_may_have_an_alora_of_its_own():
    one = adapters_of(dense)
    two = jax.tree.map(lambda leaf: -2 * leaf, one)
    batch = select(stack([one, two]), jnp.array([1, 0, 1]))
    got = per_example(lora(dense))(PARAMS, batch, X, active=MASK)
    wanted = [
        lora(dense)(PARAMS, (one, two)[which], X[n : n + 1], active=MASK[n : n + 1])[0]
        for n, which in enumerate([1, 0, 1])
    ]
    assert relative(got, jnp.stack(wanted)) < 1e-6


def test_plain_adapters_beside_masked_ones_act_everywhere():
    adapters = adapters_of(dense)
    mixed = adapters | {"one": dataclasses.replace(adapters["one"], masked=False)}
    got = lora(dense)(PARAMS, mixed, X, active=jnp.zeros((3, 4), bool))
    one = {"one": mixed["one"]}
    assert relative(got, lora(dense)(PARAMS, one, X)) < 1e-6


def test_the_plan_says_it():
    found = plan(dense, PARAMS, CONFIG, X)
    assert all(leaf.masked for leaf in found.adapted)
    assert "adapted, aLoRA" in str(found)


CALLS = {
    "no mask": (None, AdapterError, "one\n.*two"),
    "numbers": (jnp.ones((3, 4), jnp.int32), AdapterError, "got int32, wanted bool"),
    "another batch": (jnp.ones((2, 4), bool), PlanError, r"one: dot_general of shape \(6, 10\)"),
    "turned": (MASK.T, PlanError, r"active has the shape \(4, 3\), the input's axes are \(3, 4\)"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_mask_that_does_not_fit_is_refused(case):
    active, error, match = CALLS[case]
    with pytest.raises(error, match=match):
        lora(dense)(PARAMS, adapters_of(dense), X, active=active)


def test_a_mask_that_no_adapter_wants_is_refused():
    plain = adapters_of(dense, config=LoraConfig(r=2, target_modules=["one"]))
    with pytest.raises(AdapterError, match="no adapter is masked"):
        lora(dense)(PARAMS, plain, X, active=MASK)


@pytest.mark.parametrize("function", [merge, merge_report], ids=lambda f: f.__name__)
def test_merging_is_refused(function):
    with pytest.raises(AdapterError, match="cannot be merged:\n  one\n  two"):
        function(PARAMS, adapters_of(dense))


def test_masked_and_plain_adapters_are_not_stacked():
    adapters = adapters_of(dense)
    plain = everywhere(adapters)
    with pytest.raises(AdapterError, match="masked of adapter 1 is False"):
        stack([adapters, plain])


@jax.custom_vjp
def own(w, x):
    return x @ w


own.defvjp(lambda w, x: (x @ w, (w, x)), lambda res, g: (res[1].T @ g, g @ res[0].T))


def conv(params, x):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, params["w"], (1,), "SAME", dimension_numbers=numbers)


UNSUPPORTED = {
    "lookup": (lambda p, x: p["w"][x], (5, 4), jnp.array([1, 2])),
    "convolution": (conv, (3, 5, 4), jnp.ones((2, 6, 5))),
    "groups": (
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([1, 2])),
        (2, 5, 4),
        jnp.ones((3, 5)),
    ),
    "derivative": (lambda p, x: own(p["w"], x), (5, 4), jnp.ones((3, 5))),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_the_plan_refuses_what_is_no_plain_product(case):
    fn, shape, x = UNSUPPORTED[case]
    config = LoraConfig(r=2, target_modules=["w"], alora_invocation_tokens=TOKENS)
    with pytest.raises(PlanError, match=r"w: \w+ of shape .*aLoRA.*test_alora.py"):
        plan(fn, {"w": jnp.ones(shape)}, config, x)
    plan(fn, {"w": jnp.ones(shape)}, LoraConfig(r=2, target_modules=["w"]), x)


FIELDS = {
    "text": dict(alora_invocation_tokens="ab"),
    "no ids": dict(alora_invocation_tokens=[1.5]),
    "below 0": dict(alora_invocation_tokens=[-1]),
    "use_dora": dict(alora_invocation_tokens=[1], use_dora=True),
    "on_unsupported": dict(alora_invocation_tokens=[1], on_unsupported="materialize"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields_that_do_not_go_together_are_refused(case):
    with pytest.raises(ConfigError, match="alora_invocation_tokens: got"):
        LoraConfig(target_modules=["one"], **FIELDS[case])


def test_an_initialisation_that_changes_the_base_is_refused():
    config = dataclasses.replace(CONFIG, init_lora_weights="pissa")
    with pytest.raises(ConfigError, match="changes for every token"):
        plan(dense, PARAMS, config, X)


def test_no_tokens_are_no_alora():
    """As in PEFT, where an empty list counts as none."""
    config = dataclasses.replace(CONFIG, alora_invocation_tokens=[])
    assert not any(leaf.masked for leaf in plan(dense, PARAMS, config, X).adapted)
    with pytest.raises(ConfigError, match="wanted at least one token"):
        alora_mask(IDS, ())


def test_a_magnitude_beside_a_mask_is_refused():
    one = adapters_of(dense)["one"]
    with pytest.raises(PlanError, match="aLoRA"):
        lora(dense)(
            PARAMS, {"one": dataclasses.replace(one, magnitude=jnp.ones(10))}, X, active=MASK
        )


def test_the_model_card_shows_the_mask():
    card = model_card(CONFIG, "me/ours")
    assert "active = alora_mask(input_ids, [7, 8])" in card
    assert "adapters, *inputs, active=active)" in card and "cannot be merged" in card
    assert "alora_mask" not in model_card(LoraConfig(target_modules=["q"]), "me/ours")
    assert isinstance(adapters_of(dense)["one"], Adapter)
