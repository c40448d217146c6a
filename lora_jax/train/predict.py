"""Using what ``finetune`` saved: labels for new texts, and a merged model for transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from ..adapters.merge import merge
from ..core.adapter import Adapters
from ..core.errors import ConfigError, DataError, OutputError, TrainingError, raise_all
from ..core.io.atomic_files import claimed
from ..core.shown_text import shortened
from ..models import model_files
from ..models.assets import refuse_other_layout
from ..peft import load_config, load_pretrained
from ..rewrite import lora
from . import option_limits
from .classifier import Classifier, load_classifier, read_record
from .data import batches
from .option_limits import Range, step_problems
from .reading import SURROGATE

Note = Callable[[str], None]


@dataclass(frozen=True)
class Prediction:
    """A text, its most probable class, and the probability of every class."""

    text: str
    label: str
    probability: float
    probabilities: Mapping[str, float]


def predict(
    directory: str | Path,
    texts: Sequence[str],
    *,
    model: str | None = None,
    batch_size: int = 16,
    cache: Path | None = None,
    note: Note | None = None,
) -> list[Prediction]:
    """Return the class of each text, by the adapter that ``finetune`` wrote.

    Args:
        directory: the output of ``finetune``.
        texts: what to classify.
        model: the base model, if it is no longer where the adapter says.
        batch_size: texts at a time.
        cache: where downloads are kept.
        note: called with a line at every step of a download.

    Raises:
        LoraError: there are no texts, adapter and model cannot be read or do not fit, or a
            probability is not finite.
    """
    if not texts:
        raise DataError("no text to classify; give some, or a table that has some")
    problems = [
        f"text {i}: got {text!r}, wanted Unicode text"
        for i, text in enumerate(texts, start=1)
        if SURROGATE.search(text)
    ]
    raise_all(DataError, "these texts cannot be read", problems)
    size = min(batch_size, len(texts))
    record = read_record(directory)
    found = option_limits.problems([Range("batch_size", batch_size, 1, option_limits.TOKENS)])
    found += [] if found else step_problems(size, record.max_length)
    raise_all(ConfigError, "these options are out of range", found)
    classifier, adapters = _load(directory, model, size, cache, note)
    apply = jax.jit(lora(classifier.apply))
    found = []
    for batch in batches(classifier.encode(texts), None, size):
        logits = apply(classifier.params, adapters, *batch.inputs)
        found.append(np.asarray(jax.nn.softmax(logits, axis=-1)))
    rows = np.concatenate(found)[: len(texts)]
    _refuse_not_finite(texts, rows)
    return [
        _prediction(text, classifier.classes, row) for text, row in zip(texts, rows, strict=True)
    ]


def _refuse_not_finite(texts: Sequence[str], rows: np.ndarray) -> None:
    """Raise rather than return what is no probability; weights and ids are known to be good."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=-1))
    raise_all(
        TrainingError,
        f"{len(bad):,} of {len(rows):,} texts have no finite probabilities: the values overflow "
        "in the adapted model; is lora_alpha too large, or was the training stopped by NaN?",
        [shortened(texts[int(i)], 60) for i in bad],
    )


def merge_to(
    directory: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    model: str | None = None,
    cache: Path | None = None,
    note: Note | None = None,
) -> Path:
    """Write base model and adapter as one model that plain ``transformers`` loads.

    Args:
        directory: the output of ``finetune``.
        out: a new or empty directory.
        overwrite: replace files of the same name in ``out``.
        model: the base model, if it is no longer where the adapter says.
        cache: where downloads are kept.
        note: called with a line at every step of a download.

    Raises:
        LoraError: adapter and model cannot be read or do not fit, or ``out`` cannot be written.
    """
    read_record(directory)
    with claimed(out, overwrite=overwrite) as output:
        classifier, adapters = _load(directory, model, 1, cache, note)
        if os.path.realpath(output.directory) == os.path.realpath(classifier.directory):
            raise OutputError(
                f"{out} holds the base model, which stays as it is; choose another place"
            )
        merged = merge(classifier.params, adapters)
        files = model_files(merged, classifier.directory, classes=classifier.classes, note=note)
        refuse_other_layout(output.directory, files)
        output.write(files)
    return output.directory


def _load(
    directory: str | Path, model: str | None, rows: int, cache: Path | None, note: Note | None
) -> tuple[Classifier, Adapters]:
    record, config = read_record(directory), load_config(directory)
    name = record.base_model if model is None else model
    classifier = load_classifier(name, record.classes, record.max_length, cache=cache, note=note)
    return classifier, load_pretrained(directory, classifier.plan(config, rows))


def _prediction(text: str, classes: Sequence[str], row: np.ndarray) -> Prediction:
    best = int(row.argmax())
    probabilities = {name: float(p) for name, p in zip(classes, row, strict=True)}
    return Prediction(text, classes[best], float(row[best]), probabilities)
