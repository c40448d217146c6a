"""A PyTorch model that is float64 all through, so that its run can be a truth.

``.double()`` is not enough: norms, softmax and rotary embeddings ask for float32 by name, and
so are 4e-7 away from what float64 would give.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

try:
    import torch
except ImportError as error:
    raise ImportError(
        "comparing with PyTorch needs it: pip install 'lora_jax[torch]' (this module alone does; "
        "the rest of lora_jax.parity works without it)"
    ) from error

from torch.overrides import TorchFunctionMode

from ..verdicts import Vacuous

M = TypeVar("M", bound=torch.nn.Module)


class Wide(TorchFunctionMode):
    """Makes float64 of every float32 that a model asks for, as its norms, softmax and RoPE do.

    Raises:
        Vacuous: at an operation whose result is float32 all the same.

    >>> with Wide():
    ...     torch.ones(2, dtype=torch.float64).float().dtype
    torch.float64
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function with float64 in the place of float32."""
        args = [_wide(value) for value in args]
        kwargs = {name: _wide(value) for name, value in (kwargs or {}).items()}
        out = (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            raise Vacuous(f"the oracle holds the float32 of {func}")
        return out


def widened(module: M) -> M:
    """Return a float64 copy of a module whose ``forward`` runs under ``Wide``.

    ``lora_jax.torch.from_torch`` makes of it a JAX function that is float64 all through.

    Args:
        module: any module; it is not changed.

    >>> class Half(torch.nn.Module):
    ...     def forward(self, x):
    ...         return torch.sin(x.float() / 3)
    >>> x = torch.ones(1, dtype=torch.float64)
    >>> Half()(x).dtype, widened(Half())(x).dtype
    (torch.float32, torch.float64)
    """
    kind: Any = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Wide():
            return kind.forward(self, *args, **kwargs)

    wide = copy.deepcopy(module).double()
    wide.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": __name__})
    return wide


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value == torch.float32 else value
