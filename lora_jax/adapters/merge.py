"""Folding adapters into the weights, as a new tree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..core import delta as changes
from ..core import lowrank, paths
from ..core import token_rows as rows_of
from ..core.adapter import Adapter, Adapters, Full, Rows, check_fit
from ..core.alora import refuse_masked
from ..core.buffers import apart
from ..core.errors import AdapterError, raise_all

# A tenth of ΔW is more than rounding may take unsaid.
LARGEST_LOSS = 0.1


@dataclass(frozen=True)
class Rounding:
    """What rounding to the weight's dtype left of ``ΔW`` in one merged weight.

    Args:
        dtype: the weight's.
        changed: how many of its values ``ΔW`` should change: those where it is not 0.
        unchanged: how many of these rounding left as they were.
        error: ``‖(W_merged − W) − ΔW‖ / ‖ΔW‖`` (Frobenius norms, in float64); infinite where
            ``ΔW`` or the merged weight is not finite.
    """

    dtype: str
    changed: int
    unchanged: int
    error: float

    @property
    def warning(self) -> str | None:
        """What to say where rounding took more than a tenth of ``ΔW``, or broke it; else None."""
        if math.isnan(self.error) or math.isinf(self.error):
            return f"the merged weight is not finite in {self.dtype}: its change is beyond it"
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
    or rows trained in full are put in. An adapter's bias goes into the bias of the same module,
    ``b + s·bias``, in the same way. To undo a merge, keep ``params``: what is returned shares no
    array with it, so either may be donated.

    Args:
        params: the frozen parameters, any pytree.
        adapters: ``{path: Adapter | Full | Rows}``.

    Raises:
        AdapterError: an adapter has no parameter, does not fit its shape, or is an aLoRA's, which
            acts on a part of the tokens; or lists those with a bias whose module has none, or one
            of another shape; or lists the weights of 8 bits that cannot hold the sum.

    >>> import jax.numpy as jnp
    >>> from lora_jax.core.adapter import Adapter
    >>> adapters = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)}
    >>> merge({"w": jnp.zeros((3, 2))}, adapters)["w"][0]
    Array([2., 2.], dtype=float32)
    """
    refuse_masked(adapters, "they cannot be merged")
    check_fit(params, adapters)
    leaves = paths.flatten(params)
    own = bias_paths(leaves, adapters)
    changed: dict[str, Any] = {
        path: one.value for path, one in adapters.items() if isinstance(one, Full)
    }
    for name, adapter in adapters.items():
        path = paths.parameter_of(name)
        if isinstance(adapter, Rows):
            changed[path] = rows_of.put(leaves[path], adapter)
        elif isinstance(adapter, Adapter):
            changed[path] = changes.merged(changed.get(path, leaves[path]), adapter)
        if name in own:
            bias: Any = changed.get(own[name], leaves[own[name]])
            changed[own[name]] = lowrank.add(bias, _bias_change(adapter, bias))
    raise_all(AdapterError, "these sums are beyond what the weights hold", _overflows(changed))
    return apart(paths.replace(params, changed), params, adapters)


def _overflows(merged: Mapping[str, Any]) -> Iterator[str]:
    """Yield the weights of 8 bits and fewer that are no longer finite; a large one is NaN there."""
    for path, weight in merged.items():
        if not lowrank.is_tiny(weight.dtype) or isinstance(weight, Tracer):
            continue
        wrong = int((~jnp.isfinite(jnp.asarray(weight, jnp.float32))).sum())
        if wrong:
            largest = float(jnp.finfo(weight.dtype).max)
            yield (
                f"{path}: {wrong:,} values are not finite in {weight.dtype.name}, which ends at "
                f"{largest:g}; merge into a copy of another dtype"
            )


def bias_paths(leaves: Mapping[str, Any], adapters: Adapters) -> dict[str, str]:
    """Return which parameter the bias of an adapter is merged into, by the adapter's name.

    Args:
        leaves: the parameters by path.
        adapters: those without a bias are left out.

    Raises:
        AdapterError: lists those whose module has no bias, or one of another shape.

    >>> pair = Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0, bias=jnp.ones(2))
    >>> leaves = {"up.kernel": jnp.ones((3, 2)), "up.bias": jnp.ones(2)}
    >>> bias_paths(leaves, {"up.kernel": pair})
    {'up.kernel': 'up.bias'}
    """
    of_module = {
        paths.module_of(path): path for path in leaves if paths.leaf_name(path) in paths.BIAS_NAMES
    }
    found, problems = {}, []
    for name, adapter in adapters.items():
        if not isinstance(adapter, Adapter) or adapter.bias is None:
            continue
        shape, path = tuple(adapter.bias.shape), of_module.get(paths.module_of(name))
        if path is None:
            problems.append(f"{name}: its module has no bias to add {shape} to")
        elif _thick(got := tuple(leaves[path].shape)) != _thick(shape):
            problems.append(f"{path}: got {got}, the adapter's bias is {shape}")
        else:
            found[name] = path
    raise_all(AdapterError, "these adapters have a bias that cannot be merged", problems)
    return found


