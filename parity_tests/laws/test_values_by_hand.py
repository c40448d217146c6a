"""Single values by hand, each from arrays of a few numbers.

No test here is a case of a table, of which the default run takes a part by its position: each
runs always, whatever is added elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax import (
    Adapter,
    Full,
    LoraConfig,
    lora,
    merge,
    plan,
)
from lora_jax.adapters.extract import without_dora
from lora_jax.adapters.inits.activations import eva
from lora_jax.adapters.inits.eva_ranks import eva_ranks
from lora_jax.adapters.stack import select, stack
from lora_jax.core.adapter import rank
from lora_jax.core.config.lora_config import rank_and_alpha
from lora_jax.core.contractions import ragged_dot
from lora_jax.core.errors import AdapterError
from lora_jax.core.initializers import draw
from lora_jax.optim.losses import linear_cross_entropy
from lora_jax.optim.optimizers import loraplus
from lora_jax.parity.verdicts import Verdict, judge

W = np.array([[3.0, 0.0], [4.0, 1.0]])
A, B = np.array([[1.0], [2.0]]), np.array([[2.0, -1.0]])


def pair(a=A, b=B, scale=0.5, **fields):
    return Adapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scale, **fields)


def whole(x, dtype="float32"):
    return jnp.asarray(x, dtype)


def dense(params, x):
    return x @ params["w"]


# What is merged


def test_dora_is_merged_with_its_gain():
    # W + s·A·B = [[4, -0.5], [6, 0]], whose columns have the norms √52 and 0.5
    moved = W + 0.5 * A @ B
    magnitude = np.array([1.0, 4.0])
    adapters = {"w": pair(magnitude=whole(magnitude))}
    wanted = moved * magnitude / np.array([math.sqrt(52), 0.5])
    merged = merge({"w": whole(W)}, adapters)
    np.testing.assert_allclose(merged["w"], wanted, rtol=1e-6)
    got = lora(dense)({"w": whole(W)}, adapters, jnp.eye(2))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


# Products that share x·A


def test_products_of_one_input_keep_their_own_a_where_they_share():
    rng = np.random.default_rng(0)
    names = ("q", "k", "v")
    params = {name: whole(rng.normal(size=(4, 4))) for name in names}
    adapters = {
        name: pair(rng.normal(size=(4, 2)), rng.normal(size=(2, 4)), scale)
        for name, scale in zip(names, (0.5, 1.0, 2.0), strict=True)
    }
    x = whole(rng.normal(size=(3, 4)))

    def fn(params, x):
        return [x @ params[name] for name in names]

    for name, got in zip(names, lora(fn)(params, adapters, x), strict=True):
        one = adapters[name]
        change = one.scale * np.float64(one.a) @ np.float64(one.b)
        wanted = np.float64(x) @ (np.float64(params[name]) + change)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_plain_weight_beside_doras_keeps_its_output():
    """Their columns are one weight: DoRA's gain is that of its own columns alone."""
    params = {"w": whole(W), "v": whole(2 * W)}
    adapters = {"w": pair(magnitude=whole([1.0, 4.0])), "v": pair(scale=2.0)}

    def fn(params, x):
        return x @ jnp.concatenate([params["w"], params["v"]], axis=1)

    got = lora(fn)(params, adapters, jnp.eye(2))
    moved = W + 0.5 * A @ B
    of_dora = moved * np.array([1, 4]) / np.linalg.norm(moved, axis=0)
    np.testing.assert_allclose(got[:, :2], of_dora, rtol=1e-6)
    np.testing.assert_allclose(got[:, 2:], 2 * W + 2 * A @ B, rtol=1e-6)


def test_a_bias_follows_the_axes_of_its_weight():
    """Of a kernel with heads whose order the function exchanges."""
    rng = np.random.default_rng(0)
    w, a, b, bias, x = (rng.normal(size=n) for n in ((4, 2, 3), (4, 1), (1, 2, 3), (2, 3), (5, 4)))

    def fn(params, x):
        return jnp.einsum("xi,ido->xdo", x, params["w"].transpose(0, 2, 1))

    adapters = {"w": pair(a, b, 2.0, axes="ioo", bias=whole(bias))}
    got = lora(fn)({"w": whole(w)}, adapters, whole(x))
    path = np.einsum("xi,ir,rdo->xdo", x, a, b)
    wanted = np.einsum("xi,ido->xdo", x, w) + 2 * (path + bias)
    np.testing.assert_allclose(got, wanted.transpose(0, 2, 1), rtol=1e-5, atol=1e-5)


