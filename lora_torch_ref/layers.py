"""The low-rank path, and the two ways to put it beside an ``nn.Linear``: LoRA and DoRA.

A is ``(in, rank)`` and B is ``(rank, out)``, so the path reads ``x @ A @ B`` from left to right.
A torch weight is ``(out, in)``, so the same path as a change of the weight is ``(A @ B).T``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALayer(nn.Module):
    """The low-rank path that LoRA trains; it returns zeros until B is trained.

    ``y = scale · x · A · B``

    Args:
        in_dim: size of the last axis of x.
        out_dim: size of the last axis of y.
        rank: columns of A ``(in_dim, rank)`` and rows of B ``(rank, out_dim)``.
        alpha: strength of the path; ``scaling`` makes it into ``scale``.
        scaling: a name in ``SCALINGS``.
        a_init: a name in ``A_INITS``; B starts at zero.
        dropout: probability of dropping an element of x while training, in [0, 1).
        dtype: of A and B; x is cast to it and y has it.
        device: of A and B.

    Raises:
        ValueError: lists every argument that is out of range.

    Source: LoRA, arXiv 2106.09685, section 4.1.

    >>> path = LoRALayer(in_dim=10, out_dim=5, rank=2, alpha=4)
    >>> path(torch.ones(3, 10)).shape, path.scale
    (torch.Size([3, 5]), 2.0)
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        *,
        scaling: str = "alpha/rank",
        a_init: str = "fan_in_rank",
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        sizes = {"in_dim": in_dim, "out_dim": out_dim, "rank": rank}
        _check(sizes, alpha, scaling, a_init, dropout)
        self.alpha = alpha
        self.scale = SCALINGS[scaling](alpha, rank)
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(A_INITS[a_init](in_dim, rank, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(rank, out_dim, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``scale · x · A · B``, shape ``(..., out_dim)``, for x ``(..., in_dim)``."""
        x = self.dropout(x.to(self.A.dtype))
        return self.scale * (x @ self.A @ self.B)

    def delta(self) -> Tensor:
        """Return ``scale · A · B``, shape ``(in_dim, out_dim)``, in float32 or wider."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return self.scale * (self.A.to(dtype) @ self.B.to(dtype))

    def extra_repr(self) -> str:
        """Return what ``print`` shows between the brackets."""
        (in_dim, rank), out_dim = self.A.shape, self.B.shape[1]
        return f"{in_dim=}, {out_dim=}, {rank=}, alpha={self.alpha}, scale={self.scale:g}"


class LinearWithLoRA(nn.Module):
    """A linear layer with the low-rank path beside it.

    ``y = x · Wᵀ + b + scale · x · A · B``

    Nothing is frozen here: call ``freeze`` on the model before its layers are wrapped.

    Args:
        linear: holds W ``(out, in)`` and b; kept, not copied, as ``.linear``.
        rank: see ``LoRALayer``.
        alpha: see ``LoRALayer``.
        options: the keywords of ``LoRALayer``; the new parameters are on the device of W. The
            sum is taken in the wider dtype and has the dtype that ``linear`` returns.

    Raises:
        ValueError: ``linear`` is no ``nn.Linear``, or an argument of ``LoRALayer`` is out of range.

    Source: LoRA, arXiv 2106.09685, equation 3.

    >>> linear = nn.Linear(10, 5)
    >>> x = torch.ones(3, 10)
    >>> bool((LinearWithLoRA(linear, rank=2, alpha=4)(x) == linear(x)).all())
    True
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, **options: Unpack[LoRAOptions]):
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear: got {type(linear).__name__}, wanted an nn.Linear")
        in_dim, out_dim, device = linear.in_features, linear.out_features, linear.weight.device
        self.linear = linear
        self.lora = LoRALayer(in_dim, out_dim, rank, alpha, device=device, **options)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear layer's output plus the path's, shape ``(..., out)``."""
        base = self.linear(x)
        return (base + self.lora(x)).to(base.dtype)

    def merged(self) -> nn.Linear:
        """Return a new ``nn.Linear`` that computes the same without the path or its dropout.

        ``W' = W + scale · (A · B)ᵀ``, summed in float32 or wider and cast to the dtype of W.
        """
        old, bias = self.linear, self.linear.bias
        new = nn.Linear(old.in_features, old.out_features, bias is not None, device="meta")
        new.weight = nn.Parameter(self.weight.detach(), old.weight.requires_grad)
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return new.train(old.training)

    @property
    def weight(self) -> Tensor:
        """The adapted weight ``(out, in)``, differentiable, in the dtype of W.

        It serves owners that read a layer's weight and never call the layer, such as
        ``nn.MultiheadAttention``; dropout, which acts on x, does not reach them.
        """
        return self._adapted_weight().to(self.linear.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias of ``linear``."""
        return self.linear.bias

    def _adapted_weight(self) -> Tensor:
        return self.linear.weight + self.lora.delta().T


class DoRALinear(LinearWithLoRA):
    """A linear layer whose weight is trained as a magnitude and a direction for each output.

    ``y = x · (m / ‖V‖ · V)ᵀ + b``, with ``V = W + scale · (A · B)ᵀ``

    ``‖V‖`` is the norm over the input axis, one number for each output; it is a constant for the
    gradient (section 4.3 of the paper). The magnitude m ``(out,)`` starts as ``‖W‖``. Dropout
    acts on everything that DoRA adds to ``linear(x)``, as in PEFT.

    Args:
        linear: see ``LinearWithLoRA``.
        rank: see ``LoRALayer``.
        alpha: see ``LoRALayer``.
        options: see ``LinearWithLoRA``.

    Raises:
        ValueError: an output of W has only zero weights and so no direction, or as for
            ``LinearWithLoRA``.

    Source: DoRA, arXiv 2402.09353, equation 5 and section 4.3.

    >>> linear = nn.Linear(10, 5)
    >>> dora = DoRALinear(linear, rank=2, alpha=4)
    >>> x = torch.ones(3, 10)
    >>> bool((dora(x) == linear(x)).all()), dora.magnitude.shape
    (True, torch.Size([5]))
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, **options: Unpack[LoRAOptions]):
        super().__init__(linear, rank, alpha, **options)
        norm = _norm_by_output(super()._adapted_weight()).to(self.lora.A.dtype)
        if not norm.all():
            empty = (norm == 0).nonzero().flatten().tolist()
            raise ValueError(f"linear: got zero weights for outputs {empty}, wanted a direction")
        self.magnitude = nn.Parameter(norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``linear(x) + x · (m / ‖V‖ · V − W)ᵀ``, shape ``(..., out)``."""
        base = self.linear(x)
        change = self._adapted_weight() - self.linear.weight
        x = self.lora.dropout(x.to(change.dtype))
        return (base + F.linear(x, change)).to(base.dtype)

    def _adapted_weight(self) -> Tensor:
        v = super()._adapted_weight()
        norm = _norm_by_output(v).to(self.magnitude.dtype)
        return (self.magnitude / norm)[:, None] * v


class LoRAOptions(TypedDict, total=False):
    """The keywords of ``LoRALayer`` that every wrapper passes on."""

    scaling: str
    a_init: str
    dropout: float
    dtype: torch.dtype


# Reference layers of both kinds are in use: early ones scale by bare alpha.
SCALINGS: dict[str, Callable[[float, int], float]] = {
    "alpha": lambda alpha, rank: float(alpha),
    "alpha/rank": lambda alpha, rank: alpha / rank,
}


def _fan_in_rank(in_dim: int, rank: int, **placement: Any) -> Tensor:
    """``U(±1/sqrt(rank))``, the reference layer's: torch takes the last axis for the fan-in."""
    return nn.init.kaiming_uniform_(torch.empty(in_dim, rank, **placement), a=math.sqrt(5))


def _fan_in_input(in_dim: int, rank: int, **placement: Any) -> Tensor:
    """``U(±1/sqrt(in))``, PEFT's: drawn on ``(rank, in)`` and transposed."""
    return _fan_in_rank(rank, in_dim, **placement).T.contiguous()


A_INITS: dict[str, Callable[..., Tensor]] = {
    "fan_in_rank": _fan_in_rank,
    "fan_in_input": _fan_in_input,
}


def _norm_by_output(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.detach(), dim=1)


def _check(sizes: dict[str, int], alpha: float, scaling: str, a_init: str, dropout: float) -> None:
    problems = [
        f"{name}: got {size!r}, wanted an integer of at least 1"
        for name, size in sizes.items()
        if not isinstance(size, int) or size < 1
    ]
    problems += [
        f"{name}: got {got!r}, wanted one of {', '.join(map(repr, table))}"
        for name, got, table in (("scaling", scaling, SCALINGS), ("a_init", a_init, A_INITS))
        if got not in table
    ]
    if not math.isfinite(alpha):
        problems.append(f"alpha: got {alpha!r}, wanted a finite number")
    if not 0 <= dropout < 1:
        problems.append(f"dropout: got {dropout!r}, wanted 0 <= p < 1")
    if problems:
        raise ValueError("these arguments are out of range:\n  " + "\n  ".join(problems))
