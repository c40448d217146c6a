"""The layer cases: each contestant does the same work at a tiny size, and a wrong one is refused.

Never a wall-clock time.
"""

import itertools
import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from benchmarks.case import BenchmarkError, Contestant, Unsupported, Work
from benchmarks.cases import layers
from benchmarks.contestants import layer_peers, layer_torch
from benchmarks.contestants.layer import SCALE, Given, Layer, draw
from benchmarks.measure import harness

TINY = (5, 12, 7, 3)
NAMES = [name for name, *_ in layers.CONTESTANTS]
# These compile C++, or take seconds to import.
HEAVY = [name for name in NAMES if "compiled" in name or name in ("keras", "quax")]
WORKS = [(dtype, backward) for dtype in layers.TOLERANCE for backward in (True, False)]


def marked(name, *others):
    label = "-".join(map(str, (name, *others)))
    marks = [pytest.mark.slow] * (name in HEAVY)
    return pytest.param(name, *others, marks=marks, id=label)


# The default run takes every fourth cell: each contestant once, the works in turns.
CELLS = [
    marked(name, *WORKS[(n + m) % len(WORKS)])
    for n, name in enumerate(NAMES)
    for m in range(len(WORKS))
]


@pytest.fixture(autouse=True)
def as_users_run_it():
    """The peers mix bfloat16 with float32, which the tests' strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def by_hand(layer):
    """The results in float64, from the formulas."""
    one = draw(layer)
    x, w, a, b, g = (array.astype(np.float64) for array in (one.x, one.w, one.a, one.b, one.g))
    found = {"y": x @ w + SCALE * x @ a @ b}
    if layer.backward:
        found["dx"] = g @ w.T + SCALE * g @ b.T @ a.T
        found["dA"] = SCALE * x.T @ g @ b.T
        found["dB"] = SCALE * (x @ a).T @ g
    return found


def hand(layer):
    expected = by_hand(layer)
    return Contestant("by hand", lambda: Work(lambda: expected))


def small(layer, *names):
    case = layers.case(layer)
    chosen = tuple(one for one in case.contestants if one.name in names)
    return replace(case, contestants=chosen, rounds=1, warm_up=0)


def against_the_formulas(layer, *names):
    case = small(layer, *names)
    return replace(case, contestants=(hand(layer), *case.contestants))


@pytest.mark.parametrize(("name", "dtype", "backward"), CELLS)
def test_each_contestant_does_the_work_of_the_formulas(name, dtype, backward):
    if "compiled" in name and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    layer = Layer(*TINY, dtype, backward)
    case = against_the_formulas(layer, name)
    result = harness.run(case)
    assert not result.skipped and result.difference <= layers.TOLERANCE[dtype]
    _, one = case.contestants
    found = one.setup()
    lacking = one.lacks if backward else ()
    assert found.read(found.step()).keys() == by_hand(layer).keys() - set(lacking)


@pytest.mark.parametrize("name", [marked(name) for name in NAMES if "compiled" not in name])
def test_a_wrong_scale_in_one_contestant_is_refused(name, monkeypatch):
    wrong = 1.1 * SCALE
    monkeypatch.setattr(Layer, "alpha", property(lambda self: wrong * self.r))
    monkeypatch.setattr(layer_peers, "SCALE", wrong)
    monkeypatch.setattr(Given, "merged", property(lambda self: self.w + wrong * self.a @ self.b))
    with pytest.raises(BenchmarkError, match=re.escape(f"{name}: ") + ".*relative difference"):
        harness.run(against_the_formulas(Layer(*TINY, "bfloat16"), name))


def test_only_a_bound_lacks_results_and_only_those_it_names():
    layer = Layer(*TINY)
    results = {key: value for key, value in by_hand(layer).items() if key != "dA"}

    def run(*lacks):
        short = Contestant("short", lambda: Work(lambda: results), lacks=lacks)
        case = replace(small(layer), contestants=(hand(layer), short))
        return harness.run(case).difference

    assert run("dA") == 0
    for lacks in ((), ("dB",)):
        with pytest.raises(BenchmarkError, match="short: dA of step 1"):
            run(*lacks)
    assert [name for name in NAMES if layers.LACKS.get(name)] == ["frozen"]


def test_gradients_do_not_add_up_from_step_to_step():
    layer, added = Layer(*TINY), itertools.count(1)

    def setup():
        return Work(lambda: {k: v * next(added) for k, v in by_hand(layer).items()})

    case = replace(layers.case(layer), contestants=(hand(layer), Contestant("adds", setup)))
    with pytest.raises(BenchmarkError, match="adds: "):
        harness.run(case)


def test_without_a_compiler_who_compiles_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(layer_torch.shutil, "which", lambda name: None)
    with pytest.raises(Unsupported, match="needs a C.. compiler, and there is no"):
        layer_torch.peft(Layer(*TINY), compiled=True)


@pytest.mark.slow
def test_keras_on_another_backend_is_left_out_with_the_reason(monkeypatch):
    keras = pytest.importorskip("keras")
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(Unsupported, match="keras runs on torch: set KERAS_BACKEND=jax"):
        layer_peers.keras(Layer(*TINY))


def test_what_is_needed_is_what_the_cheapest_order_of_products_costs():
    few, many = Layer(4, 10, 6, 2), Layer(1000, 10, 6, 2)
    alone, apart, within = 2 * 4 * 60, 2 * 4 * 2 * 16, 2 * 2 * 60
    assert replace(few, backward=False).needed.flops == alone + within == 720
    assert few.needed.flops == 2 * alone + within + 2 * apart
    assert replace(few, tokens=1).needed.flops == 2 * 120 + 3 * 2 * 2 * 16
    alone = 2 * 1000 * 60
    assert many.needed.flops == 3 * alone + 3 * within
    assert replace(few, backward=False).needed.bytes == 4 * (40 + 60 + 24 + 32)
    half = replace(few, dtype="bfloat16").needed
    assert half.bytes == 2 * (2 * 40 + 60 + 2 * 24) + 2 * 4 * 32 and half.dtype == "bfloat16"


def test_ours_takes_no_more_flops_than_the_usual_order():
    layer = Layer(8, 24, 16, 2)
    (ours, bound) = small(layer, "lora_jax", "frozen").contestants
    products = ours.setup().flops, bound.setup().flops
    apart = 2 * 8 * 2 * (24 + 16)
    assert products[0] - products[1] <= 3 * apart + 8 * (24 + 16) + 3 * 2 * (8 + 24 + 16)


def test_the_cases_cover_each_axis_and_groups_differ_in_one_size():
    found = layers.cases()
    chosen = list(layers.layers())
    assert len({case.name for case in found}) == len(found) == len(chosen) == 30
    for work in (True, False):
        of = [one for one in chosen if one.backward is work]
        assert {one.dtype for one in of} == set(layers.TOLERANCE)
        assert {one.tokens for one in of} >= set(layers.TOKENS)
        assert {(one.tokens, one.inputs, one.outputs) for one in of} >= {
            layers.SMALL,
            layers.SQUARE,
            layers.LARGE,
        }
    assert {one.r for one in chosen} == set(layers.RANKS)
    for group in {case.group for case in found} - {""}:
        at = [n for n, case in enumerate(found) if case.group == group]
        (name,) = {name for n in at for name in found[n].sizes}
        field = {"tokens": "tokens", "rank": "r"}[name]
        assert len({replace(chosen[n], **{field: 1}) for n in at}) == 1
        assert len(at) == len({found[n].sizes[name] for n in at}) >= 3