def test_groups_of_rows_meet_a_stack_either_way_round():
    """Rows of the first group, then of the second: ``x·A·B``, and ``y·Bᵀ·Aᵀ`` for the transpose."""
    rng = np.random.default_rng(0)
    a, b, x, y = (rng.normal(size=n) for n in ((2, 4, 2), (2, 2, 3), (5, 4), (5, 3)))
    one, sizes = pair(a, b, 0.5, axes="sio"), jnp.array([2, 3])
    groups = [0, 0, 1, 1, 1]
    forth = ragged_dot(whole(x), one, sizes, 1, 1, 0)
    wanted = 0.5 * np.einsum("mi,mir,mro->mo", x, a[groups], b[groups])
    np.testing.assert_allclose(forth, wanted, rtol=1e-5, atol=1e-6)
    back = ragged_dot(whole(y), one, sizes, 1, 2, 0)
    wanted = 0.5 * np.einsum("mo,mro,mir->mi", y, b[groups], a[groups])
    np.testing.assert_allclose(back, wanted, rtol=1e-5, atol=1e-6)


def test_every_group_of_a_convolution_sees_all_of_a_and_columns_of_b_of_its_own():
    # a window of one point, two groups of two channels to three each, and a rank of two
    a, b = np.array([[[1.0, 2.0], [3.0, -1.0]]]), np.arange(12.0).reshape(2, 6)
    x = np.array([[[1.0, -2.0, 0.5, 3.0]]])

    def fn(params, x):
        return lax.conv_general_dilated(
            x, params["w"], (1,), "VALID", None, None, ("NWC", "WIO", "NWC"), 2
        )

    adapters = {"w": pair(a, b, 2.0, axes="iio")}
    got = lora(fn)({"w": jnp.zeros((1, 2, 6))}, adapters, whole(x))
    first, second = x[0, 0, :2] @ a[0] @ b[:, :3], x[0, 0, 2:] @ a[0] @ b[:, 3:]
    np.testing.assert_allclose(got[0, 0], 2 * np.concatenate([first, second]), rtol=1e-6)


# What trains and how it starts


def test_lora_only_trains_the_biases_of_adapted_modules_alone():
    params = {name: {"kernel": jnp.eye(2), "bias": jnp.ones(2)} for name in ("up", "head")}

    def fn(params, x):
        for name in ("up", "head"):
            x = x @ params[name]["kernel"] + params[name]["bias"]
        return x

    for bias, wanted in (
        ("none", set()),
        ("lora_only", {"up.bias"}),
        ("all", {"up.bias", "head.bias"}),
    ):
        config = LoraConfig(r=1, target_modules=["up"], bias=bias)
        assert set(plan(fn, params, config, jnp.ones((1, 2))).full) == wanted, bias


def test_a_weight_counts_once_however_many_of_its_ranges_are_adapted():
    params = {"w": jnp.ones((2, 6)), "b": jnp.ones(6)}
    config = LoraConfig(r=1, target_modules=["w"], output_slices={"w": ((0, 2), (3, 5))})
    found = plan(lambda p, x: x @ p["w"] + p["b"], params, config, jnp.ones((1, 2)))
    # each range: A (2, 1) and B (1, 2)
    assert (found.base, found.trainable) == (12 + 6, 2 * (2 + 2))


def test_gaussian_has_a_deviation_of_one_over_r():
    for r in (4, 8):
        a, b = draw(jax.random.key(0), "gaussian", (500, 3), "io", r=r)
        assert abs(float(a.std()) * r - 1) < 0.05 and not b.any()


def test_a_whitened_direction_is_over_the_root_of_its_singular_value():
    # X less its mean has the singular values 16 and 1, along the axes
    x = np.array([[1.0, 0.5], [-1.0, 0.5], [1.0, -0.5], [-1.0, -0.5]]) * [8, 1] + [2.0, -3.0]
    gram, total, count = whole(x.T @ x), whole(x.sum(axis=0)), jnp.asarray(4.0)
    for whiten, wanted in ((False, [1, 1]), (True, [1 / 4, 1])):
        a, b = eva(gram, total, count, 2, 3, whiten=whiten)
        np.testing.assert_allclose(np.abs(a), np.diag(wanted), atol=1e-5)
        assert not b.any()


def test_ranks_of_modules_whose_names_end_alike_are_each_ones_own():
    """EVA's: the inputs of q vary in three directions alike, of layer.q in two, of other in one."""
    params = {"q": jnp.eye(4), "layer": {"q": jnp.eye(4)}, "other": jnp.eye(4)}

    def fn(params, x, y, z):
        return x @ params["q"] + y @ params["layer"]["q"] + z @ params["other"]

    both_ways = np.concatenate([np.eye(4)[:3], -np.eye(4)[:3]])
    x, y, z = (whole(both_ways * (np.arange(4) < n)) for n in (3, 2, 1))
    config = LoraConfig(r=2, init_lora_weights="eva", target_modules=["q", "other"])
    found = eva_ranks(plan(fn, params, config, x, y, z), params, fn=fn, batches=[(x, y, z)])
    wanted = {"q": 3, "layer.q": 2, "other": 1}
    assert {leaf.path: leaf.r for leaf in found.adapted} == wanted
    assert {name: rank_and_alpha(found.config, name)[0] for name in wanted} == wanted


