"""What ``"all-linear"`` would adapt if it could: weights behind something that has no rule.

A matrix that is masked, scaled, padded or dequantised on its way to a product is a weight, and a
model without it learns less than its user thinks. A norm's scale, a bias or a table of positions
meets the data element by element and is none, stacked or not. What tells them apart is whether
something made of parameters alone stands in a product with the data.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ...core.errors import PlanError
from ..interpret import Record
from ..origins import walk
from ..trace import Traced

# How many lines a message has before it says how many more there are.
MOST = 12


def weights(traced: Traced, record: Record) -> dict[str, str]:
    """Return the weights that stand in a product and have no rule, each with the reason."""
    values = dict(zip(traced.paths, traced.operands, strict=False))
    whole = [path for path, value in values.items() if is_whole_numbers(value)]
    if not whole and not record.rejected:
        return {}
    found = walk(traced).in_products
    left = {path: why for path, why in record.rejected.items() if path in found | {*record.sites}}
    return {path: next(iter(why.values())) for path, why in left.items()} | {
        path: f"its {values[path].dtype} values have no low-rank sum; give the dequantised weight "
        "among the parameters"
        for path in whole
        if path in found
    }


def no_weights(traced: Traced, record: Record) -> set[str]:
    """Return the matrices that a weight is multiplied with, and that are none themselves.

    A decoder's queries or a model's latents are such: parameters, and the data of the first layer.
    """
    if not record.together:
        return set()
    found = walk(traced).in_products
    pairs = [pair for one, other, _ in record.together for pair in ((one, other), (other, one))]
    return {path for one, other in pairs if other & found for path in one - found}


def warn(left_out: Mapping[str, str]) -> None:
    """Warn of the weights that ``"all-linear"`` leaves out."""
    if left_out:
        warnings.warn(
            '"all-linear" leaves out these weights, whose use has no rule (adapt them with '
            'on_unsupported="materialize", which forms their W + AB, or name the others in '
            "target_modules):\n  " + "\n  ".join(_capped(left_out)),
            stacklevel=3,
        )


def reject_nothing(reasons: Mapping[str, str]) -> None:
    """Raise the error that nothing is adapted, with the reason for every matrix."""
    known = "\n  ".join(_capped(reasons)) or "the parameters hold no matrix"
    raise PlanError(f'"all-linear" adapts nothing in this model:\n  {known}')


def _capped(reasons: Mapping[str, str]) -> list[str]:
    lines = [f"{path}: {why}" for path, why in reasons.items()]
    more = len(lines) - MOST
    return lines if more <= 1 else [*lines[:MOST], f"and {more} more"]


def is_whole_numbers(value: Any) -> bool:
    """Tell whether a parameter is a matrix of integers, as a quantised weight is."""
    return value.ndim >= 2 and jnp.issubdtype(value.dtype, jnp.integer)
