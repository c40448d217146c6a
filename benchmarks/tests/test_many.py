"""The cases of many adapters, merging, files and planning, and the fitted growth; no times."""

from __future__ import annotations

import dataclasses
import io
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks.case import BenchmarkError, Case, Contestant, Work
from benchmarks.cases import (
    CASES,
    decoder,
    decoder_step,
    files,
    growing,
    many,
    merging,
    planning,
    serving,
    stack,
)
from benchmarks.measure import harness
from benchmarks.measure.harness import Result, Timing
from benchmarks.show import growth, tables
from benchmarks.show.report import Report, from_json, to_json
from lora_jax import merge
from lora_jax.rewrite.frugality import count

TINY = stack.Sizes(width=8, hidden=24)
FILES = files.Sizes(layers=2, width=12, keys=6, hidden=20)
DEEP = decoder.Sizes(layers=2, width=8, hidden=12, heads=2, vocabulary=11, rows=1, tokens=5)


def run(case):
    return harness.run(dataclasses.replace(case, rounds=1, warm_up=0))


# The fitted exponents.


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.37, 2.0, 3.0])
def test_a_planted_exponent_is_found(exponent):
    sizes = [4, 64, 1, 16]
    found = growth.fit(sizes, [3e-4 * size**exponent for size in sizes])
    assert found.every.sizes == (1, 4, 16, 64) and found.largest.sizes == (4, 16, 64)
    for slope in (found.every, found.largest):
        assert slope.exponent == pytest.approx(exponent, abs=1e-9)
        assert slope.interval == pytest.approx((exponent, exponent), abs=1e-6)


def test_a_fixed_cost_hides_the_growth_at_small_sizes_but_not_at_the_largest():
    sizes = [2**n for n in range(11)]
    found = growth.fit(sizes, [1.0 + 0.02 * size**2 for size in sizes])
    assert found.every.exponent < 1.6 and abs(found.largest.exponent - 2) < 0.01
    low, high = found.every.interval
    assert not low <= 2 <= high


@pytest.mark.parametrize("n", [3, 5, 9])
def test_the_interval_holds_the_exponent_as_often_as_it_says(n):
    rng, sizes, held = np.random.default_rng(n), [2**k for k in range(n)], []
    for _ in range(1000):
        seconds = [size**1.5 * np.exp(0.1 * rng.normal()) for size in sizes]
        low, high = growth.fit(sizes, seconds).every.interval
        held.append(low <= 1.5 <= high)
    assert 0.93 <= np.mean(held) <= 0.97


def test_two_sizes_have_an_exponent_and_no_interval():
    found = growth.fit([1, 10], [2.0, 20.0])
    assert found.every == found.largest
    assert found.every.exponent == pytest.approx(1) and found.every.interval is None


def test_every_reason_why_no_exponent_can_be_fitted_is_listed():
    with pytest.raises(BenchmarkError) as error:
        growth.fit([0, 0], [1.0, -1.0, float("inf")])
    for part in (
        "got 3, wanted one for each of 2 sizes",
        "got [0], wanted at least two",
        "got [0, 0], wanted each once",
        "got [0, 0], wanted more than 0",
        "got [-1.0, inf], wanted more than 0 and finite",
    ):
        assert part in str(error.value)


def result(group, sizes, crowd=0.0, jitter=0.0, **seconds):
    timings = tuple(
        Timing(name, {}, {}, 0.0, seconds=tuple(value * (1 + jitter * n) for n in range(-3, 4)))
        for name, value in seconds.items()
    )
    name = "-".join([group, *map(str, sizes.values())])
    return Result(name, "", 0.0, 0.0, 1, timings, crowd, sizes=sizes, group=group)


def planted(**more):
    """A star about layers 4, width 16: time grows as layers * width^2; another by width alone."""
    points = [(2, 16), (4, 16), (8, 16), (4, 8), (4, 32)]
    star = [
        result("star", {"layers": n, "width": w}, a=1e-3 * n * w**2, b=1e-2 * w, **more)
        for n, w in points
    ]
    return (*star, result("alone", {"layers": 4}, a=1.0), result("", {"layers": 2}, a=1.0))


def text(report):
    out = io.StringIO()
    Console(width=180, file=out).print(tables.render(report))
    return out.getvalue()


def test_every_group_contestant_and_axis_of_a_report_gets_its_exponent():
    report = from_json(to_json(Report({}, planted())))
    found = {(one.group, one.contestant, one.axis): one for one in growth.growths(report)}
    wanted = {("a", "layers"): 1, ("a", "width"): 2, ("b", "layers"): 0, ("b", "width"): 1}
    assert found.keys() == {("star", *key) for key in wanted}
    for key, exponent in wanted.items():
        one = found["star", *key]
        assert one.growth.every.exponent == pytest.approx(exponent, abs=1e-9) and not one.noise
    assert found["star", "a", "layers"].fixed == {"width": 16}
    assert found["star", "a", "width"].growth.every.sizes == (8, 16, 32)
    shown = text(report)
    assert "layers, width 16" in shown and "2.00 (2.00 to 2.00)" in shown


@pytest.mark.parametrize("more", [{"jitter": 0.1}, {"crowd": 0.5}])
def test_noise_is_shown_and_no_exponent(more):
    report = Report({}, planted(**more))
    assert all(one.noise and "star-4-16: " in " ".join(one.noise) for one in growth.growths(report))
    assert "noisy" in text(report) and "2.00 (" not in text(report)


