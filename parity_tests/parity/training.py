"""Ten AdamW steps of LoRA on BERT, three times: ours, PEFT's in float32, and the truth.

The truth is PEFT's model in float64 with its gradients given to the oracle's AdamW, which clips by
the norm as defined; torch adds 1e-6 to the norm, which so counts as torch's own error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
import transformers
from numpy.typing import NDArray

from lora_jax import Adapter, Full, LoraConfig, Plan, lora, plan, save_pretrained
from lora_jax.parity.suite.torch_models import copied, trainable
from lora_jax.parity.training import update_rules
from lora_jax.peft.keys import slots
from lora_jax.train.data import Batch
from lora_jax.train.step import make_step, optimizer, start
from parity_tests.parity.oracle import rel_l2

Tensors = dict[str, NDArray[Any]]

STEPS = 10
RATE, DECAY, CLIP, WARMUP = 1e-3, 0.01, 1.0, 3
B1, B2, EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Problem:
    """One model to train: our function, PEFT's model, the same adapters and batches for both."""

    fn: Callable[..., Any]
    params: Any
    plan: Plan
    adapters: Mapping[str, Adapter | Full]
    model: Any
    batches: Sequence[Batch]


@dataclass
class Run:
    """What one run of ten steps showed, by PEFT's names.

    Args:
        losses: of each step.
        gradients: of each step, before clipping.
        first: AdamW's first moment after one step.
        second: its second moment after one step.
        change: what ten steps added to each trained tensor.
        moved: of each step, what the change up to it made of the loss, to first order; only of
            the truth.
        adapters: what was trained; only ours.
    """

    losses: list[float] = field(default_factory=list)
    gradients: list[Tensors] = field(default_factory=list)
    first: Tensors = field(default_factory=dict)
    second: Tensors = field(default_factory=dict)
    change: Tensors = field(default_factory=dict)
    moved: list[float] = field(default_factory=list)
    adapters: Any = None


def problem(
    fn: Callable[..., Any],
    params: Any,
    config: LoraConfig,
    base: Any,
    batches: Sequence[Batch],
    directory: Path,
    *,
    deviations: tuple[float, float],
) -> Problem:
    """Draw B and the classifier with these deviations, and load them into PEFT."""
    found = plan(fn, params, config, batches[0].input_ids, batches[0].attention_mask)
    rng = np.random.default_rng(7)

    def draw(entry: Adapter | Full) -> Adapter | Full:
        if isinstance(entry, Adapter):
            return replace(entry, b=_normal(rng, entry.b.shape, deviations[0]))
        return Full(_normal(rng, entry.value.shape, deviations[1]))

    adapters = {path: draw(entry) for path, entry in found.init(jax.random.key(3)).items()}
    saved = save_pretrained(directory / "adapter", found, adapters, task_type="SEQ_CLS")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), saved, is_trainable=True).eval()
    return Problem(fn, params, found, adapters, model, batches)


def ours(
    given: Problem,
    adapters: Mapping[str, Adapter | Full] | None = None,
    tx: optax.GradientTransformation | None = None,
    apply: Callable[..., Any] | None = None,
) -> Run:
    """Train with ``lora_jax.train``; the arguments put a part in the place of the right one."""
    tx = recording(our_optimizer() if tx is None else tx)
    step = make_step(lora(given.fn) if apply is None else apply, tx)
    state = start(tx, given.adapters if adapters is None else adapters)
    before, run = tensors(given.plan, given.adapters), Run()
    for batch in given.batches:
        state, metrics = step(state, given.params, batch)
        run.losses.append(float(metrics.loss))
        inner, gradients = state.opt_state
        run.gradients.append(tensors(given.plan, gradients))
        if len(run.losses) == 1:
            run.first = tensors(given.plan, optax.tree_utils.tree_get(inner, "mu"))
            run.second = tensors(given.plan, optax.tree_utils.tree_get(inner, "nu"))
    run.change = difference(tensors(given.plan, state.adapters), before)
    run.adapters = state.adapters
    return run


def theirs(given: Problem) -> Run:
    """Train PEFT's model with PyTorch's optimizer, clipping and transformers' schedule."""
    model, run = copy.deepcopy(given.model), Run()
    trained = trainable(model)
    before = copied(trained)
    adamw = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=DECAY)
    schedule = transformers.get_linear_schedule_with_warmup(adamw, WARMUP, STEPS)
    for batch in given.batches:
        _backward(model, trained, batch, run)
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        adamw.step()
        schedule.step()
        if len(run.losses) == 1:
            moments = {name: adamw.state[p] for name, p in trained.items()}
            run.first = copied({name: m["exp_avg"] for name, m in moments.items()})
            run.second = copied({name: m["exp_avg_sq"] for name, m in moments.items()})
    run.change = difference(copied(trained), before)
    return run


