"""LoRA+, LoRA-FA and Riemannian preconditioning: PEFT's own, step by step, and by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import peft.optimizers
import pytest
import torch

from lora_jax import Adapter, Full, LoraConfig, lora, plan
from lora_jax.errors import AdapterError
from lora_jax.optimizers import freeze, lora_fa, loraplus, riemannian
from parity_tests.oracle import rel_l2
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


def start(dtype):
    """Return the parameters, the plan and adapters with B (and an embedding's A) not zero."""
    torch.manual_seed(0)
    params = {k: v.detach().double().numpy() for k, v in Tiny().state_dict().items()}
    found = plan(fn, jax.tree.map(np.float32, params), LoraConfig(**FIELDS), jnp.zeros(2, int))
    rng = np.random.default_rng(2)
    drawn = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 2, found.abstract()
    )
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
        model, r=4, lora_alpha=10, lr=1e-2, weight_decay=fields.pop("weight_decay", 0.0)
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
        lambda found: riemannian(optax.adamw(1e-2, weight_decay=0.1), embeddings=embeddings(found)),
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
    assert len(float64) == len(exact) == STEPS
    for step, (got, wanted) in enumerate(zip(movement(float64), movement(exact), strict=True)):
        for key, value in wanted.items():
            if key[1] == "a" and "fa" in name:
                assert not value.any() and not got[key].any()
            else:
                assert value.any(), (key, "vacuous: it does not move")
                assert rel_l2(got[key], value) < 1e-11, (key, step)
    assert_float32_is_near(name, exact, rounded)


def assert_float32_is_near(name, exact, rounded):
    torch32, (jax32,) = (
        train_peft(CASES[name][0], torch.float32),
        train_ours(CASES[name][1], jnp.float32),
    )
    # optax forms 1 - b2**t >= 1e-3 in float32, to within 2000 u; its root is in the step
    optax_adam = 1000 * UNIT * (name in ("loraplus", "riemannian on adamw"))
    before, travelled = start_fields(), dict.fromkeys(exact[0], 0.0)
    for step, after in enumerate(exact):
        for key, value in after.items():
            mine, theirs = rel_l2(jax32[step][key], value), rel_l2(torch32[step][key], value)
            travelled[key] += np.linalg.norm(value - before[key])
            share = travelled[key] / np.linalg.norm(value)
            # what a rounding of the gradients does, where a small one is divided by itself
            unstable = max(rel_l2(one[step][key], value) for one in rounded)
            # every step rounds the parameter once, to within u
            bound = 2 * theirs + (step + 1) * UNIT + optax_adam * share + 4 * unstable
            assert theirs < 1e-4 and unstable < 1e-4, "the reference itself is wrong"
            assert mine <= bound, (key, step, mine, theirs, bound)
        before = after


def pair(a, b, **fields):
    return {"w": Adapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), **fields)}


def first_update(optimizer, adapters, gradients):
    state = optimizer.init(adapters)
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(optimizer.update)(gradients, state, adapters)[0]["w"]


A, B = np.array([[1.0, 0], [0, 2], [2, 1]]), np.array([[1.0, 2], [0, 1]])
G_A, G_B = np.array([[0.5, 1], [-1, 0], [2, 0.25]]), np.array([[1.0, -2], [0.5, 4]])


def test_the_first_step_of_loraplus_by_hand():
    got = first_update(
        loraplus(0.5, ratio=3, optimizer=lambda rate, decay: optax.sgd(rate)),
        pair(A, B, scale=2.0),
        pair(G_A, G_B, scale=2.0),
    )
    np.testing.assert_array_equal(got.a, -0.5 * G_A)
    np.testing.assert_array_equal(got.b, -1.5 * G_B)


def test_the_first_step_of_riemannian_by_hand():
    # A'A = [[5, 2], [2, 5]], B B' = [[5, 2], [2, 1]]; with the damping 1 on the diagonal
    by_a, by_b = np.array([[6.0, -2], [-2, 6]]) / 32, np.array([[2.0, -2], [-2, 6]]) / 8
    got = first_update(
        riemannian(optax.sgd(1.0), reg=1), pair(A, B, scale=2.0), pair(G_A, G_B, scale=2.0)
    )
    np.testing.assert_allclose(got.a, -G_A @ by_b, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.b, -by_a @ G_B, rtol=1e-6, atol=1e-6)


def test_the_first_step_of_lora_fa_by_hand():
    # (A'A)^-1 = [[5, -2], [-2, 5]] / 21, the scale is 2
    g = np.array([[5.0, -2], [-2, 5]]) / 21 @ G_B / 4
    m, v = 0.1 * g, 0.001 * g * g
    step = -0.1 * np.sqrt(0.001) / 0.1 * m / (np.sqrt(v) + 1e-2)
    adapters = pair(A, B, scale=2.0)
    got = first_update(
        lora_fa(0.1, weight_decay=0.5, eps=1e-2), adapters, pair(G_A, G_B, scale=2.0)
    )
    np.testing.assert_array_equal(got.a, np.zeros_like(A))
    np.testing.assert_allclose(got.b, step - 0.05 * (B + step), rtol=1e-5, atol=1e-7)