def test_a_report_without_groups_shows_no_growth():
    assert "growth" not in text(Report({}, (result("", {}, a=1.0),)))


# The cases, with sizes that take no time.


def cases():
    return [
        many.case(3, 4, TINY),
        serving.case(3, 2, rows=6, sizes=TINY),
        serving.or_one(2, rows=4, sizes=TINY),
        merging.case(dataclasses.replace(TINY, layers=2)),
        files.saving(FILES),
        files.loading(FILES),
        planning.case(DEEP),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_all_contestants_of_a_case_take_part_with_equal_results(case):
    found = run(case)
    assert found.difference <= case.tolerance and not found.skipped
    assert [timing.contestant for timing in found.timings] == [c.name for c in case.contestants]


def ours_against(case, other):
    """Run our contestant, and one that must be refused, alone."""
    wrong = Contestant("wrong", other)
    return run(dataclasses.replace(case, contestants=(case.contestants[0], wrong)))


def test_scales_of_another_adapter_are_refused():
    case, work = many.case(3, 4, TINY), many.given(3, 4, TINY)
    swapped = tuple(
        {path: dataclasses.replace(pair, scale=0.5) for path, pair in one.items()}
        for one in work.adapters
    )
    wrong = dataclasses.replace(work, adapters=swapped)
    with pytest.raises(BenchmarkError, match="wrong: "):
        ours_against(case, lambda: many.stacked_work(many.together, wrong))


def test_a_row_that_gets_another_rows_adapter_is_refused():
    case = serving.case(3, 2, rows=6, sizes=TINY)
    work = serving.given(serving.different(3, TINY), 6, 2, TINY)
    wrong = dataclasses.replace(work, indices=tuple(np.roll(one, 1) for one in work.indices))
    with pytest.raises(BenchmarkError, match="wrong: result of step 1"):
        ours_against(case, lambda: serving.mixed_work(wrong))


def test_adapters_that_agree_do_so_in_their_product_alone():
    base = stack.draw(TINY)
    first, *others = serving.agreeing(4, TINY)
    for path in first:
        factors = [one[path] for one in (first, *others)]
        for one, two in itertools.combinations(factors, 2):
            assert np.linalg.norm(one.a - two.a) > 0.1 * np.linalg.norm(one.a)
            mixed = dict(first) | {path: dataclasses.replace(one, b=two.b)}
            assert relative(merge(base, mixed), merge(base, first)) > 1e-2
    for one in others:
        assert relative(merge(base, one), merge(base, first)) < 1e-6


def relative(one, two):
    gaps = [
        (np.linalg.norm(a - b), np.linalg.norm(b))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    ]
    return max(gap / size for gap, size in gaps)


def test_the_least_work_is_what_the_programs_count():
    sizes = stack.Sizes(width=64, hidden=160)
    work = many.given(2, 48, sizes)
    program = many.stacked_work(many.together, work)
    assert program.flops == pytest.approx(many.needed(2, 48, sizes).flops, rel=0.03)
    flops = count(serving.lora(stack.forward), work.params, work.adapters[0], work.batches[0][0])
    assert flops == pytest.approx(serving.needed(1, 2, 48, sizes).flops, rel=0.03)


def test_the_files_hold_what_the_sizes_say():
    plan = files.planned(FILES)
    assert plan.trainable == FILES.factors
    assert files.Sizes().factors == 4_884_480


def test_a_save_that_leaves_the_old_file_is_refused():
    case = files.saving(FILES)
    plan = files.planned(FILES)
    first = files.drawn(plan)[0]

    def stale():
        return files._saving(lambda to: files.save_pretrained(to, plan, first, overwrite=True))

    with pytest.raises(BenchmarkError, match="wrong: .*of step 2"):
        ours_against(case, stale)


def test_what_a_step_uses_up_is_prepared_before_each_and_outside_the_clock():
    clock, ready = SimpleNamespace(now=0.0), []

    def prepare():
        clock.now += 50.0
        ready.append(1.0)

    def step():
        clock.now += 1.0
        return ready.pop() / clock.now

    case = Case("c", "", (Contestant("a", lambda: Work(step, prepare=prepare)),), 0.0, rounds=7)
    found = harness.run(case, clock=lambda: clock.now, elsewhere=lambda: None)
    assert found.timings[0].seconds == (1.0,) * 7 and found.timings[0].first_seconds == 1.0
    assert not ready


def test_groups_differ_in_their_sizes_alone():
    groups = {}
    for case in CASES.values():
        if case.group:
            groups.setdefault(case.group, []).append(case)
    assert {"plan", "rewrite_trace", "decoder_step"} <= groups.keys()
    for group in groups.values():
        sizes = [tuple(case.sizes.items()) for case in group]
        assert len(set(sizes)) == len(sizes) > 2
        assert len({tuple(c.name for c in case.contestants) for case in group}) == 1
        assert len({tuple(case.sizes) for case in group}) == 1


def test_the_decoder_grows_along_each_axis_from_one_case():
    base = decoder_step.case().sizes
    for case in growing.cases():
        (axis,) = (name for name in base if case.sizes[name] != base[name])
        assert case.name == f"decoder_{axis}_{case.sizes[axis]}" or axis == "layers"
    tiny = growing.wide(64, dataclasses.replace(decoder_step.SIZES, width=128, hidden=384, heads=2))
    assert (tiny.hidden, tiny.heads, tiny.head) == (192, 1, 64)
