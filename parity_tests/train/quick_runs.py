"""``finetune`` without its model: steps that only count, so that what it writes is known."""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import LoraConfig, load_config, plan
from lora_jax.peft.files import read_weights
from lora_jax.train import finetune as finetuning
from lora_jax.train.classifier import read_record
from lora_jax.train.data import Tokens
from lora_jax.train.finetune import FinetuneOptions, Note, Result, finetune
from lora_jax.train.loop import Rows, StepEvent
from lora_jax.train.saving import Saver
from lora_jax.train.step import Metrics, State

KEY = "base_model.model.layer.query.lora_A.weight"
FILES = ["adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "run.json"]


@dataclass(frozen=True)
class Quick:
    """A run of two epochs of two steps; after n of them every value of A and B is ``first + n``.

    Args:
        alpha: goes into the configuration.
        classes: go into the record.
        first: value of the adapters at the start.
        during: called within a step, by its number.
        notes: lines that the run said.
    """

    alpha: int = 256
    classes: tuple[str, ...] = ("negative", "positive")
    first: float = 0.0
    during: dict[int, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __call__(
        self, out: Any, *, overwrite: bool = True, seen: Callable[[int], Any] | None = None
    ) -> Result:
        options = FinetuneOptions(
            output=out, lora_alpha=self.alpha, overwrite=overwrite, epochs=2, batch_size=2
        )
        with pytest.MonkeyPatch.context() as patch:
            self.put(patch)
            return finetune(options, functools.partial(self.observe, seen))

    def after(self, steps: int) -> tuple[Any, ...]:
        """Return what ``state`` finds after that many steps."""
        return self.alpha, self.first + steps, self.classes

    def observe(self, seen: Callable[[int], Any] | None, event: Any) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)
        elif seen and isinstance(event, StepEvent):
            seen(event.step)

    def put(self, patch: pytest.MonkeyPatch) -> None:
        """Put what only counts in the place of the model, its data and its steps."""
        own, template = planned(self.alpha)
        tokens = Tokens(*(np.zeros((4, 2), np.int32) for _ in range(2)))
        rows = Rows(tokens, np.zeros(4, np.int32))
        classifier = SimpleNamespace(
            base_model="base",
            classes=self.classes,
            max_length=8,
            params=None,
            apply=lambda params, x: x,
        )

        def at(value):
            return jax.tree.map(lambda leaf: jnp.asarray(np.full_like(leaf, value)), template)

        def step(state, params, batch):
            number = state.step + 1
            self.during.get(number, lambda: None)()
            metrics = Metrics(0.5, 1.0, 2.0, True)
            return State(at(self.first + number), None, number), metrics

        def prepare(options, config, loop, texts, output, observe):
            job = object.__new__(finetuning._Job)
            vars(job).update(
                options=options,
                saver=Saver(output, lambda line: observe(Note(line)), finetuning.append),
                classifier=classifier,
                plan=own,
                adapters=at(self.first),
                evaluate=lambda params, adapters, batch: Metrics(0.5, 1.0, 2.0, True),
                loop=loop,
                train=rows,
                validation=rows,
                test=rows,
            )
            return job

        patch.setattr(finetuning, "_prepare", prepare)
        patch.setattr(finetuning, "curves", lambda events, title: b"png of " + title.encode())
        patch.setattr(finetuning, "optimizer", lambda *args, **kwargs: None)
        patch.setattr(finetuning, "make_step", lambda *args: step)
        patch.setattr(finetuning, "start", lambda tx, adapters: State(adapters, None, 0))


@contextmanager
def during_saves(do: Callable[[], Any]) -> Iterator[None]:
    """Do something while a run encodes what it is about to write."""
    real = finetuning.encoded

    def encoded(*args, **kwargs):
        if any(frame.name == "_run" for frame in traceback.extract_stack()[-4:]):
            do()
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "encoded", encoded)
        yield


@functools.cache
def planned(alpha):
    """Return the plan of one layer, and its adapters to fill."""
    params = {"layer.query": {"kernel": jnp.zeros((4, 4))}}
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["query"])
    own = plan(lambda p, x: x @ p["layer.query"]["kernel"], params, config, jnp.zeros((1, 4)))
    return own, jax.tree.map(np.asarray, own.init(jax.random.key(0)))


def bare_run(directory):
    """Read a run as PEFT and people do, and hold what lies beside the adapter to it."""
    alpha = json.loads((directory / "adapter_config.json").read_bytes())["lora_alpha"]
    value = float(load_file(directory / "adapter_model.safetensors")[KEY].flat[0])
    record = json.loads((directory / "run.json").read_bytes())
    metrics = (directory / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) >= 2 and record["options"]["lora_alpha"] == alpha
    assert not (directory / "curves.png").exists() or record["stop"] != "training"
    return alpha, value, tuple(record["classes"])


def state(directory):
    """Read a run as ours do."""
    found = load_config(directory).lora_alpha, float(read_weights(directory)[KEY].flat[0])
    known = (*found, read_record(directory).classes)
    assert bare_run(directory) == known
    return known
