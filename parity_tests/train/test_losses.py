"""``linear_cross_entropy``: PyTorch's numbers, the least work, and no logits of all tokens."""

from __future__ import annotations

import re
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_jax import LoraConfig, lora, plan
from lora_jax.optim import losses
from lora_jax.optim.losses import LossError, linear_cross_entropy
from lora_jax.rewrite.frugality import compiled, count

TOKENS, WIDTH, VOCABULARY, CHUNK = 192, 128, 320, 16


def drawn(seed, tokens, width, vocabulary, dtype="float64"):
    """Return hidden, head (width, vocabulary) and labels, some of which are ignored."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, vocabulary, tokens)
    labels[rng.random(tokens) < 0.3] = -100
    hidden = rng.normal(size=(*tokens, width))
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(rng.normal(size=(width, vocabulary)), dtype),
        (jnp.asarray(labels)),
    )


def by_optax(hidden, head, labels, smoothing=0.0):
    """The same loss with all logits, in optax's terms."""
    wanted = optax.smooth_labels(
        jax.nn.one_hot(labels, head.shape[-1], dtype=hidden.dtype), smoothing
    )
    losses = optax.softmax_cross_entropy(hidden @ head, wanted)
    counted = (labels != -100).astype(hidden.dtype)
    return jnp.sum(losses * counted) / jnp.sum(counted)


def by_torch(hidden, head, labels, **options):
    """Return PyTorch's loss and its gradients."""
    x, w = (torch.tensor(np.asarray(v), requires_grad=True) for v in (hidden, head))
    logits = (x @ w).reshape(-1, w.shape[-1])
    target = torch.tensor(np.asarray(labels)).reshape(-1).long()
    loss = torch.nn.functional.cross_entropy(logits, target, **options)
    loss.backward()
    return [v.detach().numpy() for v in (loss, x.grad, w.grad)]


def close(got, wanted, tolerance=1e-12):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, wanted
    )


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


ARGUMENTS = abstract(TOKENS, WIDTH), abstract(WIDTH, VOCABULARY), abstract(TOKENS, dtype=jnp.int32)
ELEMENTS = TOKENS * VOCABULARY


def chunked(hidden, head, labels):
    return linear_cross_entropy(hidden, head, labels, chunk=CHUNK)


def largest(fn, *arguments):
    """Return how many elements the largest array of the compiled program has, parameters apart."""
    sizes = re.findall(r"\w+\[([\d,]+)\]\S* (?!parameter)[\w-]+\(", compiled(fn, *arguments))
    return max(int(np.prod([int(n) for n in size.split(",")])) for size in sizes)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 99),
    tokens=st.lists(st.integers(1, 5), min_size=0, max_size=2),
    width=st.integers(1, 4),
    vocabulary=st.integers(1, 6),
    chunk=st.integers(1, 9),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    transposed=st.booleans(),
    fewest=st.sampled_from([1, losses._FEWEST]),
)
@example(
    seed=0, tokens=[5, 4], width=3, vocabulary=6, chunk=1, smoothing=0.1, transposed=False, fewest=1
)
def test_value_and_gradients_are_pytorchs(
    seed, tokens, width, vocabulary, chunk, smoothing, transposed, fewest
):
    with jax.enable_x64(True), mock.patch.object(losses, "_FEWEST", fewest):
        hidden, head, labels = drawn(seed, tuple(tokens), width, vocabulary)
        labels = jnp.where(jnp.arange(labels.size).reshape(labels.shape) == 0, 0, labels)

        def loss(hidden, head):
            return linear_cross_entropy(
                hidden,
                head.T if transposed else head,
                labels,
                label_smoothing=smoothing,
                chunk=chunk,
                transposed=transposed,
            )

        @jax.jit
        def all_ways(hidden, head):
            value, gradients = jax.value_and_grad(loss, (0, 1))(hidden, head)
            alone = [jax.grad(loss, n)(hidden, head) for n in (0, 1)]
            return [value, *gradients, loss(hidden, head), *alone]

        wanted, *by = by_torch(hidden, head, labels, label_smoothing=smoothing)
        close(all_ways(hidden, head), [wanted, *by, wanted, *by])


