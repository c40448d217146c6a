"""``trajectory``: the same training in JAX and in PyTorch, step by step, beside its own noise.

No fixed tolerance over N steps is right, since training amplifies rounding. So the distance of
the two is held to that of one framework from itself with its sums in another order. numpy only;
``jax_runs`` and ``torch_runs`` make the runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from ...core.errors import ParityError, raise_all
from ..assert_frozen import moved
from ..tensors import Tensors
from ..verdicts import TensorVerdict, Verdict

# How many times the widest of a few noisy runs the distance may be: healthy runs stay below 1.
FACTOR = 2.0

# A loss that moved by less than this share shows nothing about training.
SMALLEST_MOVE = 1e-2


@dataclass(frozen=True)
class Step:
    """Where a run stands.

    Args:
        values: everything that is trained, by JAX's names and in JAX's layout.
        loss: that led to this step; NaN at the start.
        frozen: everything that must not move.
    """

    values: Tensors
    loss: float = math.nan
    frozen: Tensors = field(default_factory=dict)


Run = Callable[[int | None], Iterator[Step]]
"""Gives the start and then each step. With a seed it is noisy: sums are in another order, and the
start is off by one rounding. With None it is plain."""


@dataclass(frozen=True)
class Trajectory:
    """What ``trajectory`` found; lists have a number for each step, the first for step 1.

    Args:
        distance: between JAX and PyTorch, in units of the path's length so far.
        band: the widest distance of PyTorch's (or JAX's) noisy runs from its plain one.
        factor: how many times the band the distance may be.
        length: of PyTorch's path so far: the norms of all its updates, added up.
        jax_losses: of each step.
        torch_losses: of each step.
        jax_to_truth: distances from the run in float64; empty where there is none.
        torch_to_truth: the same for PyTorch.
        moved: the frozen leaves that moved, each a line.
    """

    distance: list[float]
    band: list[float]
    factor: float
    length: list[float]
    jax_losses: list[float]
    torch_losses: list[float]
    jax_to_truth: list[float] = field(default_factory=list)
    torch_to_truth: list[float] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)

    @property
    def horizon(self) -> int | None:
        """The first step at which the distance leaves the band; None where it never does."""
        # Negated, so that NaN leaves it.
        pairs = zip(self.distance, self.band, strict=True)
        outside = (n for n, (d, b) in enumerate(pairs, 1) if not d <= self.factor * b)
        return next(outside, None)

    @property
    def widest(self) -> float:
        """The largest distance in units of the band."""
        pairs = zip(self.distance, self.band, strict=True)
        return max(d / b if b else math.inf * d if d else 0.0 for d, b in pairs)

    @property
    def verdict(self) -> Verdict:
        """``EXACT``, ``ORDER_ONLY``, ``MISMATCH``, or ``VACUOUS`` where nothing was learned."""
        if self.moved or self.horizon is not None:
            return Verdict.MISMATCH
        if self._vacuous:
            return Verdict.VACUOUS
        return Verdict.ORDER_ONLY if any(self.distance) else Verdict.EXACT

    @property
    def why(self) -> str:
        """The reason for the verdict in one line; empty where all is well."""
        if self.moved:
            return f"frozen leaves moved: {'; '.join(self.moved)}"
        if at := self.horizon:
            d, b = self.distance[at - 1], self.band[at - 1]
            return f"at step {at} of {len(self.distance)} apart by {d:.1e}, noise alone {b:.1e}"
        return self._vacuous

    @property
    def _vacuous(self) -> str:
        losses = np.array(self.torch_losses)
        if not self.length[-1]:
            return "nothing moved"
        if not np.ptp(losses) > SMALLEST_MOVE * np.abs(losses).max():
            return f"the loss moved from {losses.min():.6g} to {losses.max():.6g} alone"
        return ""

    def as_verdict(self, name: str = "trajectory") -> TensorVerdict:
        """Return this as the verdict of a check, with the last distances from the truth."""
        ends = [side[-1] if side else math.nan for side in (self.jax_to_truth, self.torch_to_truth)]
        bound = self.factor * self.band[-1]
        return TensorVerdict(name, self.verdict, ends[0], ends[1], bound=bound, why=self.why)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for ``Report.trajectories``."""
        said = {"horizon": self.horizon, "verdict": str(self.verdict), "why": self.why}
        return asdict(self) | said

    def __str__(self) -> str:
        steps = len(self.distance)
        end = f"leaves it at step {self.horizon}" if self.horizon else f"stays in it for {steps}"
        said = (
            f"{self.verdict}: apart by {self.distance[-1]:.1e} of the path after {steps} steps; at "
            f"most {self.widest:.2f} of the noise band, {end} (factor {self.factor:g})."
        )
        if self.jax_to_truth:
            ends = self.jax_to_truth[-1], self.torch_to_truth[-1]
            said += f" From the truth: jax {ends[0]:.1e}, torch {ends[1]:.1e}."
        return f"{said} {self.why}".rstrip()


