"""Folding adapters into the weights, as a new tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import lowrank, paths
from .adapter import Adapter, Adapters, Full, check_fit

# A tenth of ΔW is more than rounding may take unsaid.
LARGEST_LOSS = 0.1


@dataclass(frozen=True)
class Rounding:
    """What rounding to the weight's dtype left of ``ΔW`` in one merged weight.

    Args:
        dtype: the weight's.
        changed: how many of its values ``ΔW`` should change: those where it is not 0.
        unchanged: how many of these rounding left as they were.
        error: ``‖(W_merged − W) − ΔW‖ / ‖ΔW‖`` (Frobenius norms, in float64).
    """

    dtype: str
    changed: int
    unchanged: int
    error: float

    @property
    def warning(self) -> str | None:
        """What to say where rounding took more than a tenth of ``ΔW``; None elsewhere."""
        if not self.error > LARGEST_LOSS:
            return None
        return (
            f"rounding to {self.dtype} takes {min(self.error, 1):.0%} of the change away: "
            f"{self.unchanged:,} of {self.changed:,} values stay as they were. Merge into "
            "float32 weights, or keep the adapter apart"
        )


def merge(params: Any, adapters: Adapters) -> Any:
    """Return ``params`` with ``W + s·A·B`` in place of every adapted W; the old tree stays.

    The sum is formed in at least float32 and rounded once to the weight's dtype. Leaves
    trained in full are put in. To undo a merge, keep ``params``.

    Args:
        params: the frozen parameters, any pytree.
        adapters: ``{path: Adapter | Full}``.

    Raises:
        AdapterError: an adapter has no parameter, or does not fit its shape.

    >>> import jax.numpy as jnp
    >>> from lora_jax.adapter import Adapter
    >>> adapters = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)}
    >>> merge({"w": jnp.zeros((3, 2))}, adapters)["w"][0]
    Array([2., 2.], dtype=float32)
    """
    check_fit(params, adapters)
    leaves, changed = paths.flatten(params), {}
    for name, adapter in adapters.items():
        path = paths.parameter_of(name)
        if isinstance(adapter, Full):
            changed[path] = adapter.value
        else:
            changed[path] = lowrank.merged(changed.get(path, leaves[path]), adapter)
    return paths.replace(params, changed)


def merge_report(params: Any, adapters: Adapters) -> dict[str, Rounding]:
    """Return what rounding does to every ``ΔW`` that ``merge(params, adapters)`` puts in.

    Leaves trained in full are not in it: they take the place of the old ones as they are.

    Args:
        params: the frozen parameters.
        adapters: ``{path: Adapter | Full}``.

    Returns:
        A ``Rounding`` by parameter path, in the order of the adapters.

    Raises:
        AdapterError: as ``merge``.

    >>> adapters = {"w": Adapter(jnp.full((3, 1), 1e-3), jnp.ones((1, 2)), scale=1.0)}
    >>> merge_report({"w": jnp.ones((3, 2), jnp.bfloat16)}, adapters)["w"]
    Rounding(dtype='bfloat16', changed=6, unchanged=6, error=1.0)
    """
    check_fit(params, adapters)
    leaves = paths.flatten(params)
    parts: dict[str, list[Adapter]] = {}
    for name, adapter in adapters.items():
        if isinstance(adapter, Adapter):
            parts.setdefault(paths.parameter_of(name), []).append(adapter)
    return {path: rounding(leaves[path], own) for path, own in parts.items()}


def rounding(weight: Any, adapters: list[Adapter]) -> Rounding:
    """Return what rounding does to the sum of these adapters of one weight, which they fit."""
    weight = jnp.asarray(weight)
    delta = np.asarray(lowrank.delta(lowrank.joined(adapters, weight.shape)), np.float64)
    merged = weight
    for adapter in adapters:
        merged = lowrank.merged(merged, adapter)
    old, new = (np.asarray(one.astype(jnp.float32), np.float64) for one in (weight, merged))
    wanted = delta != 0
    size = float(np.linalg.norm(delta))
    return Rounding(
        weight.dtype.name,
        int(wanted.sum()),
        int((wanted & (old == new)).sum()),
        float(np.linalg.norm(new - old - delta)) / size if size else 0.0,
    )


def warnings_of(report: Mapping[str, Rounding]) -> list[str]:
    """Return a line for every weight of which rounding took more than a tenth.

    >>> warnings_of({"w": Rounding("bfloat16", 6, 0, 0.01)})
    []
    """
    return [f"{path}: {one.warning}" for path, one in report.items() if one.warning]
