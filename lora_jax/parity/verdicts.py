"""What a comparison of one tensor says: a verdict, and which framework is further from the truth.

numpy only. The truth, called the oracle, is float64 or wider and never the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Half the distance between 1 and the next number.
UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}

# A reference further away than this many u·cond is wrong itself, and the rule would excuse the
# same of the other. Sums of a few hundred terms stay below 1.
REFERENCE_LIMIT = 4.0

# How many standard deviations of averaged rounding a slope may have.
SLOPE_LIMIT = 8.0


class Vacuous(AssertionError):
    """A comparison that would pass whatever the code did."""


class Verdict(StrEnum):
    """What a comparison of one tensor says.

    ``EXACT``: bit for bit the same. ``ORDER_ONLY``: as close to the truth as another order of
    summation is. ``BIASED``: that close, but off by a common factor, which rounding does not
    leave. ``MISMATCH``: one of the two is wrong. ``VACUOUS``: the comparison would pass
    whatever the code did.
    """

    EXACT = "EXACT"
    ORDER_ONLY = "ORDER-ONLY"
    BIASED = "BIASED"
    MISMATCH = "MISMATCH"
    VACUOUS = "VACUOUS"

    @property
    def ok(self) -> bool:
        """Whether the verdict is one that a port may ship with."""
        return self in (Verdict.EXACT, Verdict.ORDER_ONLY)


@dataclass(frozen=True)
class TensorVerdict:
    """The comparison of one tensor.

    Args:
        name: the tensor's.
        verdict: what the comparison says.
        jax: ``‖jax − oracle‖ / ‖oracle‖``.
        torch: ``‖torch − oracle‖ / ‖oracle‖``.
        bound: what ``jax`` is held to, ``2 · torch + u · cond``.
        slope: ``⟨jax, oracle⟩ / ⟨oracle, oracle⟩ − 1``: rounding averages out, a factor stays.
        slope_limit: what rounding alone may leave of it.
        why: the reason in one line; empty where all is well.
        shape: the tensor's.
        dtype: JAX's dtype of it.
    """

    name: str
    verdict: Verdict
    jax: float = math.nan
    torch: float = math.nan
    bound: float = math.nan
    slope: float = math.nan
    slope_limit: float = math.nan
    why: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""

    @property
    def ratio(self) -> float:
        """JAX's error in units of PyTorch's; NaN where both are exact."""
        return self.jax / self.torch if self.torch else (math.inf if self.jax else math.nan)

    @property
    def further(self) -> str:
        """Who is further from the truth: ``"jax"``, ``"torch"`` or ``"neither"``."""
        if self.jax == self.torch or math.isnan(self.jax - self.torch):
            return "neither"
        return "jax" if self.jax > self.torch else "torch"

    def __str__(self) -> str:
        found = f"{self.name}: {self.verdict}, {tuple(self.shape)} {self.dtype}"
        if not math.isnan(self.jax):
            found += (
                f"; relL2 to the truth: jax {self.jax:.3e}, torch {self.torch:.3e}, bound "
                f"{self.bound:.3e}; slope {self.slope:+.1e}; further away: {self.further}"
            )
        return f"{found}. {self.why}" if self.why else found


def judge(
    name: str,
    jax: NDArray[Any],
    torch: NDArray[Any],
    oracle: NDArray[Any],
    *,
    unit_roundoff: float,
    cond: float = 1.0,
    exact: bool = False,
    independent: int | None = None,
    size: float | None = None,
) -> TensorVerdict:
    """Compare one tensor of two frameworks with the truth.

    The rule is ``relL2(jax, oracle) ≤ 2 · relL2(torch, oracle) + u · cond``, and torch's own
    error at most ``4 · u · cond``. Within it, a slope of more than 8 standard deviations of the
    rounding error is a bias.

    Args:
        name: the tensor's.
        jax: JAX's, any floating dtype.
        torch: PyTorch's, as numpy.
        oracle: the truth, float64 or wider.
        unit_roundoff: u of the coarsest dtype that the computation rounds to.
        cond: ``‖the formula on absolute values‖ / ‖the formula‖``, or an estimate of it.
        exact: whether every order of summation is exact here, so that only equality will do.
        independent: how many independent roundings the tensor averages over; by default the
            product of all its axes but the longest.
        size: what errors are measured in instead of ``‖oracle‖``, for a tensor that is zero but
            for rounding, such as the gradient of a bias that a softmax does not see.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, chapter 3, for ``u · cond``.

    >>> oracle = np.linspace(1, 2, 1000).reshape(20, 50)
    >>> fine = oracle.astype(np.float32)
    >>> u = UNIT_ROUNDOFF["float32"]
    >>> judge("y", fine, fine, oracle, unit_roundoff=u).verdict
    <Verdict.EXACT: 'EXACT'>
    >>> wrong = judge("y", fine * np.float32(1.00001), fine, oracle, unit_roundoff=u)
    >>> wrong.verdict.value, wrong.further
    ('MISMATCH', 'jax')
    """
    jax, torch, oracle = (np.asarray(one) for one in (jax, torch, oracle))
    seen = TensorVerdict(name, Verdict.VACUOUS, shape=jax.shape, dtype=str(jax.dtype))
    if problem := _vacuous(oracle, size):
        return replace(seen, why=problem)
    shapes = {"jax": jax.shape, "torch": torch.shape, "the truth": oracle.shape}
    if len(set(shapes.values())) > 1:
        said = ", ".join(f"{side} {shape}" for side, shape in shapes.items())
        return replace(seen, verdict=Verdict.MISMATCH, why=f"shapes differ: {said}")
    errors = rel_l2(jax, oracle, size), rel_l2(torch, oracle, size)
    slopes = (0.0, 0.0) if size else (slope(jax, oracle), slope(torch, oracle))
    n = independent or max(1, oracle.size // max((1, *oracle.shape)))
    limit = SLOPE_LIMIT * max(errors) / math.sqrt(n) + 2 * abs(slopes[1])
    unit = unit_roundoff * cond
    found = replace(
        seen,
        jax=errors[0],
        torch=errors[1],
        bound=2 * errors[1] + unit,
        slope=slopes[0],
        slope_limit=limit,
    )
    verdict, why = _decide(found, unit, exact=exact, same=_same_bits(jax, torch))
    return replace(found, verdict=verdict, why=why)


def _decide(found: TensorVerdict, unit: float, *, exact: bool, same: bool) -> tuple[Verdict, str]:
    # Negated comparisons, so that NaN fails.
    limit = REFERENCE_LIMIT * unit
    if not found.torch <= limit:
        who = "torch is" if found.jax <= limit else "both are"
        return Verdict.MISMATCH, f"{who} further from the truth than 4 u·cond = {limit:.1e}"
    if not found.jax <= found.bound:
        return Verdict.MISMATCH, "jax is further from the truth than rounding explains"
    if same:
        return Verdict.EXACT, ""
    if exact:
        return Verdict.MISMATCH, "the sums are exact in any order, so equality was wanted"
    if not abs(found.slope) <= found.slope_limit:
        why = f"a common factor of 1{found.slope:+.1e}; rounding leaves {found.slope_limit:.1e}"
        return Verdict.BIASED, why
    return Verdict.ORDER_ONLY, ""


def assert_within_rule(
    jax: NDArray[Any],
    torch: NDArray[Any],
    oracle: NDArray[Any],
    cond: float,
    unit_roundoff: float,
    name: str = "tensor",
) -> tuple[float, float]:
    """Raise unless ``judge`` finds no mismatch; return both errors in units of ``u · cond``.

    Raises:
        Vacuous: there is no truth to compare with.
        AssertionError: one of the two is too far from it.
    """
    found = judge(name, jax, torch, oracle, unit_roundoff=unit_roundoff, cond=cond)
    if found.verdict is Verdict.VACUOUS:
        raise Vacuous(str(found))
    if found.verdict is Verdict.MISMATCH:
        raise AssertionError(str(found))
    return found.jax / (unit_roundoff * cond), found.torch / (unit_roundoff * cond)


def rel_l2(got: NDArray[Any], oracle: NDArray[Any], size: float | None = None) -> float:
    """Return ``‖got − oracle‖ / ‖oracle‖``, or over ``size``, in the oracle's precision."""
    return norm(_wide(got, oracle) - oracle) / (size or norm(oracle))


