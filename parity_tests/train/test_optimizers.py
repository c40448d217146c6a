"""LoRA+, LoRA-FA and Riemannian preconditioning: PEFT's own, step by step, in both precisions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import peft.optimizers
import pytest
import torch

from lora_jax import Full, LoraConfig, lora, plan
from lora_jax.optim.optimizers import adamw, lora_fa, loraplus, riemannian
from parity_tests.parity.oracle import assert_within_rule, rel_l2
from parity_tests.tiers import cases

STEPS = 20
UNIT = 2.0**-24
WORDS, CLASSES, BATCH = 11, 3, 9
FIELDS = dict(
    r=4,
    lora_alpha=10,
    target_modules=["embed", "up", "down"],
    rank_pattern={"down": 3},
    alpha_pattern={"down": 7},
    modules_to_save=["head"],
    bias="lora_only",
)


class Tiny(torch.nn.Module):
    """An embedding, two layers of different ranks, a norm between, and a head trained in full."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, 6)
        self.up = torch.nn.Linear(6, 10)
        self.down = torch.nn.Linear(10, 7)
        self.head = torch.nn.Linear(7, CLASSES)

    def forward(self, ids):
        return self.head(torch.tanh(self.down(torch.tanh(self.up(self.embed(ids))))))


def fn(params, ids):
    x = params["embed.weight"][ids]
    for name in ("up", "down"):
        x = jnp.tanh(x @ params[f"{name}.weight"].T + params[f"{name}.bias"])
    return x @ params["head.weight"].T + params["head.bias"]


def batches():
    rng = np.random.default_rng(1)
    return [(rng.integers(0, WORDS, BATCH), rng.integers(0, CLASSES, BATCH)) for _ in range(STEPS)]


def alike(drawn):
    """Return a matrix with all singular values √rank / 2; of other arrays the halves."""
    if drawn.ndim == 2:
        left, _, right = np.linalg.svd(drawn, full_matrices=False)
        drawn = left @ right * np.sqrt(min(drawn.shape))
    return drawn.astype(np.float32) / 2


def start(dtype):
    """Return the parameters, the plan and adapters with B (and an embedding's A) not zero."""
    torch.manual_seed(0)
    params = {k: v.detach().double().numpy() for k, v in Tiny().state_dict().items()}
    found = plan(fn, jax.tree.map(np.float32, params), LoraConfig(**FIELDS), jnp.zeros(2, int))
    rng = np.random.default_rng(2)
    # Both preconditioners invert A Aᵀ or Bᵀ B: with all singular values alike, no draw of the
    # numbers is so near to a lower rank that float32 knows nothing.
    drawn = jax.tree.map(lambda leaf: alike(rng.normal(size=leaf.shape)), found.abstract())
    for path in found.full:
        drawn[path] = Full(jnp.asarray(params[path], jnp.float32))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, drawn)), found


# our field -> PEFT's parameter and whether it is the transpose
def names_in_peft(found):
    names = {}
    for leaf in found.adapted:
        module = f"base_model.model.{leaf.path.removesuffix('.weight')}"
        pattern = "lora_embedding_{}.default" if leaf.looked_up else "lora_{}.default.weight"
        names[leaf.name, "a"] = f"{module}.{pattern.format('A')}"
        names[leaf.name, "b"] = f"{module}.{pattern.format('B')}"
    for path in found.full:
        module, _, leaf_name = path.rpartition(".")
        kind = "modules_to_save.default" if module == "head" else "base_layer"
        names[path, "value"] = f"base_model.model.{module}.{kind}.{leaf_name}"
    return names


def fields_of(adapters, found):
    """Return every trained array by (name, field), in PEFT's layout."""
    out = {}
    for name, field in names_in_peft(found):
        value = np.asarray(getattr(adapters[name], field), np.float64)
        out[name, field] = value if field == "value" else value.T
    return out


def train_peft(make, dtype):
    """Return what PEFT's optimizer makes of the parameters, after each step."""
    (params, adapters), found = start(jnp.float32)
    torch.manual_seed(0)
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(**FIELDS)).to(dtype)
    names, by_name = names_in_peft(found), dict(model.named_parameters())
    with torch.no_grad():
        for key, value in fields_of(adapters, found).items():
            by_name[names[key]].copy_(torch.from_numpy(value))
    optimizer, history = make(model), []
    for ids, labels in batches():
        optimizer.zero_grad()
        logits = model(torch.from_numpy(ids))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        optimizer.step()
        history.append({k: by_name[n].detach().double().numpy().copy() for k, n in names.items()})
    return history


def train_ours(make, dtype, noises=(None,)):
    """Return our parameters after each step; once for each seed of a rounding of the gradients."""
    with jax.enable_x64(dtype == jnp.float64):
        (params, first), found = start(dtype)
        optimizer = make(found)

        @jax.jit
        def step(adapters, state, noise, ids, labels):
            def loss(adapters):
                logits = lora(fn)(params, adapters, ids)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            gradients = jax.grad(loss)(adapters)
            gradients = jax.tree.map(
                lambda g, n: g + jnp.where(g == 0, 0, jnp.abs(g).max() * n), gradients, noise
            )
            with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
                updates, state = optimizer.update(gradients, state, adapters)
            return optax.apply_updates(adapters, updates), state

        histories = []
        for seed in noises:
            adapters, state, history = first, optimizer.init(first), []
            size, normal = UNIT if seed else 0.0, np.random.default_rng(seed).normal
            for ids, labels in batches():
                noise = jax.tree.map(
                    lambda x, size=size, normal=normal: jnp.asarray(
                        size * normal(size=x.shape), dtype
                    ),
                    adapters,
                )
                adapters, state = step(
                    adapters, state, noise, jnp.asarray(ids), jnp.asarray(labels)
                )
                history.append(fields_of(adapters, found))
            histories.append(history)
        return histories