def test_plain_lora_in_doras_place_has_the_rank_that_is_asked_for():
    adapters = {"w": pair(magnitude=whole([1.0, 4.0]))}
    for r, wanted in ((None, 1), (1, 1), (2, 2)):
        plain, errors = without_dora({"w": whole(W)}, adapters, r)
        assert (rank(plain["w"]), plain["w"].scale, plain["w"].magnitude) == (wanted, 1.0, None)
    # of full rank: nothing is left out
    moved = W + 0.5 * A @ B
    change = moved * np.array([1, 4]) / np.linalg.norm(moved, axis=0) - W
    np.testing.assert_allclose(np.float64(plain["w"].a) @ plain["w"].b, change, atol=1e-5)
    assert errors["w"] < 1e-6


def test_plain_lora_in_doras_place_has_the_dtype_of_the_pair():
    low = replace(pair(magnitude=whole([1.0, 4.0])), a=whole(A, "bfloat16"), b=whole(B, "bfloat16"))
    plain, _ = without_dora({"w": whole(W)}, {"w": low})
    assert (plain["w"].a.dtype, plain["w"].b.dtype) == (jnp.bfloat16, jnp.bfloat16)


# Many adapters


def test_a_traced_index_beyond_the_stack_is_no_adapter():
    """What trained in full has the frozen value there, as with −1."""
    trees = [{"w": pair(scale=n), "b": Full(whole([n, n]))} for n in (1.0, 2.0)]
    frozen = {"w": whole(W), "b": whole([7.0, 8.0])}

    def chosen(index):
        own = select(stack(trees), index, frozen)
        return own["b"].value, own["w"].scale

    bias, scale = jax.jit(chosen)(jnp.array([1, 2, -1, 0]))
    assert bias.tolist() == [[2, 2], [7, 8], [7, 8], [1, 1]]
    assert scale.tolist() == [2, 0, 0, 1]


def test_an_alora_is_not_stacked_with_an_adapter_that_acts_everywhere():
    with pytest.raises(AdapterError, match="w: masked of adapter 1 is True, of adapter 0 False"):
        stack([{"w": pair()}, {"w": pair(masked=True)}])


# Optimizers and losses


def test_no_scale_of_a_norm_decays_under_loraplus():
    """Of stacked layers it has two axes, as a matrix has."""
    full = {"norms.scale": Full(jnp.ones((3, 4))), "head.kernel": Full(jnp.ones((3, 4)))}
    adapters = full | {"w": pair()}
    optimizer = loraplus(0.5, ratio=2, weight_decay=0.1)
    still = jax.tree.map(jnp.zeros_like, adapters)
    updates, _ = optimizer.update(still, optimizer.init(adapters), adapters)
    np.testing.assert_array_equal(updates["norms.scale"].value, 0)
    np.testing.assert_allclose(updates["head.kernel"].value, -0.5 * 0.1, rtol=1e-6)


def test_tokens_that_fill_a_chunk_of_the_loss_do_not_count():
    """Whatever number says so: the last of three chunks, of 51 tokens each, is filled by two."""
    rng = np.random.default_rng(0)
    tokens, width, vocabulary = 151, 3, 5
    hidden, head = whole(rng.normal(size=(tokens, width))), whole(rng.normal(size=(width, 5)))
    labels = rng.integers(0, vocabulary, tokens)
    labels[::7] = -1
    counted = np.flatnonzero(labels >= 0)
    logits = np.float64(hidden) @ np.float64(head)
    powers = np.exp(logits)
    shares = powers / powers.sum(axis=1, keepdims=True)
    d = (shares - np.eye(vocabulary)[labels])[counted] / len(counted)

    def loss(head):
        return linear_cross_entropy(hidden, head, jnp.asarray(labels), ignore_index=-1, chunk=1)

    value, gradient = jax.value_and_grad(loss)(head)
    wanted = -np.log(shares[counted, labels[counted]]).mean()
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient, np.float64(hidden)[counted].T @ d, rtol=1e-4, atol=1e-6)


# Verdicts


def test_zeros_of_different_signs_are_not_exact():
    truth = np.array([1.0, 0.0])
    one, other = np.float32([1, 0.0]), np.float32([1, -0.0])
    for theirs, exact, wanted in (
        (one, True, Verdict.EXACT),
        (other, False, Verdict.ORDER_ONLY),
        (other, True, Verdict.MISMATCH),
    ):
        found = judge("y", one, theirs, truth, unit_roundoff=1e-7, exact=exact)
        assert found.verdict is wanted