OPTIMIZERS = {
    "loraplus": lambda: loraplus(1e-2, ratio=4, weight_decay=0.1),
    "lora_fa": lambda: lora_fa(1e-2, weight_decay=0.1),
    "riemannian": lambda: riemannian(optax.adamw(1e-2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("axes", ["sio", "ioo", "siio", "osi"])
def test_stacked_layers_and_split_heads_train_as_separate_matrices(name, axes):
    rng, r = np.random.default_rng(len(axes)), 2
    shape = (2, 3, 4, 5)[: len(axes)]
    sizes = {x: [n for n, y in zip(shape, axes, strict=True) if x == y] for x in "sio"}
    stacked, fan_in, out = (int(np.prod(sizes[x], initial=1)) for x in "sio")

    def draw():
        a, b = rng.normal(size=(stacked, fan_in, r)), rng.normal(size=(stacked, r, out))
        whole = pair(
            a.reshape(*sizes["s"], *sizes["i"], r),
            b.reshape(*sizes["s"], r, *sizes["o"]),
            scale=1.5,
            axes=axes,
        )
        return whole, [pair(a[k], b[k], scale=1.5) for k in range(stacked)]

    (whole, parts), (gradient, gradients) = draw(), draw()
    optimizer = OPTIMIZERS[name]()
    got = first_update(optimizer, whole, gradient)
    for k in range(stacked):
        wanted = first_update(optimizer, parts[k], gradients[k])
        for field in ("a", "b"):
            one = np.asarray(getattr(got, field)).reshape(stacked, *getattr(wanted, field).shape)
            np.testing.assert_allclose(one[k], getattr(wanted, field), rtol=2e-4, atol=1e-6)


def test_a_frozen_part_neither_moves_nor_decays_nor_costs_moments():
    adapters = pair(A, B, scale=2.0)
    for part, other in (("a", "b"), ("b", "a")):
        optimizer = freeze(optax.adamw(1e-2, weight_decay=0.9), part)
        got = first_update(optimizer, adapters, pair(G_A, G_B, scale=2.0))
        assert not np.asarray(getattr(got, part)).any() and np.asarray(getattr(got, other)).any()
        shapes = {leaf.shape for leaf in jax.tree.leaves(optimizer.init(adapters)) if leaf.ndim}
        assert shapes == {getattr(adapters["w"], other).shape}


def test_a_scale_that_is_an_array_never_moves():
    adapters = pair(A, B, scale=jnp.float32(2))
    for make in OPTIMIZERS.values():
        assert (
            first_update(make(), adapters, adapters).scale == 0 or make is OPTIMIZERS["riemannian"]
        )


def test_a_schedule_is_followed_and_multiplied():
    schedule = optax.linear_schedule(0.5, 0.1, 4)
    adapters = pair(A, B, scale=2.0)
    optimizer = loraplus(schedule, ratio=3, optimizer=lambda rate, decay: optax.sgd(rate))
    state = optimizer.init(adapters)
    for rate in (0.5, 0.4):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(pair(G_A, G_B, scale=2.0), state, adapters)
        np.testing.assert_allclose(updates["w"].a, -rate * G_A, rtol=1e-6)
        np.testing.assert_allclose(updates["w"].b, -3 * rate * G_B, rtol=1e-6)
    still = first_update(lora_fa(lambda step: 0.0 * step), adapters, adapters)
    assert not np.asarray(still.b).any()


def test_what_would_train_nothing_or_wrongly_is_refused():
    zero = pair(0 * A, B, scale=2.0) | {"v": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), None)}
    with pytest.raises(AdapterError, match="(?s)v: got no scale.*w: got A = 0"):
        lora_fa().init(zero)
    with pytest.raises(AdapterError, match="scale got 0"):
        lora_fa().init(pair(A, B, scale=0))
    with pytest.raises(AdapterError, match="embed: no such adapter"):
        loraplus(1e-3, ratio=2, embeddings=["w", "embed"]).init(pair(A, B, scale=2.0))
    adapters = pair(A, B, scale=2.0)
    for optimizer in (lora_fa(), riemannian(optax.sgd(1.0))):
        with pytest.raises(AdapterError, match="got no params"):
            optimizer.update(adapters, optimizer.init(adapters))
    around = loraplus(1e-3, ratio=2, optimizer=lambda rate, _: riemannian(optax.sgd(rate)))
    with pytest.raises(AdapterError, match="w: got A or B alone"):
        around.update(adapters, around.init(adapters), adapters)
