"""The one training loop: it reports events, and hands on the last good adapters if stopped."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from ..core.adapter import Adapters
from ..core.errors import ConfigError, TrainingError, raise_all
from ..core.io import signals
from .data import Tokens, batches
from .step import Evaluate, State, Step

_RECENT = 32


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokens of n texts and their classes."""

    tokens: Tokens
    labels: Int32[np.ndarray, "n"]


@dataclass(frozen=True)
class LoopOptions:
    """How long to train, and in what order.

    Args:
        epochs: how often every row is seen.
        batch_size: rows in a step.
        seed: with the epoch, decides the order of the rows.
        patience: stop after this many epochs in a row without a better validation accuracy
            (or the same with a lower loss) and return the best adapters; none never stops.
        learning_rate: the rate by step, for reports.

    Raises:
        ConfigError: lists every field that is out of range.
    """

    epochs: int
    batch_size: int
    seed: int = 0
    patience: int | None = None
    learning_rate: Callable[[int], Any] = field(default=lambda step: math.nan, repr=False)

    def __post_init__(self) -> None:
        wanted = {"epochs": self.epochs, "batch_size": self.batch_size}
        wanted |= {} if self.patience is None else {"patience": self.patience}
        problems = [f"{k}: got {v}, wanted at least 1" for k, v in wanted.items() if v < 1]
        raise_all(ConfigError, "these training options are out of range", problems)

    def steps(self, rows: Rows) -> int:
        """Return the number of steps that these rows take in all epochs."""
        return self.epochs * math.ceil(len(rows.labels) / self.batch_size)


@dataclass(frozen=True)
class StepEvent:
    """After every step: loss of its rows, accuracy of the epoch so far, times in seconds."""

    epoch: int
    step: int
    total_steps: int
    rows: int
    loss: float
    accuracy: float
    learning_rate: float
    seconds: float
    samples_per_second: float
    eta: float


@dataclass(frozen=True)
class EpochEvent:
    """After every epoch; ``adapters`` can be used until the observer returns."""

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float
    adapters: Adapters = field(repr=False)


@dataclass(frozen=True)
class StopEvent:
    """At the end: why, ``"finished"`` or what stopped it early."""

    step: int
    reason: str


