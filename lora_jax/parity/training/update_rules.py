"""The truth about optimisers, in numpy's longdouble: one step of each, as its definition has it.

Names are PyTorch's, for settings and moments; every ``eps`` is outside of the root. Never the
code under test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = dict[str, Array]
Moments = dict[str, Array]


@dataclass(frozen=True)
class Sgd:
    """SGD with momentum: ``b ← μ·b + (1 − d)·g`` (``b ← g`` first), ``θ ← θ − η·b``.

    ``g`` holds ``λ·θ``. Nesterov's moves by ``g + μ·b``. Source: ``torch.optim.SGD``.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the averages that it keeps."""
        return ("momentum_buffer",) if self.momentum else ()

    def step(
        self, value: Array, gradient: Array, kept: Moments, count: int, rate: Any
    ) -> tuple[Array, Moments]:
        """Return the new value and moments."""
        g = gradient + self.weight_decay * value
        if not self.momentum:
            return value - rate * g, {}
        added = g if count == 1 else (1 - _exact(value, self.dampening)) * g
        buffer = self.momentum * kept["momentum_buffer"] + added
        move = g + self.momentum * buffer if self.nesterov else buffer
        return value - rate * move, {"momentum_buffer": buffer}


@dataclass(frozen=True)
class Adam:
    """Adam: ``θ ← θ − η·m̂ / (√v̂ + ε)``, with ``m̂ = m / (1 − β₁ᵗ)`` and v̂ likewise.

    Weight decay adds ``λ·θ`` to g (L2), or with ``decoupled_weight_decay`` to the move (AdamW).
    Source: arXiv 1412.6980, arXiv 1711.05101.

    >>> adam = Adam(lr=0.1)
    >>> values = {"w": np.array([1.0, -2.0])}
    >>> after = update(adam, start(adam, values), {"w": np.array([3.0, -4.0])})
    >>> after.values["w"].astype(float).round(6)
    array([ 0.9, -1.9])
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the averages that it keeps."""
        return "exp_avg", "exp_avg_sq"

    def step(
        self, value: Array, gradient: Array, kept: Moments, count: int, rate: Any
    ) -> tuple[Array, Moments]:
        """Return the new value and moments."""
        b1, b2 = (_exact(value, beta) for beta in self.betas)
        decay = self.weight_decay * value
        g = gradient if self.decoupled_weight_decay else gradient + decay
        first = b1 * kept["exp_avg"] + (1 - b1) * g
        second = b2 * kept["exp_avg_sq"] + (1 - b2) * g * g
        move = first / (1 - b1**count) / (np.sqrt(second / (1 - b2**count)) + self.eps)
        if self.decoupled_weight_decay:
            move = move + decay
        return value - rate * move, {"exp_avg": first, "exp_avg_sq": second}


@dataclass(frozen=True)
class RmsProp:
    """RMSprop: ``v ← α·v + (1 − α)·g²``, ``b ← μ·b + g / (√v + ε)``, ``θ ← θ − η·b``.

    ``g`` holds ``λ·θ``. The centred one takes ``v − ḡ²`` under the root, ḡ averaged like v.
    Source: ``torch.optim.RMSprop``.
    """

    lr: float
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the averages that it keeps."""
        kept = {"square_avg": True, "momentum_buffer": self.momentum, "grad_avg": self.centered}
        return tuple(name for name, is_kept in kept.items() if is_kept)

    def step(
        self, value: Array, gradient: Array, kept: Moments, count: int, rate: Any
    ) -> tuple[Array, Moments]:
        """Return the new value and moments."""
        g, alpha = gradient + self.weight_decay * value, _exact(value, self.alpha)
        found = {"square_avg": alpha * kept["square_avg"] + (1 - alpha) * g * g}
        under = found["square_avg"]
        if self.centered:
            found["grad_avg"] = alpha * kept["grad_avg"] + (1 - alpha) * g
            under = under - found["grad_avg"] ** 2
        move = g / (np.sqrt(under) + self.eps)
        if self.momentum:
            move = found["momentum_buffer"] = self.momentum * kept["momentum_buffer"] + move
        return value - rate * move, found


Rule = Sgd | Adam | RmsProp
"""An optimiser: ``step`` says what it does to one tensor at a time, ``count`` is 1 at first."""


@dataclass(frozen=True)
class State:
    """Values, moments by their names, and how many steps were taken."""

    values: Tensors
    moments: dict[str, Tensors]
    count: int = 0


def start(rule: Rule, values: Mapping[str, Array], dtype: Any = np.longdouble) -> State:
    """Return the state before the first step, in this dtype; moments are zero."""
    wide = {name: value.astype(dtype) for name, value in values.items()}
    zeros = {name: np.zeros_like(value) for name, value in wide.items()}
    return State(wide, {moment: dict(zeros) for moment in rule.moments})


def update(
    rule: Rule, state: State, gradients: Mapping[str, Array], rate: float | None = None
) -> State:
    """Return the state after one more step, with this learning rate or the rule's own."""
    count, values = state.count + 1, {}
    moments: dict[str, Tensors] = {moment: {} for moment in rule.moments}
    for name, value in state.values.items():
        kept = {moment: state.moments[moment][name] for moment in rule.moments}
        eta = _exact(value, rule.lr if rate is None else rate)
        values[name], found = rule.step(
            value, gradients[name].astype(value.dtype), kept, count, eta
        )
        for moment, tensor in found.items():
            moments[moment][name] = tensor
    return State(values, moments, count)


def clip(gradients: Mapping[str, Array], max_norm: float, added: float = 0.0) -> Tensors:
    """Return ``g · min(1, max_norm / (‖g‖ + added))``, with the norm over all tensors.

    As defined, ``added`` is 0; ``torch.nn.utils.clip_grad_norm_`` adds 1e-6.

    >>> clip({"w": np.array([3.0, 4.0])}, 1.0)["w"].astype(float)
    array([0.6, 0.8])
    """
    wide = {name: g.astype(np.promote_types(g.dtype, np.float64)) for name, g in gradients.items()}
    norm = np.sqrt(sum((g * g).sum() for g in wide.values()))
    factor = max_norm / (norm + added)
    return {name: g * factor if factor < 1 else g for name, g in wide.items()}


def _exact(like: Array, number: float) -> Any:
    """Return a number in the dtype of an array, so that ``1 − β`` keeps its digits."""
    return like.dtype.type(number)
