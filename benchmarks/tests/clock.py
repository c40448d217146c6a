"""A clock and contestants that move it, so that no test waits for one."""

from __future__ import annotations

import itertools
import math

import numpy as np

from benchmarks.case import Case, Contestant, Work
from benchmarks.measure import harness
from benchmarks.show import report

ROUNDS = 20


class Bench:
    """A clock and contestants whose steps take what the test says."""

    def __init__(self, *, seed=0, crowd=0.0):
        self.now, self.crowd = 0.0, crowd
        self.order = []
        self.rng = np.random.default_rng(seed)

    def clock(self):
        return self.now

    def elsewhere(self):
        return None if self.crowd is None else self.crowd * self.now

    def contestant(self, name, seconds=1.0, *, jitter=0.03, compiling=9.0, result=None, **fields):
        losses = (1 / n for n in itertools.count(1)) if result is None else map(result, counting())

        def setup():
            self.now += 5.0
            first = itertools.chain([compiling], itertools.repeat(0.0))

            def step():
                self.order.append(name)
                self.now += next(first) + seconds * math.exp(jitter * self.rng.normal())
                return next(losses)

            return Work(step)

        return Contestant(name, setup, **fields)

    def run(self, *contestants, rounds=ROUNDS, **fields):
        fields = dict(tolerance=1e-6) | fields
        case = Case("case", "a title", contestants, rounds=rounds, **fields)
        return self.run_case(case)

    def run_case(self, case, **more):
        return harness.run(case, clock=self.clock, elsewhere=self.elsewhere, **more)

    def verdict(self, *contestants, **fields):
        result = self.run(*contestants, **fields)
        (comparison,) = report.comparisons(result).values()
        return comparison


def counting():
    return itertools.count(1)
