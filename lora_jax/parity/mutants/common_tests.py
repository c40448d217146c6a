"""What common tests see of the live code, on the small model: the yardstick of the mutation gate.

PyTorch's side is run once: no mutant reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...train import step as training
from . import checks_small

STEPS = 10
RATE, DECAY, WARMUP, CLIP = 1e-2, 0.01, 0.25, 1.0


def common_tests(seed: int = 0) -> Callable[[], Mapping[str, bool]]:
    """Return a function that tells, for each common test, whether it finds a bug now.

    The tests: the forward pass with B = 0; the outputs to ``torch.testing.assert_close``'s
    defaults and to the 1e-5 that ports of Hugging Face models are often held to; the logits to
    rtol = 1e-3; every loss of ten training steps to 1 %. An error counts as found.
    """
    drawn = checks_small.draw(seed)
    g = np.ones((checks_small.ROWS, checks_small.VOCABULARY), np.float32)
    zero = {n: v * n.endswith(".a") for n, v in drawn.pairs.items()}
    base = checks_small.run_torch(replace(drawn, pairs=zero), g)["logits"]
    logits, losses = checks_small.run_torch(drawn, g)["logits"], _torch_losses(drawn)

    def run() -> dict[str, bool]:
        at_zero = _found(lambda: checks_small.run_jax(drawn, g, zero=True)["logits"])
        ours = _found(lambda: checks_small.run_jax(drawn, g)["logits"])
        curve = _found(lambda: _jax_losses(drawn))
        return {
            "forward at B = 0": _differ(at_zero, base, 1.3e-6, 1e-5),
            "assert_close": _differ(ours, logits, 1.3e-6, 1e-5),
            "1e-5 on outputs": _differ(ours, logits, 0, 1e-5),
            "rtol 1e-3 on logits": _differ(ours, logits, 1e-3, 1e-3),
            "1 % on the loss curve": _differ(curve, losses, 1e-2, 0),
        }

    return run


def _found(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception:  # a mutant raises whatever it likes
        return None


def _differ(ours: Any, theirs: Any, rtol: float | int, atol: float | int) -> bool:
    if ours is None or np.shape(ours) != np.shape(theirs):
        return True
    return not np.allclose(ours, theirs, rtol=rtol, atol=atol)


def _jax_losses(drawn: checks_small.Small) -> list[float]:
    """Train by the live optimizer and loss; the gradients are those of the compiled model."""
    plan, step = checks_small.compiled()
    adapters: Any = checks_small.adapters_of(plan, drawn)
    params, labels, weights = checks_small.nested(drawn.params), drawn.labels, drawn.weights
    loss = jax.value_and_grad(training.cross_entropy)
    tx = training.optimizer(RATE, DECAY, WARMUP, CLIP, total_steps=STEPS)
    state, update, losses = tx.init(adapters), jax.jit(tx.update), []
    no_gradient = jnp.zeros((checks_small.ROWS, checks_small.VOCABULARY))
    for _ in range(STEPS):
        logits, _ = step(params, adapters, drawn.ids, no_gradient)
        value, g = loss(logits, labels, weights)
        _, gradients = step(params, adapters, drawn.ids, g)
        with jax.numpy_dtype_promotion("standard"):
            moves, state = update(gradients, state, adapters)
        adapters = jax.tree.map(jnp.add, adapters, moves)
        losses.append(float(value))
    return losses


def _torch_losses(drawn: checks_small.Small) -> list[float]:
    import torch

    params = {path: torch.from_numpy(value) for path, value in drawn.params.items()}
    pairs = {n: torch.tensor(v, requires_grad=True) for n, v in drawn.pairs.items()}
    ids = torch.from_numpy(drawn.ids).long()
    counted = torch.from_numpy(drawn.weights) > 0
    labels = torch.where(counted, torch.from_numpy(drawn.labels).long(), -100)
    adamw = torch.optim.AdamW(pairs.values(), lr=RATE, weight_decay=DECAY)
    rise = int(np.ceil(WARMUP * STEPS))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda t: min(t / rise, (STEPS - t) / (STEPS - rise))
    )
    losses = []
    for _ in range(STEPS):
        adamw.zero_grad()
        logits = checks_small.torch_logits(params, pairs, ids)
        value = torch.nn.functional.cross_entropy(logits, labels)
        value.backward()
        torch.nn.utils.clip_grad_norm_(pairs.values(), CLIP)
        adamw.step()
        schedule.step()
        losses.append(value.item())
    return losses