def embeddings(found):
    return [leaf.name for leaf in found.adapted if leaf.looked_up]


def peft_lora_fa(model, **fields):
    optimizer = peft.optimizers.create_lorafa_optimizer(
        model,
        r=4,
        lora_alpha=FIELDS["lora_alpha"],
        lr=1e-2,
        weight_decay=fields.pop("weight_decay", 0.0),
    )
    optimizer.param_groups[0].update(fields)
    return optimizer


CASES = {
    "loraplus": (
        lambda model: peft.optimizers.create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=1e-2,
            loraplus_lr_ratio=5.0,
            loraplus_lr_embedding=3e-3,
            loraplus_weight_decay=0.3,
        ),
        lambda found: loraplus(
            1e-2,
            ratio=5.0,
            weight_decay=0.3,
            embedding_learning_rate=3e-3,
            embeddings=embeddings(found),
        ),
    ),
    "loraplus on sgd": (
        lambda model: peft.optimizers.create_loraplus_optimizer(
            model, torch.optim.SGD, lr=3e-2, loraplus_lr_ratio=4.0
        ),
        lambda found: loraplus(
            3e-2,
            ratio=4,
            optimizer=lambda rate, decay: optax.sgd(rate),
            embeddings=embeddings(found),
        ),
    ),
    "lora_fa": (
        lambda model: peft_lora_fa(model, weight_decay=0.2),
        lambda found: lora_fa(1e-2, weight_decay=0.2),
    ),
    "lora_fa without correction": (
        lambda model: peft_lora_fa(model, correct_bias=False, betas=(0.8, 0.95), eps=1e-4),
        lambda found: lora_fa(1e-2, b1=0.8, b2=0.95, eps=1e-4, correct_bias=False),
    ),
    "riemannian": (
        lambda model: peft.optimizers.create_riemannian_optimizer(
            model, torch.optim.SGD, lr=5e-2, reg=0.03
        ),
        lambda found: riemannian(optax.sgd(5e-2), reg=0.03, embeddings=embeddings(found)),
    ),
    "riemannian on adamw": (
        lambda model: peft.optimizers.create_riemannian_optimizer(
            model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1
        ),
        lambda found: riemannian(adamw(1e-2, 0.1), embeddings=embeddings(found)),
    ),
}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    # PEFT's LoRA-FA multiplies in bfloat16 where it can, which would hide differences
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)


def start_fields():
    (_, adapters), found = start(jnp.float32)
    return fields_of(adapters, found)


def movement(history):
    first = start_fields()
    return [{key: value - first[key] for key, value in after.items()} for after in history]


@pytest.mark.parametrize("name", cases(CASES, quick=("loraplus", "lora_fa", "riemannian")))
def test_twenty_steps_are_pefts(name):
    theirs, ours = CASES[name]
    exact, (float64, *rounded) = (
        train_peft(theirs, torch.float64),
        train_ours(ours, jnp.float64, (None, 1, 2, 3)),
    )
    assert_float64_is_pefts(name, exact, float64)
    assert_float32_is_within_the_rule(name, exact, rounded)


@pytest.mark.parametrize("name", cases(["loraplus", "lora_fa", "riemannian"], quick=("lora_fa",)))
def test_twenty_rank_stabilised_steps_are_pefts(name, monkeypatch):
    monkeypatch.setitem(FIELDS, "use_rslora", True)
    # The scale as it is without: with alpha / √r tanh is flat, and gradients near AdamW's eps of
    # 1e-8 turn a rounding of 1e-17 into a part of 1e-9 of the step.
    monkeypatch.setitem(FIELDS, "lora_alpha", 5)
    theirs, ours = CASES[name]
    (float64,) = train_ours(ours, jnp.float64)
    assert_float64_is_pefts(name, train_peft(theirs, torch.float64), float64)


def assert_float64_is_pefts(name, exact, float64):
    assert len(float64) == len(exact) == STEPS
    for step, (got, wanted) in enumerate(zip(movement(float64), movement(exact), strict=True)):
        for key, value in wanted.items():
            if key[1] == "a" and "fa" in name:
                assert not value.any() and not got[key].any()
            else:
                assert value.any(), (key, "vacuous: it does not move")
                assert rel_l2(got[key], value) < 1e-11, (key, step)


def assert_float32_is_within_the_rule(name, exact, rounded):
    """Hold every step to the rule; its cond is how far roundings of the gradients carry.

    Adam divides a gradient by its own size, so a gradient that is small beside the terms it is
    a sum of moves the parameter by its rounding errors; and every step rounds the parameter.
    """
    torch32 = train_peft(CASES[name][0], torch.float32)
    (jax32,) = train_ours(CASES[name][1], jnp.float32)
    for step, after in enumerate(exact):
        for key, value in after.items():
            carried = max(rel_l2(one[step][key], value) for one in rounded) / UNIT
            cond = step + 1 + 4 * carried
            assert cond < 1000, "a reference that knows nothing"
            mine, theirs = jax32[step][key], torch32[step][key]
            assert_within_rule(mine, theirs, value, cond, UNIT, f"{key} after step {step}")
