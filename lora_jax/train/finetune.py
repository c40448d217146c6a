"""The whole job: data and model in, a trained, tested and saved PEFT adapter directory out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from ..core.adapter import Adapters
from ..core.config.lora_config import ALL_LINEAR, LoraConfig
from ..core.errors import ConfigError, DataError, TrainingError, raise_all
from ..core.extras import require
from ..core.io import signals
from ..core.io.atomic_files import Output, claimed
from ..models.assets import SMS_SPAM, fetch
from ..peft.files import WEIGHTS_NAME, encoded
from ..rewrite import Plan, lora
from . import data, option_limits, reading
from .classifier import RECORD_NAME, Classifier, Record, encode_record, load_classifier
from .curves import append, curves, plain
from .data import TextData
from .loop import (
    EpochEvent,
    Event,
    Interrupted,
    LoopOptions,
    NotFinite,
    Rows,
    Trained,
    fit,
    score_rows,
)
from .option_limits import Range
from .saving import Saver
from .step import Evaluate, make_evaluate, make_step, optimizer, schedule, start

HEAD = "classifier"

# Of fewer texts a part would be empty.
FEWEST = 10


@dataclass(frozen=True)
class FinetuneOptions:
    """Train LoRA adapters and a classifier on labelled texts, test them, save them for PEFT.

    Args:
        model: directory of a BERT, hub id, or "minilm".
        data: .csv, .tsv or .jsonl table of labelled texts; if not given, the SMS Spam Collection.
        text_column: column or JSON key of the texts.
        label_column: column or JSON key of the labels.
        output: where the adapter and the reports go; a new or empty directory.
        overwrite: replace files of an earlier run in the output directory; others stay.
        r: rank of the adapters.
        lora_alpha: the low-rank update is scaled by lora_alpha / r.
        target_modules: names of the modules to adapt, or "all-linear" alone.
        epochs: how often every training text is seen.
        batch_size: texts in a step.
        max_length: tokens of a text; longer texts are cut.
        learning_rate: the peak, reached after 6 % of the steps; then it falls linearly to 0.
        weight_decay: AdamW's, on what is trained.
        seed: decides the adapters and the classifier at the start, and the order of the texts.
        split_seed: decides which texts are for training, validation and test (70, 10, 20 %).
        balance: cut every class to the size of the smallest; "auto" does so for the SMS Spam
            Collection only.
        patience: stop after this many epochs without a better validation accuracy, and keep the
            best adapters; if not given, train to the end.
        limit: use only this many texts, for a short run.
        cache: where downloads are kept; if not given, LORA_JAX_CACHE or the user's cache.
    """

    model: str = "minilm"
    data: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    output: Path = Path("runs/lora")
    overwrite: bool = False
    r: int = 8
    lora_alpha: int | float = 16
    target_modules: tuple[str, ...] = ("query", "value")
    epochs: int = 3
    batch_size: int = 16
    max_length: int = 64
    learning_rate: int | float = 1e-3
    weight_decay: int | float = 0.01
    seed: int = 0
    split_seed: int = 123
    balance: Literal["auto", "yes", "no"] = "auto"
    patience: int | None = None
    limit: int | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class Note:
    """A line about what is being done, or about something that went wrong and can wait."""

    text: str


@dataclass(frozen=True)
class Planned:
    """Before training: the plan, the texts of each part, and the untrained accuracy."""

    plan: Plan
    texts: tuple[int, int, int]
    accuracy: float


@dataclass(frozen=True)
class Result:
    """What came of it.

    Args:
        directory: the adapter.
        trainable: how many values were trained.
        share: their part of all values, adapters included.
        accuracy_before: on the test part, before the first step.
        accuracy_after: on the test part, with the saved adapter.
        loss_after: on the test part, with the saved adapter.
        steps: how many were taken.
        stop: why training ended.
        seconds: of training, compilation and validation included.
        median_step_seconds: of one step.
        adapter_bytes: size of the adapter's weights file.
    """

    directory: Path
    trainable: int
    share: float
    accuracy_before: float
    accuracy_after: float
    loss_after: float
    steps: int
    stop: str
    seconds: float
    median_step_seconds: float
    adapter_bytes: int


Observe = Callable[[Any], None]


def finetune(
    options: FinetuneOptions = FinetuneOptions(), observe: Observe = lambda event: None
) -> Result:
    """Train, test and save: PEFT's two files, ``run.json``, ``metrics.jsonl``, ``curves.png``.

    The adapter is saved after every epoch and whenever training stops; until the first time,
    the files of an earlier run stay. Equal options give byte-identical adapter files on the
    same machine. Called in the main thread, SIGTERM and SIGHUP end it as Ctrl-C does, unless
    they are ignored or have a handler of their own.

    Args:
        options: what to do; checked before anything is downloaded or compiled.
        observe: called with ``Note``, ``Planned`` and the loop's events.

    Raises:
        LoraError: something cannot be used, with what to do about it.
        NotFinite: training broke down; the last good adapters are saved.
        Interrupted: a signal to end, such as Ctrl-C's, during training; the last good adapters
            are saved.
    """
    config, loop = _check(options)
    own = None if options.data is None else _read_own(options)
    # What the first signal begins, saving, the next one must not break off.
    with signals.ending(once=True) as check:
        with claimed(options.output, overwrite=options.overwrite) as output:
            job = _prepare(options, config, loop, own, output, observe)
            return _run(job, check, observe)


def _run(job: _Job, check: Callable[[], None], observe: Observe) -> Result:
    before = score_rows(job.evaluate, job.params, job.adapters, job.test, job.loop)
    if not math.isfinite(before.loss):
        raise TrainingError(
            f"before the first step the loss on the test texts is {before.loss}: the values "
            f"overflow in the model {job.options.model} itself, so that no learning rate will do"
        )
    sizes = (len(job.train.labels), len(job.validation.labels), len(job.test.labels))
    observe(Planned(job.plan, sizes, before.accuracy))
    began = time.perf_counter()
    try:
        trained = _train(job, check, observe)
    except (NotFinite, Interrupted) as stop:
        with signals.waiting():
            job.saver.save(_files(job, stop.trained), f"step {stop.trained.steps}")
            _draw(job, stop.trained.reason)
        raise
    seconds = time.perf_counter() - began
    job.saver.save(_files(job, trained), f"step {trained.steps}")
    after = score_rows(job.evaluate, job.params, trained.adapters, job.test, job.loop)
    result = Result(
        directory=job.saver.output.directory,
        trainable=job.plan.trainable,
        share=_share(job.plan),
        accuracy_before=before.accuracy,
        accuracy_after=after.accuracy,
        loss_after=after.loss,
        steps=trained.steps,
        stop=trained.reason,
        seconds=seconds,
        median_step_seconds=trained.median_step_seconds,
        adapter_bytes=(job.saver.output.directory / WEIGHTS_NAME).stat().st_size,
    )
    # The adapter stands: what cannot be written from here on is said, and the result counts.
    job.saver.attempt(lambda: job.saver.save(_files(job, trained, result), f"step {trained.steps}"))
    _draw(job, f"test accuracy {before.accuracy:.1%} → {after.accuracy:.1%}")
    return result


@dataclass(frozen=True, eq=False)
class _Job:
    """Everything that is fixed before the first step."""

    options: FinetuneOptions
    saver: Saver
    classifier: Classifier
    plan: Plan
    adapters: Adapters
    evaluate: Evaluate
    loop: LoopOptions
    train: Rows
    validation: Rows
    test: Rows

    @property
    def params(self) -> Any:
        return self.classifier.params


def _prepare(
    options: FinetuneOptions,
    config: LoraConfig,
    loop: LoopOptions,
    own: TextData | None,
    output: Output,
    observe: Observe,
) -> _Job:
    def note(text: str) -> None:
        observe(Note(text))

    texts = _read_sms(options, note) if own is None else own
    parts = _parts(options, texts, note)
    classifier = load_classifier(
        options.model,
        texts.classes,
        options.max_length,
        seed=options.seed,
        cache=options.cache,
        note=note,
    )
    train, validation, test = (Rows(classifier.encode(p.texts), p.labels) for p in parts)
    plan = classifier.plan(config, options.batch_size)
    steps = [Range("steps of all epochs", loop.steps(train), 1, option_limits.STEPS)]
    raise_all(ConfigError, "these options are out of range", option_limits.problems(steps))
    rate = schedule(options.learning_rate, total_steps=loop.steps(train))
    return _Job(
        options=options,
        saver=Saver(output, note, append),
        classifier=classifier,
        plan=plan,
        adapters=plan.init(jax.random.key(options.seed)),
        evaluate=make_evaluate(lora(classifier.apply)),
        loop=dataclasses.replace(loop, learning_rate=rate),
        train=train,
        validation=validation,
        test=test,
    )


def _check(options: FinetuneOptions) -> tuple[LoraConfig, LoopOptions]:
    require("matplotlib", "tokenizers")
    problems = option_limits.problems(
        [
            Range("learning_rate", options.learning_rate, 0, option_limits.RATE, above=True),
            Range("weight_decay", options.weight_decay, 0, option_limits.RATE),
            Range("lora_alpha", options.lora_alpha, -option_limits.RATE, option_limits.RATE),
            Range("epochs", options.epochs, 1, option_limits.EPOCHS),
            Range("seed", options.seed, 0, option_limits.SEED),
            Range("split_seed", options.split_seed, 0, option_limits.SEED),
        ]
    )
    problems += option_limits.step_problems(options.batch_size, options.max_length)
    if options.limit is not None and options.limit < FEWEST:
        problems.append(f"limit: got {options.limit}, wanted at least {FEWEST} texts to split")
    if not options.target_modules:
        problems.append(f"target_modules: got no name, wanted some, or {ALL_LINEAR}")
    raise_all(ConfigError, "these options are out of range", problems)
    targets = options.target_modules
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else targets,
        modules_to_save=[HEAD],
    )
    loop = LoopOptions(options.epochs, options.batch_size, options.seed, options.patience)
    return config, loop


def _read_own(options: FinetuneOptions) -> TextData:
    assert options.data is not None
    return reading.read_table(options.data, options.text_column, options.label_column)


def _read_sms(options: FinetuneOptions, note: Callable[[str], None]) -> TextData:
    directory = fetch(SMS_SPAM, cache=options.cache, progress=note)
    return reading.read_sms(directory / SMS_SPAM.files[0].name)


def _parts(
    options: FinetuneOptions, texts: TextData, note: Callable[[str], None]
) -> tuple[TextData, TextData, TextData]:
    """Return the parts for training, validation and test; no text is in two of them."""
    rows = len(texts.texts)
    if (several := data.contradictions(texts)) > 0:
        note(f"texts with more than one label: {several:,}; of each the first row counts")
    texts = data.drop_duplicates(texts)
    different = len(texts.texts)
    if options.balance == "yes" or (options.balance == "auto" and options.data is None):
        texts = data.balance(texts, options.split_seed)
    if options.limit is not None:
        order = np.random.default_rng(options.split_seed).permutation(len(texts.texts))
        texts = data.take(texts, order[: options.limit])
    if (left := len(texts.texts)) < FEWEST:
        raise DataError(
            f"got {rows:,} rows with {different:,} different texts"
            + (f", {left:,} of them in classes of one size (balance)" if left < different else "")
            + f", wanted at least {FEWEST}: 70 % for training, 10 % for validation, 20 % for the "
            "test; add rows"
        )
    parts = data.split(texts, seed=options.split_seed)
    counts = np.bincount(parts[0].labels, minlength=len(texts.classes))
    more = "" if options.limit is None else "choose a larger limit, "
    raise_all(
        DataError,
        f"the training part lacks a class; {more}add texts of it, or remove it",
        [f"{name}: no text" for name, n in zip(texts.classes, counts, strict=True) if n == 0],
    )
    return parts


def _train(job: _Job, check: Callable[[], None], observe: Observe) -> Trained:
    options = job.options
    total = job.loop.steps(job.train)
    tx = optimizer(options.learning_rate, options.weight_decay, total_steps=total)

    def record(event: Event) -> None:
        check()
        job.saver.record(event)
        if isinstance(event, EpochEvent):
            trained = Trained(event.adapters, event.step, "training", math.nan)
            # The last good adapters are in memory: what cannot be written now may be at the end.
            job.saver.attempt(lambda: job.saver.save(_files(job, trained), f"epoch {event.epoch}"))
        observe(event)

    step = make_step(lora(job.classifier.apply), tx)
    state = start(tx, job.adapters)
    return fit(step, job.evaluate, state, job.params, job.train, job.validation, job.loop, record)


def _files(job: _Job, trained: Trained, result: Result | None = None) -> dict[str, bytes]:
    """Return PEFT's two files and ``run.json``."""
    base = job.classifier.base_model
    files = encoded(job.plan, trained.adapters, base_model=base, task_type="SEQ_CLS")
    record = Record(base, job.classifier.classes, job.classifier.max_length)
    more = {
        "options": plain(job.options),
        "steps": trained.steps,
        "stop": trained.reason,
        "result": None if result is None else plain(result),
    }
    return {**files, RECORD_NAME: encode_record(record, more)}


def _draw(job: _Job, title: str) -> None:
    heading = f"LoRA on {job.classifier.base_model}: {title}"
    job.saver.draw(lambda: curves(job.saver.events, heading))


def _share(plan: Plan) -> float:
    added = sum(leaf.trained for leaf in plan.adapted)
    return plan.trainable / (plan.base + added)
