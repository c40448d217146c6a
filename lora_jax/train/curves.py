"""What training leaves behind to look at: metrics as JSON lines, and the curves as a PNG."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..core.errors import OutputError
from ..core.extras import require
from .loop import EpochEvent, Event, StepEvent, StopEvent

_KINDS = {StepEvent: "step", EpochEvent: "epoch", StopEvent: "stop"}
_TRAIN, _VALIDATION, _GRID = "#2563b0", "#d9622b", "#d5d8dc"


def to_json(event: Event) -> dict[str, Any]:
    """Return an event as an object for the metrics file; adapters are left out.

    >>> to_json(StopEvent(step=9, reason="finished"))
    {'event': 'stop', 'step': 9, 'reason': 'finished'}
    """
    values = plain(event)
    values.pop("adapters", None)
    return {"event": _KINDS[type(event)]} | values


def plain(instance: Any) -> dict[str, Any]:
    """Return a dataclass's fields as JSON has them: paths as text, and no NaN but ``None``."""
    return {f.name: _plain(getattr(instance, f.name)) for f in fields(instance)}


def append(path: Path, event: Event) -> None:
    """Add one event as one line to a JSON-lines file, so that a killed run leaves its history.

    Raises:
        OutputError: the file cannot be written.
    """
    line = json.dumps(to_json(event), allow_nan=False)
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def curves(events: Sequence[Event], title: str) -> bytes:
    """Return a PNG with the loss by step and the accuracy by epoch.

    Args:
        events: what the loop reported.
        title: stands above both panels.

    Raises:
        AssetError: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [event for event in events if isinstance(event, StepEvent)]
    epochs = [event for event in events if isinstance(event, EpochEvent)]
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    left, right = figure.subplots(1, 2)
    _draw_loss(left, steps, epochs)
    _draw_accuracy(right, epochs)
    for axes in (left, right):
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_loss(axes: Any, steps: Sequence[StepEvent], epochs: Sequence[EpochEvent]) -> None:
    x, loss = [event.step for event in steps], [event.loss for event in steps]
    axes.plot(x, loss, color=_TRAIN, alpha=0.3, linewidth=1, label="training, each step")
    smooth = _smooth(steps)
    axes.plot(x, smooth, color=_TRAIN, linewidth=1.8, label="training, smoothed")
    held_out = [event.validation_loss for event in epochs]
    ends = [event.step for event in epochs]
    axes.plot(ends, held_out, "o-", color=_VALIDATION, linewidth=1.8, label="validation")
    axes.set(title="Loss", xlabel="step", ylabel="cross-entropy (nats per text)")
    axes.set_xlim(left=0)
    # One batch far out, such as a last one of a single text, may leave the picture.
    axes.set_ylim(0, min(1.5 * _highest([*smooth, *held_out]), 1.05 * _highest([*loss, *held_out])))
    axes.legend(frameon=False, loc="best")


def _draw_accuracy(axes: Any, epochs: Sequence[EpochEvent]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    x = [event.epoch for event in epochs]
    train = [event.train_accuracy for event in epochs]
    held_out = [event.validation_accuracy for event in epochs]
    axes.plot(x, train, "o-", color=_TRAIN, linewidth=1.8, label="training, mean of the epoch")
    axes.plot(x, held_out, "o-", color=_VALIDATION, linewidth=1.8, label="validation, at its end")
    axes.set(title="Accuracy", xlabel="epoch", ylabel="texts classified correctly (%)")
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    axes.set_xlim(0.8, max(x, default=1) + 0.2)
    axes.set_ylim(top=1.01)
    axes.legend(frameon=False, loc="lower right")


def _smooth(steps: Sequence[StepEvent], keep: float = 0.9) -> list[float]:
    """Exponential mean over rows, corrected for its start as in Adam."""
    total, rows, smoothed = 0.0, 0.0, []
    for step in steps:
        total, rows = keep * total + step.rows * step.loss, keep * rows + step.rows
        smoothed.append(total / rows)
    return smoothed


def _highest(values: Sequence[float]) -> float:
    return max((value for value in values if math.isfinite(value) and value > 0), default=1.0)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
