"""The benchmark harness itself, on a clock that the contestants move; never a wall-clock time."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import cases
from benchmarks.case import BenchmarkError, Case, Contestant, Needed, Unsupported, Work
from benchmarks.contestants.common import compiled
from benchmarks.measure import environment, harness, limits, memory, stats
from benchmarks.measure.limits import Limits
from benchmarks.show import report, rows, tables
from benchmarks.tests.clock import ROUNDS, Bench


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("factor", "said"), [(1.2, "slower"), (1 / 1.2, "faster")])
def test_a_planted_difference_of_20_percent_is_detected(seed, factor, said):
    bench = Bench(seed=seed)
    found = bench.verdict(bench.contestant("ours", factor), bench.contestant("theirs"))
    assert found.verdict.startswith(said)
    assert found.ratio.median == pytest.approx(factor, rel=0.05)
    low, high = found.interval
    assert low <= found.ratio.median <= high


def test_equal_contestants_show_no_difference_as_often_as_the_confidence_says():
    says = []
    for seed in range(200):
        bench = Bench(seed=seed)
        found = bench.verdict(bench.contestant("ours"), bench.contestant("theirs"))
        says.append(found.verdict.startswith("no difference shown"))
    assert np.mean(says) > 0.90


def test_a_drift_that_both_share_cancels_in_the_pairs():
    bench = Bench()
    drift = [1 + 0.004 * n for n in range(ROUNDS)]
    ours, theirs = ([f * t * (1 + 0.002 * bench.rng.normal()) for t in drift] for f in (1.02, 1))
    assert stats.compare(ours, theirs).verdict.startswith("slower")


@pytest.mark.parametrize("who", ["our", "their"])
def test_a_noisy_series_gets_no_verdict_and_no_ratio(who):
    bench = Bench()
    jitter = {"our": 0.02, "their": 0.02} | {who: 0.3}
    ours = bench.contestant("ours", 2.0, jitter=jitter["our"])
    result = bench.run(ours, bench.contestant("theirs", jitter=jitter["their"]))
    (found,) = report.comparisons(result).values()
    assert found.verdict.startswith("no verdict") and f"{who} times" in found.verdict
    shown = text(report.Report({}, (result,)))
    assert "noisy" in shown and "slower" not in shown
    assert f"{found.ratio.median:.3f}" not in shown


@pytest.mark.parametrize(("crowd", "shown"), [(0.8, False), (0.05, True), (None, True)])
def test_a_crowded_machine_gets_no_verdict_however_steady_the_times(crowd, shown):
    bench = Bench(crowd=crowd)
    found = bench.verdict(bench.contestant("ours", 0.2), bench.contestant("theirs"))
    assert found.verdict.startswith("faster" if shown else "no verdict: crowded, other processes")


def test_the_work_of_other_processes_is_seen():
    before = environment.elsewhere()
    if before is None:
        pytest.skip("this system does not tell")
    code = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert environment.elsewhere() - before > 0.4


def test_few_rounds_give_no_verdict():
    bench = Bench()
    found = bench.verdict(bench.contestant("ours", 2.0), bench.contestant("theirs"), rounds=5)
    assert found.verdict == "no verdict: too few rounds"


@pytest.mark.parametrize("n", [6, 9, 20, 51])
def test_the_interval_holds_the_median_as_often_as_it_says(n):
    rng = np.random.default_rng(n)
    draws = [stats.interval(rng.lognormal(size=n).tolist()) for _ in range(2000)]
    held = np.mean([low <= 1 <= high for low, high in draws])
    assert 0.94 <= held <= 0.995
    assert stats.interval(range(5)) is None


def test_steps_are_taken_in_turns_and_compilation_stands_apart():
    bench = Bench()
    ours, theirs = bench.contestant("a", 1.0, jitter=0), bench.contestant("b", 3.0, jitter=0)
    result = bench.run(ours, theirs, rounds=3, checked=2, warm_up=1)
    assert "".join(bench.order) == "aabb" + "ab" * 4
    for timing, seconds in zip(result.timings, (1.0, 3.0), strict=True):
        assert timing.setup_seconds == 5.0
        assert timing.first_seconds == 9.0 + seconds
        assert timing.seconds == pytest.approx((seconds,) * 3)
    assert result.steps_checked == 2


def test_the_progress_counts_every_step():
    bench, phases = Bench(), []
    case = Case("c", "", (bench.contestant("a"), bench.contestant("b")), 0.0, rounds=4)
    bench.run_case(case, progress=phases.append)
    assert len(phases) == case.steps == len(bench.order)
    assert list(dict.fromkeys(phases)) == [
        "c: checking a",
        "c: checking b",
        "c: warming up",
        "c: timing",
    ]


@pytest.mark.parametrize("step", [1, 4])
def test_an_unequal_contestant_is_refused_at_any_step_and_never_timed(step):
    bench = Bench()

    def contestants():
        off = bench.contestant("other", result=lambda n: (1 + 2e-6 * (n == step)) / n)
        return bench.contestant("ours"), bench.contestant("same"), off

    with pytest.raises(
        BenchmarkError, match="of step . got a|other: .*relative difference of 2.0e-06"
    ) as e:
        bench.run(*contestants())
    assert "same:" not in str(e.value)
    assert len(bench.order) == 3 * 4
    result = bench.run(*contestants(), tolerance=3e-6)
    assert result.difference == pytest.approx(2e-6, rel=1e-3)


def test_results_that_never_change_prove_nothing():
    bench = Bench()
    stuck = [bench.contestant(name, result=lambda n: 0.5) for name in "ab"]
    with pytest.raises(BenchmarkError, match="every step of a gave the same result"):
        bench.run(*stuck)


@pytest.mark.parametrize("step", [2, 15])
def test_a_result_that_is_not_finite_is_refused(step):
    bench = Bench()
    broken = bench.contestant("b", result=lambda n: math.nan if n == step else 1 / n)
    with pytest.raises(BenchmarkError, match="b: result is not finite"):
        bench.run(bench.contestant("a"), broken)


def missing():
    import peft  # noqa: F401


def unable():
    raise Unsupported("it has no merge")


@pytest.mark.parametrize(
    ("setup", "why"),
    [(missing, 'peft is not installed: pip install "lora_jax[bench]"'), (unable, "no merge")],
)
def test_who_cannot_take_part_is_in_the_table_with_the_reason(setup, why, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    bench = Bench()
    result = bench.run(bench.contestant("ours"), Contestant("theirs", setup), bench.contestant("c"))
    assert why in result.skipped["theirs"] and [t.contestant for t in result.timings] == [
        "ours",
        "c",
    ]
    shown = text(report.Report({}, (result,)))
    assert "skipped" in shown and why in shown
    with pytest.raises(BenchmarkError, match="case: theirs: "):
        bench.run(Contestant("theirs", setup), bench.contestant("ours"))


def test_arrays_are_compared_whole_and_by_name():
    def contestant(name, **arrays):
        return Contestant(name, lambda: Work(lambda: arrays))

    rng = np.random.default_rng(0)
    y, g = rng.normal(size=(4, 3)), rng.normal(size=5)
    ours = contestant("ours", y=y, g=g)
    same = dict(same=True, tolerance=1e-6, rounds=6)
    assert Bench().run(ours, contestant("b", y=y, g=g), **same).difference == 0
    bad = g.copy()
    bad[2] *= 1 + 1e-4
    for other in (contestant("b", y=y, g=bad), contestant("b", y=y), contestant("b", y=y.T, g=g)):
        with pytest.raises(BenchmarkError, match="b: "):
            Bench().run(ours, other, **same)
    with pytest.raises(BenchmarkError, match="g of ours is zero everywhere"):
        Bench().run(contestant("ours", y=y, g=0 * g), contestant("b", y=y, g=0 * g), **same)


def test_timing_stops_at_the_given_second_though_not_before_six_rounds():
    for seconds, rounds in ((1.0, 6), (9.0, 10), (1000.0, ROUNDS)):
        bench = Bench()
        one = bench.contestant("a", 1.0, jitter=0)
        result = bench.run_case(Case("c", "", (one,), 0.0, rounds=ROUNDS), seconds=seconds)
        assert len(result.timings[0].seconds) == rounds


def test_the_flops_of_a_compiled_scan_are_those_of_every_step():
    def ten(x):
        return jax.lax.scan(lambda h, _: (h @ h, None), x, None, length=10)[0]

    found = compiled(ten, jnp.ones((8, 8)))
    assert found.flops // (2 * 8**3) == 10 and found.seconds > 0
    assert found.call(jnp.zeros((8, 8))).shape == (8, 8)


def test_the_share_of_the_limit_is_what_the_peaks_say():
    bench = Bench()
    needed = Needed(flops=5 * 10**8, bytes=10**6)
    result = bench.run(bench.contestant("ours", 1.0, jitter=0), needed=needed)
    for bandwidth, share in ((1e8, 0.5), (1e6, 1.0)):
        peaks = Limits("a device", {"float32": 1e9}, bandwidth)
        (timing,) = result.timings
        assert rows.share(result, timing, peaks) == pytest.approx(share)
    assert rows.share(result, timing, None) is None


def test_measured_peaks_are_positive_and_go_through_json():
    peaks = limits.Limits("cpu", {"float32": 1e11}, 1e10, {"float32": 2e11})
    found = report.Report({}, (), peaks, {"case": "why"})
    assert report.from_json(report.to_json(found)) == found
    assert "50% of the published float32" in text(found) and "case gave no result" in text(found)


def holding(megabytes):
    def setup():
        held = np.ones(megabytes * 2**17)
        return Work(lambda: float(held[0]))

    return Contestant(f"{megabytes}", setup)


@pytest.mark.skipif(memory.resident() is None, reason="this system does not tell")
def test_a_peak_is_what_was_allocated(tmp_path):
    case = Case("c", "", (holding(10), holding(300)), 0.0)
    small, large = (memory.observe(case, name) for name in ("10", "300"))
    assert 250 * 2**20 < large.peak - small.peak < 350 * 2**20
    with pytest.raises(BenchmarkError, match="no contestant"):
        memory.observe(case, "other")


def sample():
    bench = Bench()
    more = dict(packages=("numpy",), settings=lambda: {"threads": "2"})
    result = bench.run(bench.contestant("ours", 0.5, jitter=0, **more), bench.contestant("theirs"))
    return report.Report(environment.describe(), (result,))


def text(found):
    out = io.StringIO()
    Console(width=180, file=out).print(tables.render(found))
    return out.getvalue()


def test_json_round_trips_and_its_summary_follows_from_the_raw_figures():
    found = sample()
    content = report.to_json(found)
    assert report.from_json(content) == found
    assert report.to_json(report.from_json(content)) == content
    fields = json.loads(content)
    (result,) = fields["results"]
    ours, theirs = (np.array(t["seconds"]) for t in result["timings"])
    summary = result["summary"]
    assert summary["seconds"]["ours"]["median"] == pytest.approx(np.median(ours))
    assert summary["ratios"]["theirs"]["ratio"]["median"] == pytest.approx(np.median(ours / theirs))
    assert summary["ratios"]["theirs"]["verdict"].startswith("faster")
    assert {"processor", "cores", "python", "date"} <= fields["environment"].keys()
    assert result["timings"][0]["versions"] == {"numpy": np.__version__}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"schema": 1}', b'{"schema": 2, "environment": {}}', b"\xff"]
)
def test_a_file_that_is_no_report_is_an_error(content):
    with pytest.raises(BenchmarkError):
        report.from_json(content)


def test_the_table_shows_times_ratio_check_and_settings():
    shown = text(sample())
    for part in (
        "ours",
        "theirs",
        " ms",
        "9.50 s",
        "20",
        "equal within 0.0e+00",
        "threads 2",
        "faster (",
    ):
        assert part in shown


@pytest.mark.slow
def test_the_minilm_step_runs_with_equal_results(minilm_dir, sms_path):
    case = dataclasses.replace(cases.CASES["minilm_step"], rounds=1, warm_up=0)
    result = harness.run(case)
    ours, theirs = result.timings
    assert {"jax", "optax"} <= ours.versions.keys() and "peft" in theirs.versions
    assert len(ours.seconds) == len(theirs.seconds) == 1
    assert result.difference <= case.tolerance