def trajectory(
    jax: Run,
    torch: Run,
    *,
    steps: int = 150,
    seeds: Sequence[int] = (1, 2, 3),
    factor: float = FACTOR,
    noise: str = "torch",
    truth: Run | None = None,
) -> Trajectory:
    """Run both side by side, and one against itself, and say where they part.

    ``d_t = ‖θ_jax − θ_torch‖ / Σ_{s ≤ t} ‖θ_s − θ_{s−1}‖``, over all trained tensors; the band is
    the largest ``d_t`` of a noisy run of one framework from its plain one.

    Args:
        jax: JAX's run (see ``jax_runs.jax_run``, or write a generator).
        torch: PyTorch's (see ``torch_runs.torch_run``).
        steps: how many.
        seeds: of the noisy runs.
        factor: how many times the band the distance may be.
        noise: whose noise the band is, ``"torch"`` or ``"jax"``.
        truth: a run in float64, to say who is further from it.

    Raises:
        ParityError: the runs do not start at the same values, or end early; lists what differs.

    >>> def run(seed):
    ...     w, rate = np.float32(1), np.float32(0.1)
    ...     w += 0 if seed is None else np.float32(6e-8 * seed)
    ...     yield Step({"w": np.array([w])})
    ...     while True:
    ...         loss, w = float(w * w), w - rate * w
    ...         yield Step({"w": np.array([w])}, loss)
    >>> print(trajectory(run, run, steps=20))
    EXACT: apart by 0.0e+00 of the path after 20 steps; at most 0.00 of the noise band, stays ...
    """
    if noise not in ("torch", "jax") or not seeds or steps < 1:
        raise ParityError(f"got noise={noise!r}, {len(seeds)} seeds, {steps} steps")
    noisy = {"torch": torch, "jax": jax}[noise]
    sides = [jax(None), torch(None), *(noisy(seed) for seed in seeds)]
    sides += [] if truth is None else [truth(None)]
    rows = zip(*(islice(side, steps + 1) for side in sides), strict=False)
    first = next(rows, None)
    if first is None:
        raise ParityError("a run gave nothing, wanted the start and then each step")
    _refuse(first[0], first[1])
    kept = [{n: np.array(v) for n, v in one.frozen.items()} for one in first[:2]]
    found = Trajectory([], [], factor, [], [], [])
    previous, length, last = _flat(first[1].values), 0.0, first
    for last in rows:
        flat = [_flat(one.values) for one in last]
        length += float(np.linalg.norm(flat[1] - previous))
        previous = flat[1]
        _add(found, flat, len(seeds), length, noise)
        found.jax_losses.append(last[0].loss)
        found.torch_losses.append(last[1].loss)
    if len(found.distance) < steps:
        raise ParityError(f"a run ended after {len(found.distance)} steps, wanted {steps}")
    for side, before, one in zip(("jax", "torch"), kept, last[:2], strict=True):
        found.moved.extend(f"{side} {line}" for line in moved(before, one.frozen))
    return found


def _add(found: Trajectory, flat: Sequence[Any], seeds: int, length: float, noise: str) -> None:
    def apart(one: Any, two: Any) -> float:
        with np.errstate(invalid="ignore"):  # two infinite runs are apart by NaN
            return float(np.linalg.norm(one - two)) / length if length else 0.0

    plain = flat[1] if noise == "torch" else flat[0]
    found.length.append(length)
    found.distance.append(apart(flat[0], flat[1]))
    found.band.append(max(apart(one, plain) for one in flat[2 : 2 + seeds]))
    if len(flat) > 2 + seeds:
        found.jax_to_truth.append(apart(flat[0], flat[-1]))
        found.torch_to_truth.append(apart(flat[1], flat[-1]))


def _flat(values: Tensors) -> Any:
    return np.concatenate([values[name].astype(np.float64).ravel() for name in sorted(values)])


def _refuse(ours: Step, theirs: Step) -> None:
    problems = [f"trained {line}" for line in moved(ours.values, theirs.values)]
    raise_all(ParityError, "PyTorch starts with others than JAX", problems)
