"""Arithmetic on adapter trees: every operation against the formula in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_jax import (
    Adapter,
    Full,
    LoraConfig,
    add,
    extract,
    merge,
    merge_report,
    plan,
    rename,
    resize,
    scale_by,
    subtract,
)
from lora_jax.adapters.merge import warnings_of
from lora_jax.adapters.resize import delta_norm, effective_rank
from lora_jax.adapters.svd import factors, svd
from lora_jax.core.adapter import a_shape, b_shape
from lora_jax.core.delta import delta
from lora_jax.core.errors import AdapterError
from parity_tests.parity.oracle import rel_l2

U = 2.0**-24
R = 4

# Axes and shape of a weight: a kernel, PyTorch's, heads, a stack, and letters in between.
SUBJECTS = {
    "io": (6, 9),
    "oi": (9, 6),
    "ioo": (6, 3, 3),
    "iio": (2, 3, 9),
    "sio": (3, 6, 9),
    "iso": (6, 3, 9),
}
EINSUMS = {
    "io": "ir,ro->io",
    "oi": "ir,ro->oi",
    "ioo": "ir,rop->iop",
    "iio": "ijr,ro->ijo",
    "sio": "sir,sro->sio",
    "iso": "sir,sro->iso",
}


def draw(axes, r=R, scale=0.75, seed=0, columns=None):
    rng = np.random.default_rng(seed)
    shape = SUBJECTS[axes]
    a = rng.normal(size=_a_shape(axes, r)).astype(np.float32)
    b = rng.normal(size=b_shape(shape, axes, r)).astype(np.float32)
    return Adapter(jnp.asarray(a), jnp.asarray(b), scale, axes, columns=columns)


def _a_shape(axes, r):
    return a_shape(SUBJECTS[axes], axes, r)


def truth(adapter):
    a, b = np.asarray(adapter.a, np.float64), np.asarray(adapter.b, np.float64)
    return float(adapter.scale) * np.einsum(EINSUMS[adapter.axes], a, b)


def close(adapter, wanted, size=1.0):
    """Hold ΔW to a few roundings of the terms of which it is a sum."""
    got, unit = np.asarray(delta(adapter)), U * max(size, np.linalg.norm(wanted))
    # XLA takes what float32 holds only as a denormal for zero.
    assert np.linalg.norm(got - wanted) <= 20 * unit + 100 * np.finfo(np.float32).tiny


def added(axes):
    one, other = draw(axes), draw(axes, r=2, scale=-1.3, seed=1)
    close(add({"w": one}, {"w": other})["w"], truth(one) + truth(other))


def subtracted(axes):
    one, other = draw(axes), draw(axes, r=2, scale=0.75, seed=1)
    result = subtract({"w": one}, {"w": other})["w"]
    close(result, truth(one) - truth(other))
    # Equal scales: nothing is rounded, the values are the old ones.
    np.testing.assert_array_equal(result.a[..., :R], one.a)
    np.testing.assert_array_equal(result.a[..., R:], -other.a)


def scaled(axes):
    one = draw(axes)
    result = scale_by({"w": one}, -0.5)["w"]
    np.testing.assert_array_equal(result.a, one.a)
    np.testing.assert_array_equal(result.b, one.b)
    np.testing.assert_array_equal(delta(result), -0.5 * delta(one))


def shrunk(axes):
    one = draw(axes)
    resized, errors = resize({"w": one}, 2)
    stacked, best, tail = matrices(one), [], 0.0
    for matrix in stacked:
        u, s, vt = np.linalg.svd(matrix)
        best.append(u[:, :2] * s[:2] @ vt[:2])
        tail += (s[2:] ** 2).sum()
    assert resized["w"].a.shape[-1] == 2 and resized["w"].scale == one.scale
    assert rel_l2(matrices(resized["w"]), np.stack(best)) < 1e-5
    wanted = np.sqrt(tail) / np.linalg.norm(stacked)
    assert errors["w"] == pytest.approx(wanted, rel=1e-4) and wanted > 0.05


def grown(axes):
    one = draw(axes)
    plain, errors = resize({"w": one}, 7)
    fresh, _ = resize({"w": one}, 7, key=jax.random.key(0))
    for result in (plain["w"], fresh["w"]):
        assert errors == {"w": 0.0}
        np.testing.assert_array_equal(result.a[..., :R], one.a)
        np.testing.assert_array_equal(factors(result)[1][:, :R], factors(one)[1])
        assert not np.any(factors(result)[1][:, R:])
        close(result, truth(one))
    # Where A and B are both zero no gradient ever comes.
    assert not np.any(plain["w"].a[..., R:]) and np.all(fresh["w"].a[..., R:])


def extracted(axes):
    one = draw(axes)
    base = {"w": jnp.asarray(np.random.default_rng(3).normal(size=SUBJECTS[axes]), jnp.float32)}
    tuned = merge(base, {"w": one})
    found, errors = extract(base, tuned, {"w": axes}, r=R)
    assert found["w"].axes == axes and errors["w"] < 1e-5
    assert rel_l2(np.asarray(delta(found["w"])), truth(one)) < 1e-5
    less, errors = extract(base, tuned, {"w": axes}, r=2)
    assert errors["w"] == pytest.approx(resize({"w": one}, 2)[1]["w"], rel=1e-3)
    assert rel_l2(np.asarray(delta(less["w"])), truth(one)) == pytest.approx(errors["w"], rel=1e-3)


def measured(axes):
    one = draw(axes)
    assert delta_norm(one) == pytest.approx(np.linalg.norm(truth(one)), rel=1e-6)
    ranks = []
    for matrix in matrices(one):
        s = np.linalg.svd(matrix, compute_uv=False)[:R]
        p = s / s.sum()
        ranks.append(np.exp(-(p * np.log(p)).sum()))
    assert effective_rank(one) == pytest.approx(np.mean(ranks), rel=1e-5)


LAWS = [added, subtracted, scaled, shrunk, grown, extracted, measured]


def matrices(adapter):
    a, b = (np.asarray(half, np.float64) for half in factors(adapter))
    return a @ b * adapter.scale


@pytest.mark.parametrize("axes", SUBJECTS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, axes):
    law(axes)


@settings(max_examples=25, deadline=None)
@example(1e-38, 8.0, 0)
@example(0.0, 0.5, 0)
@example(0.0, 0.0, 0)
@given(st.floats(-8, 8, width=32), st.floats(-8, 8, width=32), st.integers(0, 99))
def test_sums_hold_for_any_scales(s, t, seed):
    one, other = draw("io", scale=s, seed=seed), draw("io", scale=t, seed=seed + 1)
    wanted = truth(one) + truth(other)
    size = np.linalg.norm(truth(one)) + np.linalg.norm(truth(other))
    close(add({"w": one}, {"w": other})["w"], wanted, size)
    close(subtract({"w": one}, {"w": other})["w"], truth(one) - truth(other), size)


def test_paths_of_one_side_stay():
    one, other = draw("io"), draw("io", seed=1)
    total = add({"v": one}, {"w": other})
    for path, pair in {"v": one, "w": other}.items():
        assert total[path].scale == pair.scale
        np.testing.assert_array_equal(total[path].a, pair.a)
        np.testing.assert_array_equal(total[path].b, pair.b)
    close(subtract({"v": one}, {"w": other})["w"], -truth(other))


def test_what_a_larger_rank_adds_is_drawn_anew_for_every_path():
    one = Adapter(jnp.ones((4, 1)), jnp.ones((1, 3)), scale=1.0)
    grown, _ = resize({"x": one, "y": one}, 3, key=jax.random.key(0))
    x, y = (np.asarray(grown[path].a[:, 1:]) for path in "xy")
    assert x.all() and y.all() and not np.any(x == y)


def test_names_are_changed_by_mapping_and_by_function():
    one, part = draw("io"), draw("io", columns=(0, 9))
    tree = {"a.kernel": one, "b.kernel[0:9]": part, "c.bias": Full(jnp.ones(2))}
    assert list(rename(tree, {"b.kernel": "d.kernel"})) == ["a.kernel", "d.kernel[0:9]", "c.bias"]
    assert list(rename(tree, lambda p: f"m.{p}"))[1] == "m.b.kernel[0:9]"
    with pytest.raises(AdapterError, match=r"z: no such adapter\n.*x: the new name of a.kernel"):
        rename({"a.kernel": one, "e": one}, {"a.kernel": "x", "e": "x", "z": "y"})


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda t: scale_by(t, 2.0), ["f: trained in full", "n: scale got None", "d: DoRA's"]),
        (lambda t: add(t, {"w": draw("oi")}), ["w: axes", "f: trained", "n: scale"]),
        (lambda t: resize(t, {"w": 0, "x": 3}), ["w: got rank 0", "x: no such", "n: scale"]),
    ],
)
def test_what_does_not_go_is_listed_at_once(call, said):
    tree = {"w": draw("io"), "f": Full(jnp.ones(3)), "n": draw("io", scale=None)}
    tree["d"] = dataclasses.replace(draw("io"), magnitude=jnp.ones(7))
    with pytest.raises(AdapterError) as raised:
        call(tree)
    assert all(part in str(raised.value) for part in said)


def test_no_matrix_of_the_weights_size_is_formed():
    """The only products are those of A, of B and of the r × r core."""
    fan_in, out, r = 300, 200, 4
    pair = jnp.ones((1, fan_in, r)), jnp.ones((1, r, out))

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (int(np.prod(v.aval.shape)) for v in eqn.outvars)
            for sub in jax.tree.leaves(list(eqn.params.values())):
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    assert max(sizes(jax.make_jaxpr(svd)(pair).jaxpr)) <= fan_in * r
    formed = jax.make_jaxpr(lambda p: jnp.linalg.svd(p[0] @ p[1], full_matrices=False))(pair)
    assert max(sizes(formed.jaxpr)) >= fan_in * out


def test_a_plan_decides_ranks_scales_and_columns_of_what_is_extracted():
    def fn(params, x):
        return x @ params["qkv"] + x @ params["o"] + params["b"]

    rng = np.random.default_rng(0)
    base = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32)
        for k, s in {"qkv": (6, 9), "o": (6, 9), "b": (9,)}.items()
    }
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["qkv"], output_slices={"qkv": [(0, 3), (6, 9)]}
    )
    found = plan(fn, base, config, jnp.ones((2, 6)))
    drawn = jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape), found.init(jax.random.key(0))
    )
    tuned = dict(merge(base, drawn), b=base["b"] + 1)
    adapters, errors = extract(base, tuned, found)
    assert adapters.keys() == drawn.keys() and errors["b"] == 1.0 and "o" not in errors
    for name, one in drawn.items():
        assert adapters[name].scale == one.scale == 5 / 3 and errors[name] < 1e-5
        assert adapters[name].columns == one.columns
        assert rel_l2(np.asarray(delta(adapters[name])), np.float64(delta(one))) < 1e-5
    np.testing.assert_allclose(merge(base, adapters)["qkv"], tuned["qkv"], atol=1e-5)


def test_checkpoints_that_differ_are_refused_with_every_difference():
    base = {"w": jnp.ones((3, 4)), "v": jnp.ones((3, 4)), "x": jnp.ones(2), "n": jnp.ones((2, 2))}
    tuned = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 4), jnp.bfloat16), "y": jnp.ones(2)}
    tuned["n"] = base["n"].at[0, 0].set(jnp.nan)
    with pytest.raises(AdapterError) as raised:
        extract(base, tuned, {"w": "io", "u": "io", "v": "i", "n": "io"}, r=1)
    said = str(raised.value)
    for part in ("w: shape got (4, 3)", "v: dtype got bfloat16", "x: only in the base", "n: holds"):
        assert part in said
    assert "y: only in the tuned" in said and "u: no such" in said and "v: got axes 'i'" in said
    with pytest.raises(AdapterError, match="w: got r=0"):
        extract({"w": jnp.ones((2, 2))}, {"w": jnp.ones((2, 2))}, {"w": "io"})


def test_the_report_counts_what_rounding_left_unchanged():
    # bfloat16 has 8 bits: next to 1 the steps are 2^-7 above and 2^-8 below.
    weight = jnp.ones((1, 4), jnp.bfloat16)
    change = jnp.asarray([[2.0**-10, 2.0**-7, 0.0, 2.0**-9]])
    one = Adapter(jnp.ones((1, 1)), change, scale=1.0)
    found = merge_report({"w": weight}, {"w": one})["w"]
    assert (found.changed, found.unchanged, found.dtype) == (3, 2, "bfloat16")
    wanted = np.hypot(2.0**-10, 2.0**-9) / np.linalg.norm(np.float64(change))
    assert found.error == pytest.approx(wanted, rel=1e-12)
    assert "2 of 3 values stay" in warnings_of({"w": found})[0]
    assert not warnings_of(merge_report({"w": weight.astype(jnp.float32)}, {"w": one}))


def test_a_small_delta_is_lost_in_bfloat16_and_said_so():
    """peft-facts: a B of about 1e-4 merged into bfloat16 lost most of itself."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(64, 48)) * 0.5, jnp.bfloat16)
    a, b = rng.uniform(-0.125, 0.125, (64, 8)), rng.normal(size=(8, 48)) * 1e-4
    one = Adapter(jnp.float32(a), jnp.float32(b), scale=2.0)
    found = merge_report({"w": weight}, {"w": one})["w"]
    wide = np.asarray(weight, np.float64)
    change = np.einsum("ir,ro->io", np.float64(np.float32(a)), np.float64(np.float32(b))) * 2
    stored = (wide + change).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    wanted = np.linalg.norm(stored - wide - change) / np.linalg.norm(change)
    assert found.error == pytest.approx(wanted, rel=1e-2)
    assert found.unchanged == (stored == wide).sum() and found.unchanged > 0.9 * found.changed
    assert "takes" in str(found.warning)


def test_several_parts_of_one_weight_are_reported_together():
    params = {"w": jnp.ones((6, 9)), "b": jnp.ones(9)}
    parts = {
        f"w[{i}:{j}]": Adapter(jnp.ones((6, 1)), jnp.ones((1, j - i)), 1.0, columns=(i, j))
        for i, j in ((0, 3), (6, 9))
    }
    report = merge_report(params, parts | {"b": Full(jnp.zeros(9))})
    assert list(report) == ["w"] and report["w"].changed == 36 and report["w"].error == 0.0
    with pytest.raises(AdapterError, match="z: no such parameter"):
        merge_report(params, {"z": draw("io")})
