"""The MiniLM training step: ``lora_jax`` against PEFT eager.

Both start from the same weights and adapters and see the same batches, in float32. No dropout on
either side: ours drops nothing without a key, and PEFT's model is in ``eval`` mode, in which
gradients flow all the same. B is random, so that the check sees the low-rank path at once.

Ours runs as ``lora-jax finetune`` does: on the tokens alone, where transformers computes padding
as well; the equal losses show that padding adds nothing. Only batches whose tokens fill between
half and three quarters of their places are taken, so that rounds are alike.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import Adapter, LoraConfig, Plan, lora, save_pretrained
from lora_jax.core.adapter import Entry
from lora_jax.models import assets
from lora_jax.train import data, reading
from lora_jax.train.classifier import Classifier, load_classifier
from lora_jax.train.data import Batch
from lora_jax.train.step import make_step, optimizer, start

from ..case import Case, Contestant, Work
from ..contestants.common import jax_settings, torch_device, torch_ready, torch_settings, torch_work

ROWS, TOKENS, BATCHES = 16, 64, 8
COMPUTED = ROWS * TOKENS * 3 // 4
LORA = LoraConfig(
    r=8, lora_alpha=16, target_modules=("query", "value"), modules_to_save=("classifier",)
)
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.01, 1.0

# Far enough that the rate does not fall in a run.
TOTAL_STEPS = 100_000


@dataclass(frozen=True)
class Given:
    """What both contestants get."""

    classifier: Classifier
    plan: Plan
    adapters: Mapping[str, Entry]
    batches: tuple[Batch, ...]


@functools.cache
def given() -> Given:
    """Load the model and the corpus, and draw the adapters."""
    corpus = reading.read_sms(assets.fetch(assets.SMS_SPAM) / assets.SMS_SPAM.files[0].name)
    train, _, _ = data.split(data.balance(data.drop_duplicates(corpus), seed=123))
    classifier = load_classifier(assets.fetch(assets.MINILM), train.classes, TOKENS)
    rows = data.batches(classifier.encode(train.texts), train.labels, ROWS, shuffle=True)
    plan = classifier.plan(LORA, ROWS)
    rng = np.random.default_rng(0)

    def with_b(entry: Entry) -> Entry:
        if not isinstance(entry, Adapter):
            return entry
        return replace(entry, b=jnp.asarray(0.05 * rng.normal(size=entry.b.shape), jnp.float32))

    adapters = {path: with_b(entry) for path, entry in plan.init(jax.random.key(0)).items()}
    alike = (row for row in rows if row.places is not None and row.places.size == COMPUTED)
    return Given(classifier, plan, adapters, tuple(itertools.islice(alike, BATCHES)))


def ours() -> Work:
    """Return the step of ``lora_jax.train``, on the rewritten model."""
    work = given()
    tx = optimizer(LEARNING_RATE, WEIGHT_DECAY, 0.0, CLIP, total_steps=TOTAL_STEPS)
    train: Any = make_step(lora(work.classifier.apply), tx)
    state = start(tx, work.adapters)
    batches = itertools.cycle(work.batches)

    def step() -> float:
        nonlocal state
        state, metrics = train(state, work.classifier.params, next(batches))
        jax.block_until_ready(state)
        return float(metrics.loss)

    def program() -> str:
        return train.lower(state, work.classifier.params, work.batches[0]).compile().as_text()

    return Work(step, program=program)


def theirs() -> Work:
    """Return the usual PyTorch step on the PEFT model."""
    torch = torch_ready()
    from torch.nn.utils import clip_grad_norm_

    device = torch_device()
    model = _peft_model(given()).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches = itertools.cycle(
        {
            "input_ids": torch.from_numpy(batch.input_ids).long().to(device),
            "attention_mask": torch.from_numpy(batch.attention_mask).to(device),
            "labels": torch.from_numpy(batch.labels).long().to(device),
        }
        for batch in given().batches
    )

    def step() -> float:
        loss = model(**next(batches)).loss
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(trained, CLIP)
        optimizer.step()
        return loss.item()

    return torch_work(step)


def _peft_model(work: Given) -> Any:
    import peft
    import transformers

    # It announces that the classifier is new; the adapter holds it.
    transformers.logging.set_verbosity_error()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        work.classifier.directory
    )
    with tempfile.TemporaryDirectory() as scratch:
        saved = save_pretrained(
            Path(scratch) / "adapter", work.plan, work.adapters, task_type="SEQ_CLS"
        )
        return peft.PeftModel.from_pretrained(base, saved, is_trainable=True).eval()


def cases() -> tuple[Case, ...]:
    """Return the case.

    Both contestants share one process. Taken apart, each in a process of its own, the medians were
    the same within their spread: neither pool of threads keeps a core for itself between turns.
    """
    return (
        Case(
            name="minilm_step",
            title=(
                f"one training step of MiniLM, {ROWS} x {TOKENS} tokens of SMS Spam, LoRA r=8 on "
                "query and value, float32, no dropout"
            ),
            contestants=(
                Contestant("lora_jax", ours, ("jax", "jaxlib", "optax"), jax_settings),
                Contestant("PEFT eager", theirs, ("peft", "torch", "transformers"), torch_settings),
            ),
            # Rounding in another order: the losses of ten steps differ by up to 3e-7.
            tolerance=1e-5,
        ),
    )