def slope(got: NDArray[Any], oracle: NDArray[Any]) -> float:
    """Return ``⟨got, oracle⟩ / ⟨oracle, oracle⟩ − 1``: rounding averages out, a factor stays."""
    return float(np.vdot(_wide(got, oracle) - oracle, oracle) / np.vdot(oracle, oracle))


def norm(value: NDArray[Any]) -> float:
    """Return the Frobenius norm."""
    return float(np.sqrt(np.vdot(value, value)))


def worst(results: Iterable[TensorVerdict]) -> Verdict:
    """Return the worst verdict of several; ``VACUOUS`` where there is none.

    >>> worst([TensorVerdict("y", Verdict.EXACT), TensorVerdict("dx", Verdict.BIASED)]).value
    'BIASED'
    """
    order = (Verdict.EXACT, Verdict.ORDER_ONLY, Verdict.BIASED, Verdict.VACUOUS, Verdict.MISMATCH)
    return max((one.verdict for one in results), key=order.index, default=Verdict.VACUOUS)


def _vacuous(oracle: NDArray[Any], size: float | None) -> str:
    if np.asarray(oracle).dtype not in (np.float64, np.longdouble):
        return f"the truth is {np.asarray(oracle).dtype}, wanted float64 or wider"
    if not np.isfinite(oracle).all():
        return "the truth is not finite"
    return "" if size or np.any(oracle) else "the truth is zero"


def _same_bits(one: NDArray[Any], two: NDArray[Any]) -> bool:
    """Tell whether two arrays hold the same values, with the same signs of zero."""
    one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
    return bool(np.array_equal(one, two) and np.array_equal(np.signbit(one), np.signbit(two)))


def _wide(value: NDArray[Any], oracle: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(value).astype(oracle.dtype)
