"""What the commands show while they work: bars on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..core.shown_text import escaped, shortened
from ..parity.reports.checks import Check
from ..train.finetune import FinetuneOptions, Note, Planned, Result
from ..train.loop import EpochEvent, StepEvent, StopEvent
from .stdout import message

if TYPE_CHECKING:
    from rich.console import Console


class Reporter:
    """Shows what ``finetune`` does: a live bar on a terminal, a few plain lines elsewhere.

    Args:
        console: where it is shown.
        epochs: of the training.
    """

    def __init__(self, console: Console, epochs: int) -> None:
        self.console, self.epochs = console, epochs
        self.saved = False
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, event: Any) -> None:
        """Show an event of ``finetune``."""
        match event:
            case Note():
                self.console.print(message(event.text))
            case Planned():
                self.planned(event)
            case StepEvent():
                self.step(event)
            case EpochEvent():
                self.saved = True
                self.console.print(_epoch_line(event, self.epochs))
            case StopEvent() if event.reason != "finished":
                self.console.print(f"stopped early: {escaped(event.reason)}")

    def planned(self, event: Planned) -> None:
        """Show the plan and the data, and begin the bar."""
        train, validation, test = event.texts
        self.console.print(event.plan.totals())
        self.console.print(f"{train} texts for training, {validation} validation, {test} test")
        self.console.print(f"test accuracy before training {event.accuracy:.1%}")
        if self.console.is_terminal:
            self.bar = _bar(self.console)
            self.task = self.bar.add_task("compiling", total=None, shown="")
            self.bar.start()

    def step(self, event: StepEvent) -> None:
        """Show how far the training is."""
        shown = (
            f"loss {event.loss:.3f}  accuracy {event.accuracy:.1%}  "
            f"{event.samples_per_second:.0f} samples/s  {_clock(event.eta)} left"
        )
        if self.bar is not None:
            name, n, total = f"epoch {event.epoch}/{self.epochs}", event.step, event.total_steps
            self.bar.update(self.task, description=name, completed=n, total=total, shown=shown)
        # Ten lines in a log, however long the training.
        elif event.step * 10 // event.total_steps > (event.step - 1) * 10 // event.total_steps:
            self.console.print(f"step {event.step}/{event.total_steps}  {shown}")


class Unbreakable:
    """A stream whose loss stops nobody: a pipe that was closed, a terminal that is gone.

    Args:
        stream: what is written to until that fails.
        last: what is then said once, on standard error.
    """

    def __init__(self, stream: Any, last: str) -> None:
        self.stream, self.last = stream, last

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """Tell whether it is a terminal that is there."""
        return self.stream is not None and self.stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, do: Callable[[Any], object]) -> None:
        if self.stream is None:
            return
        try:
            do(self.stream)
        except OSError:
            lost, self.stream = self.stream, None
            silence(lost)
            warn(self.last)


def warn(line: str) -> None:
    """Say something on standard error, if that is there."""
    try:
        sys.stderr.write(f"lora-jax: {line}\n")
        sys.stderr.flush()
    except (OSError, AttributeError):
        silence(sys.stderr)


def silence(stream: Any) -> None:
    """Have what a lost stream still holds, and all that follows, go nowhere.

    The interpreter flushes its streams when it ends, and would complain.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def summarise(console: Console, result: Result, options: FinetuneOptions) -> None:
    """Print what came of a training run, and the command that uses it."""
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    step = f"{result.median_step_seconds:.3f} s"
    for name, value in {
        "trained parameters": f"{result.trainable:,} ({result.share:.4%} of all)",
        "test accuracy": f"{result.accuracy_before:.1%} before, {result.accuracy_after:.1%} after",
        "training time": f"{result.seconds:.1f} s, {result.steps} steps of {step} (median)",
        "adapter size": f"{result.adapter_bytes:,} bytes",
        "adapter": str(result.directory),
    }.items():
        table.add_row(name, escaped(value))
    console.print(table)
    directory = shlex.quote(escaped(result.directory))
    texts = '"some text"' if options.data else '"You have won a prize. Call 09061701461 to claim"'
    console.print(f"next: lora-jax predict {directory} {texts}")


def counted(checks: Sequence[Check]) -> Iterator[Check]:
    """Yield the checks, and show how many are done and how much time is left."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    total, begin, shown = len(checks), time.monotonic(), ""
    # A bar on a terminal; ten lines elsewhere, and none for a pair.
    with _bar(console) if console.is_terminal else contextlib.nullcontext() as bar:
        task = bar.add_task("checks", total=total, shown="") if bar else None
        for n, check in enumerate(checks):
            if n:
                shown = f"{_clock((time.monotonic() - begin) / n * (total - n))} left"
            if bar:
                name = escaped(shortened(check.name, 40))
                bar.update(task, completed=n, description=name, shown=shown)
            elif n * 10 // total > (n - 1) * 10 // total and n:
                console.print(f"{n} of {total} checks  {shown}")
            yield check
        if bar:
            bar.update(task, completed=total, description="checks", shown="done")


def _bar(console: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    name, shown = TextColumn("{task.description}"), TextColumn("{task.fields[shown]}")
    bar = BarColumn(bar_width=None)  # takes the width that the text leaves
    return Progress(name, bar, MofNCompleteColumn(), shown, console=console, expand=True)


def _epoch_line(event: EpochEvent, epochs: int) -> str:
    return (
        f"epoch {event.epoch}/{epochs} in {event.seconds:.1f} s: "
        f"training loss {event.train_loss:.3f}, accuracy {event.train_accuracy:.1%}; "
        f"validation loss {event.validation_loss:.3f}, accuracy {event.validation_accuracy:.1%}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
