"""Level 1 of losses: the value and its gradient, with ignored labels and label smoothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ..reports.checks import Check
from ..tensors import Tensors
from ..verdicts import UNIT_ROUNDOFF, TensorVerdict, judge
from .loss_oracle import IGNORED, cross_entropy, mean_squared

# V is below 100, so that a label of −100 would not be an index even from the end.
ROWS, V = 23, 37
SMOOTHING = 0.1

# exp, sum, log and the two means.
CHAIN = 32.0


def draw(seed: int) -> tuple[Any, Any]:
    """Return logits and labels, a third of them ignored."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((ROWS, V))).astype(np.float32)
    labels = rng.integers(0, V, ROWS).astype(np.int32)
    return logits, np.where(rng.random(ROWS) < 1 / 3, IGNORED, labels)


def weighted(smoothing: float) -> Callable[..., Any]:
    """Return ``lora_jax.train``'s loss; its weights say which rows count."""
    from ...train.step import cross_entropy

    def loss(logits: Any, labels: Any) -> Any:
        counts = labels != IGNORED
        return cross_entropy(logits, labels * counts, counts.astype(np.float32))

    return loss


def of_optax(smoothing: float) -> Callable[..., Any]:
    """Return optax's, with smoothed labels, as a training loop in JAX has it."""
    import jax
    import jax.numpy as jnp
    import optax

    def loss(logits: Any, labels: Any) -> Any:
        counts = (labels != IGNORED).astype(jnp.float32)
        wanted = optax.smooth_labels(jax.nn.one_hot(labels, V), smoothing)
        losses = optax.softmax_cross_entropy(logits, wanted)
        return jnp.sum(losses * counts) / jnp.sum(counts)

    return loss


def through_from_torch(smoothing: float) -> Callable[..., Any]:
    """Return PyTorch's own, run by JAX, as a model with labels has it."""
    import torch

    from ...torch.from_torch import from_torch

    fn, params = from_torch(torch.nn.CrossEntropyLoss(label_smoothing=smoothing))
    return partial(fn, params)


SIDES: dict[str, tuple[Callable[[float], Callable[..., Any]], tuple[float, ...]]] = {
    "train.cross_entropy": (weighted, (0.0,)),
    "optax": (of_optax, (0.0, SMOOTHING)),
    "from_torch": (through_from_torch, (0.0, SMOOTHING)),
}


def entropy(side: str, smoothing: float, seed: int) -> Iterator[TensorVerdict]:
    """Hold a cross entropy to PyTorch's."""
    import torch

    logits, labels = draw(seed)

    def theirs(value: Any) -> Any:
        wanted = torch.from_numpy(labels).long()
        return torch.nn.functional.cross_entropy(value, wanted, label_smoothing=smoothing)

    fn = SIDES[side][0](smoothing)
    truth = cross_entropy(logits, labels, smoothing=smoothing)
    yield from _judged(lambda value: fn(value, labels), theirs, logits, truth)


def squared(seed: int) -> Iterator[TensorVerdict]:
    """Hold the mean squared error to PyTorch's: optax's is halved, and PyTorch's is not."""
    import jax.numpy as jnp
    import torch

    got, wanted = np.random.default_rng(seed).standard_normal((2, ROWS, V)).astype(np.float32)
    loss = torch.nn.functional.mse_loss
    truth = mean_squared(got, wanted)
    truth["dlogits"] = truth.pop("dgot")
    yield from _judged(
        lambda value: jnp.mean((value - wanted) ** 2),
        lambda value: loss(value, torch.from_numpy(wanted)),
        got,
        truth,
    )


def _judged(
    ours: Callable[..., Any], theirs: Callable[..., Any], logits: Any, truth: Tensors
) -> Iterator[TensorVerdict]:
    import jax
    import torch

    value, gradient = jax.jit(jax.value_and_grad(ours))(logits)
    leaf = torch.from_numpy(logits.copy()).requires_grad_()
    reference: Any = theirs(leaf)
    reference.backward()
    assert leaf.grad is not None
    pairs = {
        "loss": (value, reference.detach().numpy()),
        "dlogits": (gradient, leaf.grad.numpy()),
    }
    unit = UNIT_ROUNDOFF["float32"]
    for name, pair in pairs.items():
        arrays = (np.atleast_1d(np.asarray(one)) for one in (*pair, truth[name]))
        yield judge(name, *arrays, unit_roundoff=unit, cond=CHAIN)


def _checks() -> Iterator[Check]:
    for side, (_, smoothings) in SIDES.items():
        needs = ("torch", "torchax") if side == "from_torch" else ("torch",)
        for smoothing in smoothings:
            name = f"{side}/torch cross entropy" + (", smoothed" if smoothing else "")
            yield Check(name, 1, partial(entropy, side, smoothing), needs)
    yield Check("mean squared error/torch", 1, squared, ("torch",))


CHECKS = tuple(_checks())
