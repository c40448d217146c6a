"""Bugs in how adapters begin, learn and are kept: training, merging, files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from ...core import delta, initializers, lowrank
from ...core.adapter import Adapter, Full
from ...peft import tensors
from ...peft.shapes import experts
from ...rewrite import Plan
from ...train import step as training
from .gate import Mutant
from .planting import entry, instead, method


def _path(change: Callable[[Any, Any, Adapter], tuple[Any, Any, Adapter]]) -> Callable[[], Any]:
    """Return what changes y, x or the adapter of every product that the rewriter forms."""

    def wrong(right: Any, y: Any, x: Any, adapter: Adapter, **static: Any) -> Any:
        return right(*change(y, x, adapter), **static)

    return instead(lowrank, "_add_dot", wrong)


def _optimizer(wrong: Callable[..., Any]) -> Callable[[], Any]:
    """Return what plants ``wrong(schedule, decay, clip)`` in the place of the optimizer."""

    def planted(
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.06,
        clip: float = 1.0,
        *,
        total_steps: int,
    ) -> Any:
        rate = training.schedule(learning_rate, warmup, total_steps=total_steps)
        return wrong(rate, weight_decay, optax.clip_by_global_norm(clip))

    return lambda: mock.patch.object(training, "optimizer", planted)


def _adamw(decay: float, **other: Any) -> Callable[[Any], Any]:
    return lambda rate: optax.adamw(rate, **{"weight_decay": decay, **other})


def _merged_in_bf16(right: Any, w: Any, adapter: Adapter) -> Any:
    return w + delta.delta(adapter).astype(jnp.bfloat16).astype(w.dtype)


def _file(change: Callable[[Any, Any], Any]) -> Callable[[], Any]:
    """Return what changes every matrix on its way into the file, by its slot."""
    return instead(
        tensors,
        "to_matrix",
        lambda right, whole, leaf, slot: change(right(whole, leaf, slot), slot),
    )


def _interleaved(matrix: Any, slot: Any) -> Any:
    if slot.part != "b" or matrix.ndim < 3:
        return matrix
    return matrix.reshape(*matrix.shape[:-2], 2, -1, matrix.shape[-1]).swapaxes(-3, -2)


def _block_wise(right: Any, factors: Any, packing: str) -> Any:
    if packing != experts.FAST:
        return right(factors, packing)
    return factors.transpose(2, 0, 1).reshape(factors.shape[2], -1)


def _swapped_in_file(right: Any, plan: Any, adapters: Any, names: Any) -> Any:
    found = right(plan, adapters, names)
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {
        key: found[key.replace(half, other[half])].T.copy()
        for key in found
        for half in other
        if half in key
    }


def _other_layer(right: Any, whole: Any, leaf: Any, slot: Any) -> Any:
    layers = whole.shape[0]
    return right(whole, leaf, replace(slot, index=tuple(layers - 1 - n for n in slot.index)))


def _frozen_trained(right: Any, self: Any, *args: Any) -> Any:
    one = self.leaves[0]
    return right(self, *args) | {f"{one.path}.base": Full(jnp.zeros(one.shape))}


def _unmasked(right: Any, logits: Any, labels: Any, weights: Any) -> Any:
    return right(logits, labels, jnp.ones_like(weights))


def _uncounted(right: Any, logits: Any, labels: Any, weights: Any) -> Any:
    return right(logits, labels, weights) * jnp.sum(weights) / weights.shape[0]


def _wrong_decay(rate: Any, decay: float, clip: Any) -> Any:
    def on_a(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda keys, _: keys[-1].name == "a", params)

    return optax.chain(clip, optax.adamw(rate, weight_decay=decay, mask=on_a))


def _l2(rate: Any, decay: float, clip: Any) -> Any:
    return optax.chain(clip, optax.add_decayed_weights(decay), optax.adam(rate))


def _uncorrected(rate: Any, decay: float, clip: Any) -> Any:
    moments = optax.scale_by_adam()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        moves, state = moments.update(updates, state, params)
        t = state.count.astype(jnp.float32)  # pyright: ignore[reportAttributeAccessIssue]
        factor = (1 - 0.9**t) / jnp.sqrt(1 - 0.999**t)
        return jax.tree.map(lambda m: m * factor, moves), state

    raw = optax.GradientTransformation(moments.init, update)
    rest = optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate)
    return optax.chain(clip, raw, *rest)


def _damped(rate: Any, decay: float, clip: Any) -> Any:
    return optax.chain(clip, optax.adamw(rate, b1=0.99, weight_decay=decay))


def _cosine(right: Any, learning_rate: Any, warmup: Any, *, total_steps: int) -> Any:
    rising = math.ceil(warmup * total_steps)
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, rising, total_steps)


def _early(right: Any, *args: Any, **kwargs: Any) -> Any:
    rate = right(*args, **kwargs)
    return lambda step: rate(step + 1)


def _short_warmup(right: Any, learning_rate: Any, warmup: Any, *, total_steps: int) -> Any:
    return right(
        learning_rate, math.floor(warmup * total_steps) / total_steps, total_steps=total_steps
    )


LEARNING = (
    # merging
    Mutant("merged twice", "W + 2ΔW", instead(delta, "merged", lambda f, w, ad: f(f(w, ad), ad))),
    Mutant(
        "merged in bfloat16",
        "ΔW is rounded before the sum",
        instead(delta, "merged", _merged_in_bf16),
    ),
    Mutant(
        "merged transposed",
        "Wᵀ's ΔW where it is square",
        instead(delta, "delta", lambda f, ad: f(ad).T if ad.a.shape == ad.b.shape[::-1] else f(ad)),
    ),
    Mutant(
        "merged without scale",
        "W + AB",
        instead(delta, "delta", lambda f, ad: f(replace(ad, scale=1.0))),
    ),
    # files
    Mutant(
        "A and B swapped in the file",
        "each has the other's name, transposed",
        instead(tensors, "encode", _swapped_in_file),
    ),
    Mutant(
        "layers reversed in the file",
        "layer n is written as L − n",
        instead(tensors, "to_matrix", _other_layer),
    ),
    Mutant(
        "experts packed block-wise",
        "B has one expert after the other, not interleaved",
        instead(experts, "packed", _block_wise),
    ),
    Mutant("rotary halves interleaved", "rows of B in another family's order", _file(_interleaved)),
    Mutant(
        "rank reversed in A",
        "A's rows from the last to the first",
        _file(lambda m, slot: m[::-1] if slot.part == "a" else m),
    ),
    # the start
    Mutant(
        "B not zero",
        "B is drawn at random",
        entry(initializers.INITIALIZERS, True, lambda f, *args: initializers.both_random(*args)),
    ),
    Mutant(
        "A's fan-in is r",
        "U(±1/√r) for U(±1/√in)",
        entry(
            initializers.INITIALIZERS,
            True,
            lambda f, *args: initializers.kaiming_uniform_rank(*args),
        ),
    ),
    Mutant(
        "a frozen weight is trained",
        "it is among the adapters",
        method(Plan, "init", _frozen_trained),
    ),
    # training
    Mutant("label mask ignored", "every row counts", instead(training, "cross_entropy", _unmasked)),
    Mutant(
        "mean over masked rows",
        "divided by all rows",
        instead(training, "cross_entropy", _uncounted),
    ),
    Mutant(
        "clipped after Adam",
        "the step is clipped, not the gradient",
        _optimizer(lambda rate, d, clip: optax.chain(_adamw(d)(rate), clip)),
    ),
    Mutant(
        "not clipped",
        "the norm is not looked at",
        _optimizer(lambda rate, d, clip: _adamw(d)(rate)),
    ),
    Mutant(
        "eps inside the root",
        "√(v + eps)",
        _optimizer(
            lambda rate, d, clip: optax.chain(clip, _adamw(d, eps=0.0, eps_root=1e-8)(rate))
        ),
    ),
    Mutant("L2 for decay", "decay enters the moments", _optimizer(_l2)),
    Mutant("decay on A alone", "B does not decay", _optimizer(_wrong_decay)),
    Mutant(
        "optax's decay",
        "1e-4 whatever was asked",
        _optimizer(lambda rate, d, clip: optax.chain(clip, _adamw(1e-4)(rate))),
    ),
    Mutant("bias correction missing", "raw moments", _optimizer(_uncorrected)),
    Mutant("momentum damped", "b1 = 0.99", _optimizer(_damped)),
    Mutant(
        "schedule off by one", "the rate of the next step", instead(training, "schedule", _early)
    ),
    Mutant("warm-up rounded down", "one step short", instead(training, "schedule", _short_warmup)),
    Mutant(
        "cosine for linear", "the rate falls as a cosine", instead(training, "schedule", _cosine)
    ),
)