def truth(given: Problem) -> Run:
    """Train PEFT's model in float64 with ``AdamW``."""
    model, run = copy.deepcopy(given.model).double(), Run()
    trained = trainable(model)
    before = copied(trained)
    adamw = AdamW(before)
    for batch, rate in zip(given.batches, rates(), strict=True):
        _backward(model, trained, batch, run)
        change = difference(adamw.values, before)
        run.moved.append(sum(np.vdot(g, change[name]) for name, g in run.gradients[-1].items()))
        after = adamw.step(run.gradients[-1], rate)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(torch.from_numpy(after[name]))
        if len(run.losses) == 1:
            run.first, run.second = dict(adamw.first), dict(adamw.second)
    run.change = difference(adamw.values, before)
    return run


RULE = update_rules.Adam(RATE, (B1, B2), EPS, DECAY, decoupled_weight_decay=True)


class AdamW:
    """The oracle's AdamW after clipping by the global norm, in float64."""

    def __init__(self, values: Tensors):
        self.state = update_rules.start(RULE, values, np.float64)

    @property
    def values(self) -> Tensors:
        return self.state.values

    @property
    def first(self) -> Tensors:
        return self.state.moments["exp_avg"]

    @property
    def second(self) -> Tensors:
        return self.state.moments["exp_avg_sq"]

    def step(self, gradients: Tensors, rate: float) -> Tensors:
        """Take one step and return the new values."""
        clipped = update_rules.clip(gradients, CLIP)
        self.state = update_rules.update(RULE, self.state, clipped, rate)
        return dict(self.values)


def sensitivity(given: Problem, right: Run, size: float) -> dict[str, float]:
    """Return relL2 of each change when every gradient is off by noise of this relative size.

    Adam divides by the gradient's own size, so noise moves an element whose gradient is near
    zero by as much as any other: its condition is a property of the run, to be measured.
    """
    before = tensors(given.plan, given.adapters)
    rng, adamw = np.random.default_rng(0), AdamW(before)
    for gradients, rate in zip(right.gradients, rates(), strict=True):
        noisy = {
            name: g + size * np.sqrt(np.mean(g * g)) * rng.normal(size=g.shape)
            for name, g in gradients.items()
        }
        adamw.step(noisy, rate)
    change = difference(adamw.values, before)
    return {name: rel_l2(change[name], right.change[name]) for name in change}


def rates() -> list[float]:
    """Return the learning rates: from 0 up in ``WARMUP`` steps, then down to reach 0 at the end."""
    return [RATE * min(t / WARMUP, (STEPS - t) / (STEPS - WARMUP)) for t in range(STEPS)]


def our_optimizer(**other: Any) -> optax.GradientTransformation:
    settings = dict(
        learning_rate=RATE, weight_decay=DECAY, warmup=WARMUP / STEPS, clip=CLIP, total_steps=STEPS
    )
    return optimizer(**settings | other)


def recording(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return ``tx`` with the gradients that it was last given beside its state."""

    def update(gradients: Any, state: Any, values: Any = None) -> tuple[Any, Any]:
        updates, inner = tx.update(gradients, state[0], values)
        return updates, (inner, gradients)

    return optax.GradientTransformation(
        lambda values: (tx.init(values), jax.tree.map(jnp.zeros_like, values)), update
    )


def tensors(plan: Plan, tree: Any) -> Tensors:
    """Return a tree like the adapters by the names and in the layout of PEFT's tensors."""
    names = {(slot.path, slot.part): slot.key for slot in slots(plan)}
    return {
        names[path, part]: np.array(getattr(entry, part)).T
        for path, entry in tree.items()
        for part in (("a", "b") if isinstance(entry, Adapter) else ("value",))
    }


def difference(after: Tensors, before: Tensors) -> Tensors:
    """Return ``after − before``, where float64 holds it exactly."""
    return {name: after[name].astype(np.float64) - before[name] for name in after}


def _backward(model: Any, trained: Mapping[str, Any], batch: Batch, run: Run) -> None:
    model.zero_grad()
    logits = model(
        torch.from_numpy(batch.input_ids).long(),
        attention_mask=torch.from_numpy(batch.attention_mask),
    ).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels).long())
    loss.backward()
    run.losses.append(loss.item())
    run.gradients.append(copied({name: p.grad for name, p in trained.items()}))


def _normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> jax.Array:
    return jnp.asarray(deviation * rng.normal(size=shape), jnp.float32)
