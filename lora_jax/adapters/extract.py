"""Adapters from two full checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..core import delta, paths
from ..core.adapter import (
    IN,
    OUT,
    STACKED,
    Adapter,
    Adapters,
    Entry,
    a_shape,
    b_shape,
    check_fit,
    pick,
    rank,
)
from ..core.buffers import apart
from ..core.errors import AdapterError, raise_all
from ..core.lowrank import accumulation_dtype
from ..rewrite import LeafPlan, Plan
from .resize import truncated


def extract(
    base: Any, tuned: Any, targets: Plan | Mapping[str, str], r: int | None = None
) -> tuple[dict[str, Adapter], dict[str, float]]:
    """Return adapters for the difference of two checkpoints, and what each leaves out.

    ``s·A·B`` is the closest to ``W_tuned − W_base`` of its rank, by the SVD of the
    difference, formed in at least float32.

    Args:
        base: parameters of a model.
        tuned: the same tree after training in full.
        targets: a plan for the model, whose ranks and scales are taken; or the axes by path,
            ``{"layers.0.q.weight": "oi"}``, with a scale of 1.
        r: the rank; where a plan is given, that of the plan if not given.

    Returns:
        The adapters, and ``‖Δ − s·A·B‖ / ‖Δ‖`` by path (Frobenius norms). What differs
        elsewhere is in the report, too: a leaf without an adapter has an error of 1.

    Raises:
        AdapterError: lists every path, shape and dtype that the trees do not share, targets
            that are no parameters, axes that do not fit, and values that are not finite.

    >>> base = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}
    >>> tuned = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}
    >>> adapters, errors = extract(base, tuned, {"w": "io"}, r=1)
    >>> adapters["w"].a.shape, errors["w"] < 1e-6
    ((3, 1), True)
    """
    old, new = paths.flatten(base), paths.flatten(tuned)
    rows = _rows(targets, r, old)
    raise_all(AdapterError, "no adapters can be extracted", _problems(old, new, rows))
    adapters, errors = {}, {}
    for row in rows:
        axes = row.axes
        change = _difference(old[row.path], new[row.path])
        if row.columns is not None:
            change = lax.slice_in_dim(change, row.columns[0], row.columns[1], axis=axes.index(OUT))
        a, b, errors[row.name] = _closest(change, axes, row.r)
        adapters[row.name] = row.adapter(a / row.scale, b)
    covered = {row.path for row in rows}
    for path in old.keys() - covered:
        if not np.array_equal(np.asarray(old[path]), np.asarray(new[path])):
            errors[path] = 1.0
    return adapters, errors


def without_dora(
    params: Any, adapters: Adapters, r: int | None = None
) -> tuple[dict[str, Entry], dict[str, float]]:
    """Return plain LoRA adapters in place of DoRA's, and what each leaves out.

    ``s·A·B`` is the closest to DoRA's ``m·(W + ΔW)/‖W + ΔW‖ − W`` of its rank, by SVD in at least
    float32. That change has the full rank of W, so the smaller the magnitudes' part in it, the
    better: look at the errors. ``merge`` is exact.

    Args:
        params: the base's parameters.
        adapters: DoRA's; others, and leaves trained in full, pass through.
        r: the new rank; if not given, that of each adapter.

    Returns:
        The adapters, with scales of ``1``, and ``‖Δ − A·B‖ / ‖Δ‖`` by the paths of DoRA's.

    Raises:
        AdapterError: an adapter has no parameter, does not fit it, or r is below 1.

    Source: DoRA, arXiv 2402.09353; Eckart and Young for the SVD.

    >>> pair = Adapter(jnp.ones((4, 1)), jnp.ones((1, 2)), 0.5, magnitude=jnp.full(2, 6.0))
    >>> plain, errors = without_dora({"w": jnp.ones((4, 2))}, {"w": pair})
    >>> plain["w"].magnitude is None, plain["w"].b.shape, errors["w"] < 1e-6
    (True, (1, 2), True)
    """
    check_fit(params, adapters)
    if r is not None and r < 1:
        raise AdapterError(f"r: got {r}, wanted at least 1")
    leaves, plain, errors = paths.flatten(params), dict(adapters), {}
    for path, one in adapters.items():
        if isinstance(one, Adapter) and one.magnitude is not None:
            change = delta.change(jnp.asarray(leaves[path]), [one])
            a, b, errors[path] = _closest(change, one.axes, rank(one) if r is None else r)
            a, b = a.astype(one.a.dtype), b.astype(one.b.dtype)
            plain[path] = replace(one, a=a, b=b, scale=1.0, magnitude=None)
    return apart(plain, adapters), errors


def _closest(change: Float[Array, "..."], axes: str, r: int) -> tuple[Any, Any, float]:
    """Return the A and B whose product is the closest to this change, and the relative error."""
    order = [n for letter in (STACKED, IN, OUT) for n, a in enumerate(axes) if a == letter]
    shape = change.shape
    stacked, fan_in, out = (int(np.prod(pick(shape, axes, one))) for one in (STACKED, IN, OUT))
    matrices = change.transpose(order).reshape(stacked, fan_in, out)
    u, sigma, vt = jnp.linalg.svd(matrices, full_matrices=False)
    (a, b), error = truncated(u, sigma, vt, r)
    return a.reshape(a_shape(shape, axes, r)), b.reshape(b_shape(shape, axes, r)), error


def _rows(
    targets: Plan | Mapping[str, str], r: int | None, leaves: Mapping[str, Any]
) -> list[LeafPlan]:
    if isinstance(targets, Plan):
        return [replace(leaf, r=leaf.r if r is None else r) for leaf in targets.adapted]
    shapes = {path: tuple(leaves[path].shape) if path in leaves else () for path in targets}
    return [
        LeafPlan(path, shapes[path], r=r or 0, scale=1.0, axes=axes)
        for path, axes in targets.items()
    ]


def _problems(old: Mapping[str, Any], new: Mapping[str, Any], rows: list[LeafPlan]) -> list[str]:
    found = [f"{path}: only in the base" for path in old if path not in new]
    found += [f"{path}: only in the tuned" for path in new if path not in old]
    for path in old.keys() & new.keys():
        for what, of in (("shape", np.shape), ("dtype", jnp.result_type)):
            got, wanted = of(new[path]), of(old[path])
            if got != wanted:
                found.append(f"{path}: {what} got {got}, wanted the base's {wanted}")
    for row in rows:
        leaf = old.get(row.path)
        if leaf is None:
            found.append(f"{row.path}: no such parameter")
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            found.append(f"{row.path}: got {leaf.dtype}, wanted floating point")
        elif tuple(leaf.shape) != row.shape or len(row.axes) != leaf.ndim:
            found.append(f"{row.path}: got axes {row.axes!r} of {leaf.shape}, wanted {row.shape}")
        elif set(row.axes) - {STACKED, IN, OUT}:
            found.append(f"{row.path}: got axes {row.axes!r}, wanted letters of 'sio'")
        elif row.path in new and not _finite(leaf, new[row.path]):
            found.append(f"{row.path}: holds NaN or infinite values")
        if row.biased:
            found.append(f"{row.path}: lora_bias is not extracted; plan without it")
        if row.r < 1 or not row.scale:
            found.append(f"{row.path}: got r={row.r}, scale={row.scale}, wanted r >= 1, no 0")
    return sorted(found)


def _finite(*leaves: Any) -> bool:
    return all(bool(jnp.isfinite(jnp.asarray(leaf)).all()) for leaf in leaves)


def _difference(old: Any, new: Any) -> Float[Array, "..."]:
    exact = accumulation_dtype(old.dtype)
    return jnp.asarray(new).astype(exact) - jnp.asarray(old).astype(exact)
