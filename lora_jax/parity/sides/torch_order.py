"""PyTorch with its sums in another order: what rounding alone may change."""

from __future__ import annotations

from typing import Any

from .torch_side import TorchDispatchMode, torch

# What sums products over one axis: where its two operands stand among the arguments.
_PRODUCTS = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::mv": (0, 1),
    "aten::dot": (0, 1),
    "aten::addmm": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::addmv": (1, 2),
}


class Reordered(TorchDispatchMode):
    """While it is entered, matrix products sum over their axis in another order.

    The counterpart of ``jax_order.reordered``: both operands of every product are permuted along
    what it sums over, so that every difference is rounding. It acts below autograd, so the
    products of a backward pass inside are reordered as well. Convolutions and the fused attention
    of the CPU are no such products and stay as they are.

    Args:
        seed: of the permutations; each product has its own.

    >>> x, w = torch.linspace(0, 1, 300).reshape(3, 100), torch.linspace(-1, 1, 200)
    >>> with Reordered() as mode:
    ...     y = x @ w.reshape(100, 2)
    >>> mode.products, bool((abs(y - x @ w.reshape(100, 2)) < 1e-5).all())
    (1, True)
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        self.products = 0
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if where := _PRODUCTS.get(func.name().partition(".")[0]):
            args = list(args)
            args[where[0]], args[where[1]] = self._permuted(args[where[0]], args[where[1]])
            self.products += 1
        return func(*args, **(kwargs or {}))

    def _permuted(self, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        order = torch.randperm(lhs.shape[-1], generator=self._generator)
        return lhs.index_select(-1, order), rhs.index_select(-min(2, rhs.dim()), order)
