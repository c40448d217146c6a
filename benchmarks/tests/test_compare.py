"""Two runs of the benchmarks compared, on made-up figures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks.measure import stats
from benchmarks.measure.limits import Limits
from benchmarks.show import compare
from benchmarks.tests import reports


def words(found):
    return [change.verdict for change in found]


@pytest.mark.parametrize(("n", "m"), [(4, 4), (6, 6), (6, 20), (9, 30), (20, 20)])
def test_the_interval_of_two_series_holds_their_true_ratio_as_often_as_it_says(n, m):
    rng = np.random.default_rng(n)
    draws = [
        stats.compare_apart(1.5 * rng.lognormal(0, 0.03, n), rng.lognormal(0, 0.03, m)).interval
        for _ in range(1500)
    ]
    held = np.mean([low <= 1.5 <= high for low, high in draws])
    assert 0.94 <= held <= 0.995
    assert stats.compare_apart([1.0] * 3, [1.0] * 3).interval is None


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_slowdown_of_20_percent_is_detected(seed):
    before, after = reports.report(seed), reports.report(seed + 100, slower=1.2)
    found = compare.changes(before, after)
    ours = [change for change in found if change.contestant == "lora_jax"]
    assert len(ours) == 11 and set(words(ours)) == {"slower"}
    assert all(change.exceeds(1.05) for change in ours)
    assert not any(change.exceeds(1.05) for change in found if change.contestant != "lora_jax")
    assert all(change.found.ratio.median == pytest.approx(1.2, rel=0.05) for change in ours)
    back = [one for one in compare.changes(after, before) if one.contestant == "lora_jax"]
    assert set(words(back)) == {"faster"} and not any(one.exceeds(1.05) for one in back)


def test_equal_runs_raise_no_alarm_over_200_seeds():
    says, alarms = [], 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        pair = [rng.lognormal(0, 0.03, 20) for _ in range(2)]
        change = compare.Change("c", "ours", 1.0, 1.0, stats.compare_apart(*pair))
        says.append(change.verdict)
        alarms += change.exceeds(1.05)
    assert alarms == 0
    assert says.count("no difference shown") >= 180


def test_what_is_not_the_same_is_told():
    before = reports.report()
    first, *others = before.results
    peer = first.timings[1]
    slim = dataclasses.replace(
        first,
        timings=(first.timings[0], dataclasses.replace(peer, versions={"torch": "9"})),
        skipped={"qwix": "gone"},
    )
    other_work = dataclasses.replace(others[0], title="other work")
    after = dataclasses.replace(
        before,
        environment={**before.environment, "cores": "64", "date": "later"},
        results=(slim, other_work, *others[1:-1]),
        limits=Limits("gpu", {"float32": 5e12}, 1e12),
        failed={"merge": "it broke"},
    )
    told = dict((name, (a, b)) for name, a, b in compare.differences(before, after))
    assert told["cores"] == ("2", "64") and told["device"] == ("cpu", "gpu")
    assert told["torch"] == ("1.2.3", "9, 1.2.3") and "date" not in told
    assert told["peak, bfloat16"] == ("260 GFLOP/s", "not there")
    said = "\n".join(compare.unmatched(before, after))
    for part in (
        "layer_1: qwix: only in the earlier run; skipped in the other: gone",
        "layer_8: not compared, its work is another: ",
        "merge: only in the earlier run; the other one failed: it broke",
    ):
        assert part in said
    cases = {change.case for change in compare.changes(before, after)}
    assert not cases & {"layer_8", "merge"} and "layer_1" in cases
    assert compare.differences(before, before) == [] == compare.unmatched(before, before)


def test_noise_and_a_crowd_get_no_verdict_and_no_alarm():
    quiet, loud = reports.report(), reports.report(slower=2.0, jitter=0.3)
    found = compare.changes(quiet, loud)
    assert set(words(found)) == {"noisy"} and not any(change.exceeds(1.05) for change in found)
    crowded = dataclasses.replace(
        quiet, results=tuple(dataclasses.replace(r, cores_elsewhere=0.9) for r in quiet.results)
    )
    assert set(words(compare.changes(quiet, crowded))) == {"noisy"}
    few = dataclasses.replace(quiet.results[0].timings[0], seconds=(1.0, 1.0, 1.01))
    short = dataclasses.replace(
        quiet, results=(dataclasses.replace(quiet.results[0], timings=(few,)),)
    )
    assert words(compare.changes(short, short)) == ["too few rounds"]


def test_the_compare_command_is_a_gate(tmp_path, capsys, monkeypatch):
    files = reports.written(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    a, b, slow = (str(files / f"{name}.json") for name in ("a", "b", "slow"))
    command.main(["compare", a, b])
    said = capsys.readouterr().out
    assert "not taken in turns" in said and "0 of 57 slower" in said
    assert "versions, settings and peaks are the same" in said
    with pytest.raises(SystemExit) as stop:
        command.main(["compare", a, slow])
    assert stop.value.code == 1 and "11 of 57 slower" in capsys.readouterr().out
    command.main(["compare", a, slow, "--limit", "1.5"])
    assert "0 of 57 slower than 1.5 times" in capsys.readouterr().out


def test_every_bad_file_is_named(tmp_path, capsys):
    files = reports.written(tmp_path)
    (files / "bad.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        command.main(["compare", str(files / "bad.json"), str(files / "none.json")])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "bad.json: this is no benchmark report" in said
    assert "none.json: No such file" in said
