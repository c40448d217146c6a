"""The product with a frozen weight, where XLA would widen its operands.

XLA's CPU backend multiplies bfloat16 natively where the result is float32; a bfloat16 result makes
it convert both operands to float32 first, which takes twice the time and a copy of the weight. Both
sum in float32 and round once. Other backends have no such difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, BFloat16, Num

Axes = Sequence[int]
Numbers = tuple[tuple[Axes, Axes], tuple[Axes, Axes]]


def widens(params: Mapping[str, Any], *dtypes: Any) -> bool:
    """Tell whether XLA would widen a ``dot_general`` with these parameters.

    Args:
        params: of the equation.
        *dtypes: of its operands and its result.
    """
    usual = params.get("out_sharding") is None and params["precision"] is None
    return usual and {*map(jnp.dtype, dtypes)} == {jnp.dtype(jnp.bfloat16)} and _on_cpu()


def dot_general(
    lhs: Num[Array, "..."],
    rhs: Num[Array, "..."],
    dimension_numbers: Numbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    **further: Any,
) -> Num[Array, "..."]:
    """Return ``lax.dot_general`` of the same arguments, by ``dot`` where XLA would widen them.

    >>> x, w = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
    >>> dot_general(x, w, (([1], [0]), ([], [])))[0, 0].item()
    3.0
    """
    params = {"precision": precision, **further}
    if widens(params, lhs.dtype, rhs.dtype, preferred_element_type or lhs.dtype):
        return dot(lhs, rhs, dimension_numbers)
    return lax.dot_general(
        lhs, rhs, dimension_numbers, precision, preferred_element_type, **further
    )


def dot(
    lhs: BFloat16[Array, "..."], rhs: BFloat16[Array, "..."], numbers: Numbers
) -> BFloat16[Array, "..."]:
    """Return ``lax.dot_general(lhs, rhs)``, summed in float32 and rounded once, as its gradients.

    Forward-mode differentiation is not possible through it: for that the operands have to be
    float32.

    Args:
        lhs: the left operand.
        rhs: the right one; a gradient of a weight is formed only where it is asked for.
        numbers: the ``dimension_numbers`` of ``lax.dot_general``.

    >>> x, w = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
    >>> dot(x, w, (([1], [0]), ([], []))).dtype
    dtype(bfloat16)
    """
    (one, two), (batch_one, batch_two) = numbers
    return _dot(((tuple(one), tuple(two)), (tuple(batch_one), tuple(batch_two))), lhs, rhs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(numbers: Numbers, lhs: Array, rhs: Array) -> Array:
    wide = lax.dot_general(lhs, rhs, numbers, preferred_element_type=jnp.float32)
    return wide.astype(lhs.dtype)


def _forward(numbers: Numbers, lhs: Any, rhs: Any) -> tuple[Array, Any]:
    kept = rhs.value if lhs.perturbed else None, lhs.value if rhs.perturbed else None
    return _dot(numbers, lhs.value, rhs.value), (kept, lhs.value.ndim, rhs.value.ndim)


def _backward(numbers: Numbers, saved: Any, g: Any) -> tuple[Array | None, Array | None]:
    (rhs, lhs), lhs_ndim, rhs_ndim = saved
    if isinstance(g, SymbolicZero):
        return None, None
    (l_contract, r_contract), (l_batch, r_batch) = numbers
    l_kept = [n for n in range(lhs_ndim) if n not in (*l_contract, *l_batch)]
    r_kept = [n for n in range(rhs_ndim) if n not in (*r_contract, *r_batch)]
    batch, first = range(len(l_batch)), len(l_batch)
    rows = range(first, first + len(l_kept))
    columns = range(first + len(l_kept), g.ndim)
    of_lhs = of_rhs = None
    if rhs is not None:
        # Of the operand's axes: those of the batch, those kept, and those summed over.
        found: Any = _dot(((columns, r_kept), (batch, r_batch)), g, rhs)
        # What the other operand has of the summed axes comes in the order of its own axes.
        summed = [l_contract[n] for n in sorted(range(len(r_contract)), key=r_contract.__getitem__)]
        of_lhs = lax.transpose(found, _order([*l_batch, *l_kept, *summed]))
    if lhs is not None:
        found = _dot(((l_kept, rows), (l_batch, batch)), lhs, g)
        summed = [r_contract[n] for n in sorted(range(len(l_contract)), key=l_contract.__getitem__)]
        of_rhs = lax.transpose(found, _order([*r_batch, *summed, *r_kept]))
    return of_lhs, of_rhs


_dot.defvjp(_forward, _backward, symbolic_zeros=True)


def _order(axes: Sequence[int]) -> list[int]:
    """Return the permutation that puts axes of these numbers into order."""
    return sorted(range(len(axes)), key=axes.__getitem__)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