@pytest.mark.parametrize(("smoothing", "transposed"), [(0.1, False), (0.25, True)])
def test_smoothed_values_and_every_gradient_are_pytorchs(smoothing, transposed):
    """The gradient of hidden alone is computed another way than beside that of the head."""
    with jax.enable_x64(True):
        hidden, head, labels = drawn(0, (5, 4), 3, 7)
        options = dict(label_smoothing=smoothing, chunk=3, transposed=transposed)

        def loss(hidden, head):
            return linear_cross_entropy(hidden, head.T if transposed else head, labels, **options)

        @jax.jit
        def all_ways(hidden, head):
            value, gradients = jax.value_and_grad(loss, (0, 1))(hidden, head)
            alone = [jax.grad(loss, n)(hidden, head) for n in (0, 1)]
            return [value, *gradients, loss(hidden, head), *alone]

        wanted, *by = by_torch(hidden, head, labels, label_smoothing=smoothing)
        close(all_ways(hidden, head), [wanted, *by, wanted, *by])


def test_another_ignored_label_and_rows_of_anything_under_it():
    with jax.enable_x64(True):
        hidden, head, labels = drawn(0, (7,), 3, 5)
        labels = jnp.where(labels < 0, 2, labels)
        loss = jax.value_and_grad(
            lambda x: linear_cross_entropy(x, head, labels, ignore_index=2, chunk=3)
        )
        value, gradient = loss(hidden)
        wanted, by_hidden, _ = by_torch(hidden, head, labels, ignore_index=2)
        close([value, gradient], [wanted, by_hidden])
        spoiled = loss(jnp.where((labels == 2)[:, None], jnp.inf, hidden))
        close(list(spoiled), [wanted, by_hidden])


def test_nothing_that_counts_is_nan_without_a_gradient_as_in_pytorch():
    with jax.enable_x64(True):
        hidden, head, _ = drawn(0, (4,), 3, 5)
        labels = jnp.full(4, -100)
        value, gradient = jax.value_and_grad(linear_cross_entropy)(hidden, head, labels)
        wanted, by_hidden, _ = by_torch(hidden, head, labels)
        assert np.isnan(value) and np.isnan(wanted)
        np.testing.assert_array_equal(gradient, by_hidden)


@pytest.mark.parametrize("label", [-1, 5])
def test_an_unknown_label_makes_the_loss_nan(label):
    hidden, head, labels = drawn(0, (6,), 3, 5, "float32")
    value, gradient = jax.value_and_grad(linear_cross_entropy)(
        hidden, head, labels.at[2].set(label), chunk=2
    )
    assert np.isnan(value) and np.isnan(gradient).any()


@pytest.mark.slow
def test_it_transforms_as_any_function():
    with jax.enable_x64(True):
        hidden, head, labels = drawn(1, (3, 4), 3, 5)

        def ours(x, w=head):
            return linear_cross_entropy(x, w, labels, chunk=5)

        def theirs(x, w=head):
            return by_optax(x, w, labels)

        def looped(loss):
            step = lambda c, w: (c + loss(hidden * c, w), loss(hidden, w) * c)  # noqa: E731
            return lambda w: sum(map(jnp.sum, jax.lax.scan(step, 1.0, jnp.stack([w, 2 * w]))))

        wide, high = jnp.stack([hidden, 2 * hidden]), jnp.stack([head, -head])

        def transformed(loss):
            return [
                jax.jit(jax.grad(loss))(hidden),
                jax.vmap(jax.grad(loss))(wide),
                jax.vmap(jax.grad(loss, (0, 1)))(wide, high),
                jax.grad(lambda w: jax.vmap(loss, (0, None))(wide, w).sum())(head),
                jax.grad(looped(loss))(head),
                jax.grad(jax.checkpoint(looped(loss)))(head),
                jax.jacrev(jax.grad(loss))(hidden),
            ]

        close(*(jax.jit(transformed, static_argnums=0)(loss) for loss in (ours, theirs)), 1e-11)


def test_bfloat16_is_summed_in_float32():
    hidden, head, labels = drawn(2, (64,), 256, 40, "bfloat16")
    loss = jax.value_and_grad(partial(linear_cross_entropy, chunk=16))
    value, gradient = jax.jit(loss)(hidden, head / 16, labels)
    wide = [v.astype(jnp.float32) for v in (hidden, head / 16)]
    wanted, by_hidden = jax.jit(jax.value_and_grad(by_optax))(*wide, labels)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    close(value, wanted, 1e-5)
    close(gradient.astype(jnp.float32) * 64, by_hidden * 64, 2e-2)


