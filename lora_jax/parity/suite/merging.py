"""Level 5: merging by dtype, against the sum in longdouble rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..reports.checks import Check
from ..verdicts import UNIT_ROUNDOFF, TensorVerdict, Vacuous, judge

NEEDS = ("torch", "peft")
DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
OUT, IN, R = 37, 53, 6


def exact(dtype: str, seed: int) -> Iterator[TensorVerdict]:
    """Compare with the rounded truth bit for bit where float32 holds ``W + s·A·B`` exactly.

    W has 7 bits and ``s·A·B`` 12, so that half precision holds neither it nor the sum.
    """
    rng = np.random.default_rng(seed)
    w = (rng.integers(-127, 128, (OUT, IN)) / 64).astype(DTYPES[dtype])
    a, b = (rng.integers(-1, 2, s).astype(np.float32) for s in ((IN, R), (R, OUT)))
    yield from _compared(dtype, w, a, b, 1021 * 2.0**-14, exact=True)


def close(dtype: str, seed: int) -> Iterator[TensorVerdict]:
    """Hold the merged weight, and what merging added to it, to the rule, for random numbers."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((OUT, IN)).astype(DTYPES[dtype])
    a = (IN**-0.5 * rng.standard_normal((IN, R))).astype(np.float32)
    b = (0.3 * rng.standard_normal((R, OUT))).astype(np.float32)
    yield from _compared(dtype, w, a, b, 16 / R, exact=False)


def _compared(
    dtype: str, w: NDArray[Any], a: NDArray[Any], b: NDArray[Any], scale: float, *, exact: bool
) -> Iterator[TensorVerdict]:
    delta = np.longdouble(scale) * (a.astype(np.longdouble) @ b.astype(np.longdouble)).T
    whole = w.astype(np.longdouble) + delta
    truth = whole.astype(np.float64) if exact else whole
    sides = {"ours": _ours(w, a, b, scale), "peft": _pefts(dtype, w, a, b, scale)}
    if exact:
        once = truth.astype(np.float32).astype(DTYPES[dtype]).astype(np.float64)
        if (truth.astype(np.float32) != truth).any():
            raise Vacuous("float32 does not hold the sum, so that it may be rounded twice")
        if dtype != "float32" and (once == truth).all():
            raise Vacuous(f"{dtype} holds the sum, so that nothing is rounded")
        unit = UNIT_ROUNDOFF[dtype]
        yield judge("W, rounded once", sides["ours"], once, once, unit_roundoff=unit, exact=True)
        # PEFT's sum is not rounded once in every dtype; the verdict on it is the rule's.
        yield judge("W, beside PEFT's", sides["ours"], sides["peft"], truth, unit_roundoff=unit)
        return
    start = w.astype(np.float64)
    # Rounding W + ΔW is relative to the sum.
    cond = 4 * float(np.linalg.norm(whole) / np.linalg.norm(delta))
    tensors = {"W": (0.0, whole, 4.0), "ΔW": (start, delta, cond)}
    for name, (from_, value, condition) in tensors.items():
        ours, theirs = (side.astype(np.float64) - from_ for side in sides.values())
        unit = UNIT_ROUNDOFF[dtype]
        yield judge(name, ours, theirs, value, unit_roundoff=unit, cond=condition)


def _ours(w: NDArray[Any], a: NDArray[Any], b: NDArray[Any], scale: float) -> NDArray[Any]:
    import jax.numpy as jnp

    from ... import Adapter, merge

    adapters = {"w": Adapter(jnp.asarray(a), jnp.asarray(b), scale, "oi")}
    return np.asarray(merge({"w": jnp.asarray(w)}, adapters)["w"])


def _pefts(
    dtype: str, w: NDArray[Any], a: NDArray[Any], b: NDArray[Any], scale: float
) -> NDArray[Any]:
    import peft
    import torch

    from ..sides.torch_side import to_numpy, to_torch

    linear = torch.nn.Linear(IN, OUT, bias=False, dtype=getattr(torch, dtype))
    with torch.no_grad():
        linear.weight.copy_(to_torch(w))
    options: Any = dict(r=R, lora_alpha=scale * R, target_modules=["0"])
    model: Any = peft.get_peft_model(torch.nn.Sequential(linear), peft.LoraConfig(**options))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(to_torch(a.T))
        layer.lora_B["default"].weight.copy_(to_torch(b.T))
    return to_numpy(model.merge_and_unload()[0].weight)


def _checks() -> Iterator[Check]:
    for dtype in DTYPES:
        yield Check(f"merge/peft exact {dtype}", 5, partial(exact, dtype), NEEDS)
        yield Check(f"merge/peft {dtype}", 5, partial(close, dtype), NEEDS)


CHECKS = tuple(_checks())
