"""Numbers that multiply a weight: ``neg``, ``mul``, ``div``, ``conj``; casts; complex weights.

A and B are real, so ``ΔW`` is, until the function multiplies the weight with a complex number. From
there on A and B are complex, too: what is true of ``W + s·A·B`` holds for all that follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ...core import lowrank
from ...core.adapter import STACKED
from ..interpret import Call, base_of
from ..registry import Unsupported, rule
from ..weight import LoraWeight, turn
from .sums import sum_of


@rule("neg")
def neg(call: Call, weight: LoraWeight) -> LoraWeight:
    """Change the sign of W and B."""
    base = call.plain(weight.base)
    return replace(weight, base=base, b=None if weight.planning else -weight.b)


@rule("mul")
def mul(call: Call, left: Any, right: Any) -> LoraWeight:
    """Multiply W and B by one number."""
    weight, number = (left, right) if isinstance(left, LoraWeight) else (right, left)
    _require_number(number)
    base = call.plain(*map(base_of, (left, right)))
    return _by_number(weight, base, number, lambda b, number: b * number)


@rule("div")
def div(call: Call, weight: Any, number: Any) -> LoraWeight:
    """Divide W and B by one number."""
    _require_number(number)
    base = call.plain(base_of(weight), number)
    return _by_number(weight, base, number, lambda b, number: b / number)


@rule("convert_element_type")
def convert_element_type(call: Call, weight: LoraWeight) -> LoraWeight:
    """Change the base's dtype; A and B keep theirs, or their real part's."""
    dtype = call.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise Unsupported(f"the weight is converted to {dtype}")
    base = call.plain(weight.base)
    return replace(weight, base=base) if is_complex(dtype) else _real(weight, base)


@rule("conj")
def conj(call: Call, weight: LoraWeight) -> LoraWeight:
    """``conj(W) + s·conj(A)·conj(B)``."""
    base = call.plain(weight.base)
    if weight.planning or not weight.turned:
        return replace(weight, base=base)
    return replace(weight, base=base, a=weight.a.conj(), b=weight.b.conj())


@rule("real")
def real(call: Call, weight: LoraWeight) -> LoraWeight:
    """``Re W + s·Re(A·B)``."""
    return _real(weight, call.plain(weight.base))


@rule("imag")
def imag(call: Call, weight: LoraWeight) -> Any:
    """``Im W + s·Im(A·B)``; of real A and B only the frozen part is left, which is an array."""
    base = call.plain(weight.base)
    if weight.turned:
        return _halves(weight, base, lambda re, im: ((re[0], im[0]), (im[1], re[1])))
    if weight.gain is None:
        return base
    return replace(weight, base=base, b=jnp.zeros_like(weight.b))  # DoRA's gain is still of W + ΔW


@rule("complex")
def complex_(call: Call, re: Any, im: Any) -> LoraWeight:
    """``W₁ + i·W₂``, the sum of a weight, or an array, and one that is turned."""
    if isinstance(im, LoraWeight):
        made: Any = call.eqn.outvars[0].aval
        im = turn(im, made.dtype)
        im = replace(im, b=None if im.planning else im.b * 1j)
    return sum_of(call, re, im)


def is_complex(dtype: DTypeLike) -> bool:
    """Tell whether values of a dtype have an imaginary part.

    >>> is_complex("complex64"), is_complex("bfloat16")
    (True, False)
    """
    return jnp.issubdtype(dtype, jnp.complexfloating)


def _require_number(number: Any) -> None:
    if isinstance(number, LoraWeight) or jnp.ndim(number):
        raise Unsupported("the weight's elements are used one by one, not in a product")


def _by_number(
    weight: LoraWeight, base: Any, number: Any, act: Callable[[Any, Any], Any]
) -> LoraWeight:
    """Return W and B after ``act(B, number)``, which neither's dtype may narrow."""
    # A bias is the output's, as the module's own is: what multiplies W does not reach it.
    dtype = jnp.result_type(number)
    if is_complex(dtype) and _is_real_constant(number):
        number = np.real(number)
    elif is_complex(dtype):
        weight = turn(weight, dtype)
    weight = replace(weight, base=base)
    if weight.planning:
        return weight
    number = jnp.asarray(number)
    if number.dtype.itemsize < 2:  # float8, which JAX promotes to nothing
        number = number.astype(jnp.float32)
    wide = lowrank.wider(weight.b.dtype, number.dtype)
    product = act(weight.b.astype(wide), number.astype(wide))
    return replace(weight, b=product.astype(weight.b.dtype))


def _is_real_constant(number: Any) -> bool:
    """Tell a real number that the author wrote beside a complex weight, and so is complex."""
    known = isinstance(number, complex | np.ndarray | np.generic)
    return known and not np.imag(number).any()


def _real(weight: LoraWeight, base: Any) -> LoraWeight:
    if not weight.turned:
        return replace(weight, base=base)
    return _halves(weight, base, lambda re, im: ((re[0], -im[0]), (re[1], im[1])))


def _halves(weight: LoraWeight, base: Any, pairs: Callable[[Any, Any], Any]) -> LoraWeight:
    """Return a real weight of twice the rank: ``A·B`` is of the parts of A and B, side by side.

    ``Re(A·B) = [Re A, −Im A]·[Re B; Im B]``, ``Im(A·B) = [Re A, Im A]·[Im B; Re B]``.
    """
    if weight.planning:
        return replace(weight, base=base, turned=False)
    factors = (weight.a, weight.b)
    of_a, of_b = pairs([lax.real(one) for one in factors], [lax.imag(one) for one in factors])
    a = lax.concatenate(of_a, weight.a.ndim - 1)
    b = lax.concatenate(of_b, weight.letters.count(STACKED))
    return replace(weight, base=base, a=a, b=b, turned=False)