def _thick(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _bias_change(adapter: Any, bias: Any) -> Any:
    """Return ``s·bias`` in the shape of the parameter that it is added to."""
    return changes.scaled_bias(adapter).reshape(bias.shape)  # pyright: ignore


def merge_report(params: Any, adapters: Adapters) -> dict[str, Rounding]:
    """Return what rounding does to every ``ΔW`` that ``merge(params, adapters)`` puts in.

    Leaves and rows trained in full are not in it: they take the place of the old ones as they are.

    Args:
        params: the frozen parameters.
        adapters: ``{path: Adapter | Full | Rows}``.

    Returns:
        A ``Rounding`` by parameter path, in the order of the adapters; biases come last.

    Raises:
        AdapterError: as ``merge``.

    >>> adapters = {"w": Adapter(jnp.full((3, 1), 1e-3), jnp.ones((1, 2)), scale=1.0)}
    >>> merge_report({"w": jnp.ones((3, 2), jnp.bfloat16)}, adapters)["w"]
    Rounding(dtype='bfloat16', changed=6, unchanged=6, error=1.0)
    """
    refuse_masked(adapters, "they cannot be merged")
    check_fit(params, adapters)
    leaves = paths.flatten(params)
    parts: dict[str, list[Adapter]] = {}
    for name, adapter in adapters.items():
        if isinstance(adapter, Adapter):
            parts.setdefault(paths.parameter_of(name), []).append(adapter)
    report = {path: rounding(leaves[path], own) for path, own in parts.items()}
    for name, path in bias_paths(leaves, adapters).items():
        full = adapters.get(path)
        old = jnp.asarray(full.value if isinstance(full, Full) else leaves[path])
        change = _bias_change(adapters[name], old)
        report[path] = _rounding(old, lowrank.add(old, change), change)
    return report


def rounding(weight: Any, adapters: list[Adapter]) -> Rounding:
    """Return what rounding does to the sum of these adapters of one weight, which they fit."""
    weight = jnp.asarray(weight)
    merged = weight
    for adapter in adapters:
        merged = changes.merged(merged, adapter)
    return _rounding(weight, merged, changes.change(weight, adapters))


def _rounding(weight: Any, merged: Any, change: Any) -> Rounding:
    delta = np.asarray(change, np.float64)
    old, new = (np.asarray(one.astype(jnp.float32), np.float64) for one in (weight, merged))
    wanted = delta != 0
    finite = bool(np.isfinite(delta).all() and np.isfinite(new).all())
    size = float(np.linalg.norm(delta)) if finite else math.inf
    return Rounding(
        weight.dtype.name,
        int(wanted.sum()),
        int((wanted & (old == new)).sum()),
        (float(np.linalg.norm(new - old - delta)) / size if size else 0.0) if finite else math.inf,
    )


def overflow(name: str, old: Any, new: Any) -> list[str]:
    """Return a line where a merged weight is not finite and the weight before was.

    >>> overflow("w", jnp.ones(3), jnp.array([1.0, jnp.inf, jnp.nan]))
    ['w: 2 of 3 values are NaN or infinite in float32']
    """
    bad = ~np.isfinite(_wide(new))
    if not bad.any() or not np.isfinite(_wide(old)).all():
        return []
    return [f"{name}: {bad.sum():,} of {bad.size:,} values are NaN or infinite in {new.dtype.name}"]


def _wide(array: Any) -> np.ndarray:
    # numpy has no isfinite for every extension dtype; float32 holds them all.
    return np.asarray(array if array.dtype == np.float64 else array.astype(np.float32))


def warnings_of(report: Mapping[str, Rounding]) -> list[str]:
    """Return a line for every weight of which rounding took more than a tenth.

    >>> warnings_of({"w": Rounding("bfloat16", 6, 0, 0.01)})
    []
    """
    return [f"{path}: {one.warning}" for path, one in report.items() if one.warning]
