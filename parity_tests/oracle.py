"""The truth about a LoRA linear in float64, and the rule that two implementations are held to.

numpy only, and never the code under test. Layouts are those of JAX: x ``(n, in)``, W
``(in, out)``, A ``(in, r)``, B ``(r, out)``; g ``(n, out)`` is the loss's cotangent of y.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float64]]

# Half the distance between 1 and the next number.
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}

# A reference further away than this many u·cond is wrong, and the rule would excuse the same of
# ours. Sums of a few hundred terms stay below 1.
REFERENCE_LIMIT = 4.0

# A low-rank path that is a smaller share of y could be wrong unseen.
SMALLEST_SHARE = 1e-2


class Vacuous(AssertionError):
    """A comparison that would pass whatever the code did."""


@dataclass(frozen=True)
class Case:
    """One LoRA linear ``y = x·W + b + s·x·A·B`` with the loss ``⟨g, y⟩``; DoRA's with m.

    Args:
        m: DoRA's magnitude ``(out,)``: ``y = x·V·(m / ‖V‖) + b``, ``V = W + s·A·B``, the norm
            over the in axis and constant for the gradient.
    """

    x: NDArray[Any]
    w: NDArray[Any]
    bias: NDArray[Any]
    a: NDArray[Any]
    b: NDArray[Any]
    g: NDArray[Any]
    scale: float
    m: NDArray[Any] | None = None


def truth(case: Case) -> Tensors:
    """Return y, dx, dA, dB (and dm) in float64."""
    exact = _map(case, lambda value: value.astype(np.float64))
    return evaluate(exact, gain(exact))


def cond(case: Case) -> dict[str, float]:
    """Return ``‖the formula on absolute values‖ / ‖the formula‖`` for every tensor of ``truth``.

    For y this is ``‖|x||W| + s·|x||A||B|‖ / ‖y‖``: how much larger than y the sums are in
    which rounding happens.
    """
    absolute = _map(case, lambda value: np.abs(value.astype(np.float64)))
    absolute = replace(absolute, bias=np.zeros_like(absolute.bias), scale=abs(case.scale))
    gains = gain(_map(case, lambda value: value.astype(np.float64)))
    majorant, value = evaluate(absolute, np.abs(gains)), truth(case)
    return {name: _norm(majorant[name]) / _norm(value[name]) for name in value}


def rel_l2(got: NDArray[Any], oracle: NDArray[np.float64]) -> float:
    """Return ``‖got − oracle‖ / ‖oracle‖`` in float64."""
    return _norm(got.astype(np.float64) - oracle) / _norm(oracle)


def slope(got: NDArray[Any], oracle: NDArray[np.float64]) -> float:
    """Return ``⟨got, oracle⟩ / ⟨oracle, oracle⟩ − 1``: rounding averages out, a factor stays."""
    return float(np.vdot(got.astype(np.float64) - oracle, oracle) / np.vdot(oracle, oracle))


def assert_within_rule(
    jax: NDArray[Any],
    torch: NDArray[Any],
    oracle: NDArray[np.float64],
    cond: float,
    unit_roundoff: float,
    name: str = "tensor",
) -> tuple[float, float]:
    """Hold ``relL2(jax, oracle) ≤ 2 · relL2(torch, oracle) + u · cond``, and torch to the truth.

    Returns:
        Both errors in units of ``u · cond``.
    """
    if oracle.dtype != np.float64:
        raise Vacuous(f"{name}: the oracle is {oracle.dtype}, wanted float64")
    if not np.isfinite(oracle).all() or not oracle.any():
        raise Vacuous(f"{name}: the oracle is zero or not finite")
    shapes = [array.shape for array in (jax, torch, oracle)]
    if len(set(shapes)) != 1:
        raise AssertionError(f"{name}: shapes of jax, torch, oracle are {shapes}")
    ours, theirs, unit = rel_l2(jax, oracle), rel_l2(torch, oracle), unit_roundoff * cond
    bound = 2 * theirs + unit
    further = "jax" if ours > theirs else "torch"
    report = (
        f"{name}: relL2 to the truth is jax {ours:.3e}, torch {theirs:.3e}; the bound for jax is "
        f"{bound:.3e} (u·cond = {unit:.3e}); {further} is further from the truth"
    )
    # Negated, so that NaN fails.
    if not theirs <= REFERENCE_LIMIT * unit:
        raise AssertionError(f"the reference itself is wrong. {report}")
    if not ours <= bound:
        raise AssertionError(report)
    return ours / unit, theirs / unit


def refuse_vacuous(case: Case, *, square: bool = False, exact_scale: bool = False) -> None:
    """Raise ``Vacuous`` if an error in the low-rank path could not be seen in this case.

    Args:
        case: what is about to be compared.
        square: whether sizes may coincide, which hides a transposition.
        exact_scale: whether bfloat16 may hold the scale exactly, which hides a rounded one.
    """
    (n, fan_in), (r, out) = case.x.shape, case.b.shape
    if not case.b.any() or not case.a.any() or not case.scale:
        raise Vacuous("A, B or the scale is zero")
    share = _norm(truth(case)["y"] - truth(replace(case, b=np.zeros_like(case.b)))["y"])
    share /= _norm(truth(case)["y"])
    if not share >= SMALLEST_SHARE:
        raise Vacuous(f"the low-rank path is {share:.1e} of y, wanted {SMALLEST_SHARE}")
    if not square and len({n, fan_in, r, out}) < 4:
        raise Vacuous(f"n, in, r, out = {n, fan_in, r, out} are not all different")
    if not exact_scale and not np.float32(case.scale).view(np.uint32) & 0xFFFF:
        raise Vacuous(f"bfloat16 holds the scale {case.scale} exactly")


def evaluate(case: Case, gain: NDArray[np.float64]) -> Tensors:
    """Return every tensor for a weight ``V · gain``; written once, for values and for bounds."""
    x, g, s = case.x, case.g, case.scale
    v = case.w + s * (case.a @ case.b)
    dv = (x.T @ g) * gain
    tensors = {
        "y": x @ (v * gain) + case.bias,
        "dx": g @ (v * gain).T,
        "dA": s * (dv @ case.b.T),
        "dB": s * (case.a.T @ dv),
    }
    if case.m is not None:
        tensors["dm"] = ((x.T @ g) * v).sum(axis=0) * (gain / case.m)
    return tensors


def gain(case: Case) -> NDArray[np.float64]:
    """Return DoRA's ``m / ‖V‖``, one for LoRA: what the weight's columns are multiplied by."""
    if case.m is None:
        return np.ones(case.w.shape[1])
    v = case.w + case.scale * (case.a @ case.b)
    return case.m / np.sqrt((v * v).sum(axis=0))


def _map(case: Case, function: Any) -> Case:
    arrays = {f.name: getattr(case, f.name) for f in fields(case)}
    return replace(case, **{k: function(v) for k, v in arrays.items() if isinstance(v, np.ndarray)})


def _norm(value: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.vdot(value, value)))
