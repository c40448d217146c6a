"""Whose turn it is, and what a turn of short steps takes."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from benchmarks.case import Case, Contestant, Work
from benchmarks.measure import harness, turns


def test_short_steps_are_timed_after_untimed_ones_as_many_for_everyone():
    taken = {"ours": 0, "theirs": 0}
    now = itertools.count()

    def contestant(name):
        def step():
            taken[name] += 1
            return 1.0

        return Contestant(name, lambda: Work(step))

    def run(tick):
        taken.update(ours=0, theirs=0)
        both = tuple(map(contestant, taken))
        case = Case("case", "title", both, 0.0, same=True, rounds=3, checked=1, warm_up=0)
        result = harness.run(case, clock=lambda: next(now) * tick)
        assert [len(timing.seconds) for timing in result.timings] == [3, 3]
        return dict(taken)

    # The clock ticks once in a step: of 6 ms each, four untimed ones fill the time to settle.
    assert run(0.006) == {"ours": 1 + 1 + 2 * (4 + 4), "theirs": 1 + 1 + 2 * (4 + 4)}
    assert run(0.1) == {"ours": 1 + 3, "theirs": 1 + 3}
    assert run(1e-9)["ours"] == 1 + 1 + 2 * 2 * turns.MOST_STEPS


def test_a_turn_of_short_steps_is_their_median():
    times = iter([0.001] * 21 + [9.0] * 2 + [0.003] * 18)
    clock = itertools.accumulate(itertools.chain.from_iterable((0.0, each) for each in times))
    work = Work(lambda: 1.0)
    (series,) = turns.take([("one", work)], 2, lambda: None, clock=lambda: next(clock))
    assert series == pytest.approx((0.001, 0.003))


@pytest.mark.parametrize("contestants", range(1, 15))
def test_over_the_rounds_each_contestant_follows_each_other_one_equally_often(contestants):
    rounds = contestants * (1 + contestants % 2) if contestants > 2 else 1
    rows = [turns.order(contestants, turn) for turn in range(rounds)]
    assert all(sorted(row) == list(range(contestants)) for row in rows)
    if contestants > 2:
        follows = Counter(pair for row in rows for pair in itertools.pairwise(row))
        assert len(follows) == contestants * (contestants - 1)
        assert len(set(follows.values())) == 1