@pytest.mark.parametrize("trained", [(), (0,), (0, 1)], ids=["value", "hidden", "hidden and head"])
def test_the_products_are_the_fewest_and_the_logits_are_of_one_chunk(trained):
    fn = jax.value_and_grad(chunked, trained) if trained else chunked
    products = count(fn, *ARGUMENTS) / (2 * TOKENS * WIDTH * VOCABULARY)
    assert 1 + len(trained) <= products < 1.15 + len(trained)
    assert largest(fn, *ARGUMENTS) <= WIDTH * VOCABULARY < ELEMENTS
    memory = jax.jit(fn).lower(*ARGUMENTS).compile().memory_analysis()
    assert len(trained) > 1 or memory.temp_size_in_bytes < 4 * ELEMENTS


def test_the_readers_see_all_logits_where_there_are_some():
    plain = jax.value_and_grad(by_optax)
    assert largest(plain, *ARGUMENTS) == ELEMENTS
    memory = jax.jit(plain).lower(*ARGUMENTS).compile().memory_analysis()
    assert memory.temp_size_in_bytes >= 4 * ELEMENTS


def adapted_losses(targets, **options):
    """Return loss and gradients of adapters, by ours and by optax, under ``lora``."""
    hidden, head, labels = drawn(3, (9,), 6, 7)
    params = {"up": head[:, :6] / 3, "head": head.T if options.get("transposed") else head}

    def ours(params, x):
        return linear_cross_entropy(x @ params["up"], params["head"], labels, chunk=4, **options)

    def theirs(params, x):
        head = params["head"].T if options.get("transposed") else params["head"]
        return by_optax(x @ params["up"], head, labels)

    found = plan(ours, params, LoraConfig(r=2, target_modules=targets), hidden)
    rng = np.random.default_rng(4)
    adapters = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), found.abstract())
    return tuple(
        jax.value_and_grad(lambda a, fn=fn: lora(fn)(params, a, hidden))(adapters)
        for fn in (ours, theirs)
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("targets", [["up"], ["head"], ["up", "head"]], ids="+".join)
def test_adapters_before_and_in_the_head_get_their_gradients(targets, transposed):
    with jax.enable_x64(True):
        close(*adapted_losses(targets, transposed=transposed), 1e-11)


def test_under_lora_a_frozen_head_costs_two_products_and_no_gradient_of_its_own():
    def fn(params, x, labels):
        return chunked(x @ params["up"], params["head"], labels)

    x, head, labels = ARGUMENTS
    params = {"up": abstract(WIDTH, WIDTH), "head": head}
    adapters = plan(fn, params, LoraConfig(r=2, target_modules=["up"]), x, labels).abstract()
    step = jax.grad(lambda a, p, x, y: lora(fn)(p, a, x, y))
    whole = adapters, params, x, labels
    body = 2 * TOKENS * WIDTH * WIDTH
    products = (count(step, *whole) - body) / (2 * TOKENS * WIDTH * VOCABULARY)
    assert 1.9 < products < 2.3
    assert largest(step, *whole) <= WIDTH * VOCABULARY


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((abstract(5, 3), abstract(4, 7), abstract(5, dtype=jnp.int32)), {}, "takes a width of 4"),
        (
            (abstract(5, 3), abstract(7, 3), abstract(5, dtype=jnp.int32)),
            {},
            "with transposed=True it would fit",
        ),
        (
            (abstract(5, 3), abstract(3, 7), abstract(6, dtype=jnp.int32)),
            {"label_smoothing": 2.0, "chunk": 0},
            r"got shape \(6,\), wanted \(5,\)\n.*label_smoothing: got 2.0.*\n.*chunk: got 0",
        ),
        (
            (abstract(5, 3), abstract(3, 7, dtype=jnp.bfloat16), abstract(5, dtype=jnp.int32)),
            {},
            "head is bfloat16 and hidden float32: cast",
        ),
    ],
)
def test_what_does_not_fit_is_said_all_at_once(arguments, options, said):
    with pytest.raises(LossError, match=said):
        jax.eval_shape(lambda *a: linear_cross_entropy(*a, **options), *arguments)