Event = StepEvent | EpochEvent | StopEvent
Observe = Callable[[Any], None]


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Args:
        adapters: after the last good step; with patience, after the best epoch so far.
        steps: how many were taken.
        reason: why training ended.
        median_step_seconds: of one step, the first, which compiles, left out.
    """

    adapters: Adapters
    steps: int
    reason: str
    median_step_seconds: float


@dataclass(frozen=True)
class Score:
    """Mean loss and accuracy over rows."""

    loss: float
    accuracy: float


class NotFinite(TrainingError):
    """The loss, a gradient or an update is not finite; ``trained`` holds the last good state."""

    def __init__(self, message: str, trained: Trained) -> None:
        super().__init__(message)
        self.trained = trained


class Interrupted(KeyboardInterrupt):
    """A signal to end during training, such as Ctrl-C's.

    Args:
        trained: what the last whole step left.
        number: the signal's.
    """

    def __init__(self, trained: Trained, number: int = signal.SIGINT) -> None:
        super().__init__(trained.reason)
        self.trained, self.number = trained, number


def fit(
    step: Step,
    evaluate: Evaluate,
    state: State,
    params: Any,
    train: Rows,
    validation: Rows,
    options: LoopOptions,
    observe: Observe = lambda event: None,
) -> Trained:
    """Train ``state`` and report a ``StepEvent`` for each step, an ``EpochEvent`` for each epoch.

    Args:
        step: see ``make_step``.
        evaluate: see ``make_evaluate``.
        state: see ``start``; it is donated.
        params: the frozen parameters.
        train: rows to learn from.
        validation: rows scored after each epoch.
        options: how long and in what order.
        observe: called with each event.

    Raises:
        NotFinite: a step gave a value that is not finite.
        Interrupted: ``KeyboardInterrupt``, also from ``observe``.
    """
    run = _Run(state, options, options.steps(train), observe)
    try:
        for epoch in range(1, options.epochs + 1):
            began = time.perf_counter()
            score = _epoch(run, step, params, train, epoch)
            held_out = score_rows(evaluate, params, run.state.adapters, validation, options)
            seconds = time.perf_counter() - began
            observe(_epoch_event(run, epoch, score, held_out, seconds))
            if run.is_stale(held_out):
                return run.end(f"no better validation accuracy in {options.patience} epochs")
        return run.end("finished")
    except KeyboardInterrupt as stop:
        trained = run.trained(signals.interrupted(stop))
        raise Interrupted(trained, signals.number_of(stop)) from stop


def score_rows(
    evaluate: Evaluate, params: Any, adapters: Adapters, rows: Rows, options: LoopOptions
) -> Score:
    """Return loss and accuracy over all rows."""
    tally = _Tally()
    for batch in batches(rows.tokens, rows.labels, options.batch_size):
        tally.add(jax.device_get(evaluate(params, adapters, batch)))
    return tally.score()


def _epoch(run: _Run, step: Step, params: Any, rows: Rows, epoch: int) -> Score:
    options, tally = run.options, _Tally()
    size, seed = options.batch_size, options.seed
    for batch in batches(rows.tokens, rows.labels, size, seed=seed, epoch=epoch, shuffle=True):
        began = time.perf_counter()
        # Between a donation and its result there is no state to keep.
        with signals.waiting():
            run.state, metrics = step(run.state, params, batch)
            metrics = jax.device_get(metrics)
        if not metrics.finite:
            raise NotFinite(_explain(run, epoch), run.trained("a value was not finite"))
        tally.add(metrics)
        seconds = time.perf_counter() - began
        run.observe(run.step_event(epoch, metrics, tally, seconds))
    return tally.score()


def _epoch_event(
    run: _Run, epoch: int, score: Score, validation: Score, seconds: float
) -> EpochEvent:
    return EpochEvent(
        epoch,
        run.step,
        score.loss,
        score.accuracy,
        validation.loss,
        validation.accuracy,
        seconds,
        run.state.adapters,
    )


def _explain(run: _Run, epoch: int) -> str:
    rate = float(run.options.learning_rate(run.step))
    return (
        f"the loss or a gradient is not finite at step {run.step + 1} of {run.total} (epoch "
        f"{epoch}, learning rate {rate:.3g}). The adapters of step {run.step} are kept. Try a "
        "lower learning rate, or look for broken values in the model's weights."
    )


class _Tally:
    """Sums over batches."""

    def __init__(self) -> None:
        self.loss = self.correct = self.rows = 0.0

    def add(self, metrics: Any) -> None:
        rows = float(metrics.rows)
        self.loss += float(metrics.loss) * rows
        self.correct += float(metrics.correct)
        self.rows += rows

    def score(self) -> Score:
        return Score(self.loss / self.rows, self.correct / self.rows)


class _Run:
    """What the loop carries from step to step; ``state`` is good at all times."""

    def __init__(self, state: State, options: LoopOptions, total: int, observe: Observe) -> None:
        self.state, self.options, self.total, self.observe = state, options, total, observe
        self.step = 0
        self.step_seconds: list[float] = []
        self.best: tuple[float, float] = (-math.inf, -math.inf)
        self.best_adapters: Adapters | None = None
        self.stale_epochs = 0

    def step_event(self, epoch: int, metrics: Any, tally: _Tally, seconds: float) -> StepEvent:
        rate = float(self.options.learning_rate(self.step))
        self.step += 1
        self.step_seconds.append(seconds)
        typical = self.median_seconds(last=_RECENT)
        return StepEvent(
            epoch,
            self.step,
            self.total,
            int(metrics.rows),
            float(metrics.loss),
            tally.score().accuracy,
            rate,
            seconds,
            self.options.batch_size / typical,
            typical * (self.total - self.step),
        )

    def median_seconds(self, last: int = 0) -> float:
        """Return the median of the last steps, or of all but the first, which compiles."""
        seconds = self.step_seconds[1:] or self.step_seconds or [math.nan]
        return statistics.median(seconds[-last:])

    def is_stale(self, score: Score) -> bool:
        """Remember the best adapters and tell whether patience is over."""
        if self.options.patience is None:
            return False
        if (score.accuracy, -score.loss) > self.best:
            self.best, self.stale_epochs = (score.accuracy, -score.loss), 0
            # The next step donates the state.
            self.best_adapters = jax.tree.map(jax.numpy.copy, self.state.adapters)
            return False
        self.stale_epochs += 1
        return self.stale_epochs >= self.options.patience

    def end(self, reason: str) -> Trained:
        self.observe(StopEvent(self.step, reason))
        return self.trained(reason)

    def trained(self, reason: str) -> Trained:
        adapters = self.state.adapters if self.best_adapters is None else self.best_adapters
        return Trained(adapters, int(self.state.step), reason, self.median_seconds())
