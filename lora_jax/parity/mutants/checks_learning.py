"""Small checks of what training adds to a model: the loss and the optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...core.adapter import Adapter
from ...train import step as training
from ..tensors import Tensors
from ..verdicts import TensorVerdict
from .holding import held


def loss(seed: int) -> Iterator[TensorVerdict]:
    """Hold the masked cross-entropy and its gradient to PyTorch's with ``ignore_index``."""
    import torch

    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((7, 11))).astype(np.float32)
    labels = rng.integers(0, 11, 7).astype(np.int32)
    weights = np.array([1, 0, 1, 1, 0, 1, 1], np.float32)
    value, gradient = jax.value_and_grad(training.cross_entropy)(
        jnp.asarray(logits), labels, weights
    )
    ours = {"loss": np.asarray(value)[None], "dlogits": np.asarray(gradient)}

    def theirs(dtype: Any) -> Tensors:
        leaf = torch.tensor(logits, dtype=dtype, requires_grad=True)
        wanted = torch.where(torch.tensor(weights) > 0, torch.tensor(labels).long(), -100)
        value = torch.nn.functional.cross_entropy(leaf, wanted)
        value.backward()
        assert leaf.grad is not None
        return {"loss": value.detach().numpy()[None], "dlogits": leaf.grad.numpy()}

    yield from held(ours, theirs(torch.float32), theirs(torch.float64))


def optimiser(seed: int) -> Iterator[TensorVerdict]:
    """Hold twelve steps of the training's optimiser to PyTorch's and to float64.

    One of the tensors has gradients near eps, norms lie on both sides of the clip.
    """
    import torch

    steps, warmup = 12, 3
    rng = np.random.default_rng(seed)
    sizes = {"a": 1.0, "b": 3e-8}
    values = {n: rng.standard_normal((5, 7)).astype(np.float32) for n in sizes}
    gradients = [
        {
            n: (s * (0.05 + t / 9) * rng.standard_normal((5, 7))).astype("f4")
            for n, s in sizes.items()
        }
        for t in range(steps)
    ]
    tx = training.optimizer(1e-2, 0.1, 2.5 / steps, 1.0, total_steps=steps)
    own: Any = {"w": Adapter(jnp.asarray(values["a"]), jnp.asarray(values["b"]), 1.0)}
    state, update = tx.init(own), jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):
        for g in gradients:
            given = {"w": Adapter(jnp.asarray(g["a"]), jnp.asarray(g["b"]), 1.0)}
            moves, state = update(given, state, own)
            own = jax.tree.map(jnp.add, own, moves)

    def theirs(dtype: Any) -> Tensors:
        leaves = {n: torch.tensor(v, dtype=dtype, requires_grad=True) for n, v in values.items()}
        adamw = torch.optim.AdamW(leaves.values(), lr=1e-2, weight_decay=0.1)
        fall = steps - warmup
        schedule = torch.optim.lr_scheduler.LambdaLR(
            adamw, lambda t: min(t / warmup, (steps - t) / fall)
        )
        for g in gradients:
            norm = np.sqrt(sum(np.vdot(v.astype("f8"), v) for v in g.values()))
            for n, leaf in leaves.items():
                leaf.grad = torch.tensor(g[n].astype("f8") * min(1, 1 / norm), dtype=dtype)
            adamw.step()
            schedule.step()
        return {n: leaf.detach().double().numpy() - values[n] for n, leaf in leaves.items()}

    ours = {n: np.asarray(getattr(own["w"], n), "f8") - values[n] for n in sizes}
    # A change of 1e-2 of the value has lost two digits of it to rounding, as has PyTorch's.
    yield from held(ours, theirs(torch.float32), theirs(torch.float64), cond=32.0)
