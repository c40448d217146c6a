"""The truth about a LoRA linear in float64: y, dx, dA, dB, and DoRA's dm.

numpy only, and never the code under test. Layouts are those of JAX: x ``(n, in)``, W
``(in, out)``, A ``(in, r)``, B ``(r, out)``; g ``(n, out)`` is the loss's cotangent of y.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import guards
from ..guards import SMALLEST_SHARE
from ..verdicts import Vacuous
from ..verdicts import norm as _norm

Tensors = dict[str, NDArray[Any]]


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
    sums, value = majorant(case), truth(case)
    return {name: _norm(sums[name]) / _norm(value[name]) for name in value}


def majorant(case: Case) -> Tensors:
    """Return every tensor of ``truth`` by the formula on absolute values, without the bias."""
    absolute = _map(case, lambda value: np.abs(value.astype(np.float64)))
    absolute = replace(absolute, bias=np.zeros_like(absolute.bias), scale=abs(case.scale))
    gains = gain(_map(case, lambda value: value.astype(np.float64)))
    return evaluate(absolute, np.abs(gains))


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
    if not exact_scale:
        guards.refuse(guards.exactly_held({"the case": case.scale}))


def evaluate(case: Case, gain: NDArray[Any]) -> Tensors:
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


def gain(case: Case) -> NDArray[Any]:
    """Return DoRA's ``m / ‖V‖``, one for LoRA: what the weight's columns are multiplied by."""
    if case.m is None:
        return np.ones(case.w.shape[1])
    v = case.w + case.scale * (case.a @ case.b)
    return case.m / np.sqrt((v * v).sum(axis=0))


def _map(case: Case, function: Any) -> Case:
    arrays = {f.name: getattr(case, f.name) for f in fields(case)}
    return replace(case, **{k: function(v) for k, v in arrays.items() if isinstance(v, np.ndarray)})
