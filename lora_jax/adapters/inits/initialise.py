"""``initialise``: adapters, and the base that belongs to them, from weights, data or gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from ...core import delta, lowrank, paths, sharding
from ...core.adapter import IN, OUT, STACKED, Entry, pick
from ...core.errors import ConfigError, raise_all
from ...core.initializers import changes_base, fold_in_path, niter, reads_more
from ...rewrite import LeafPlan, Plan
from . import activations, gradients, loftq, weights

# What one method makes: A and B for every adapted leaf, as stacks of matrices.
# LoftQ adds the quantised base.
Pairs = Mapping[str, tuple[Array, ...]]
Stacks = Mapping[str, Float[Array, "s in_ out"]]


def initialise(
    plan: Plan,
    params: Any,
    key: Key[Array, ""],
    *,
    fn: Callable[..., Any] | None = None,
    batches: Iterable[Any] | None = None,
    mask: activations.Mask | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Entry]]:
    """Return the base and the adapters that ``plan.config.init_lora_weights`` asks for.

    ================== ============================= ======================= ==================
    init_lora_weights  reads                         base                    B
    ================== ============================= ======================= ==================
    ``olora``          W                             ``W - s·A·B``           random directions
    ``pissa``          W                             ``W - s·A·B``           largest directions
    ``pissa_niter_N``  W, a random start             ``W - s·A·B``           largest directions
    ``mica``           W                             unchanged               smallest, frozen
    ``eva``            the inputs of W               unchanged               0
    ``corda``          W, the inputs of W            ``W - s·A·B``           of both
    ``lora_ga``        ``∂fn/∂W``                    ``W - s·A·B``           of the gradient
    ``loftq``          W                             quantised W             of what was lost
    others             nothing: ``plan.init(key)``   unchanged               see there
    ================== ============================= ======================= ==================

    Where the axes of a mesh are explicit, A, B and the base are sharded as the weight is.

    Where the base changes, the model's outputs stay (nearly, with ``loftq``); train and serve
    the adapters with the base that is returned, or make them plain LoRA of the original one
    with ``relative_to``.

    Args:
        plan: what is adapted, with the configuration that names the initialisation.
        params: the pretrained parameters; they stay as they are.
        key: the random key.
        fn: for those that read data: the model ``fn(params, *batch)``; for ``lora_ga`` the loss.
        batches: tuples of arguments of ``fn``.
        mask: of ``eva`` and ``corda``: tells which inputs of a batch count, so that padding does
            not: ``lambda ids, attention_mask: attention_mask``. Its shape is that in which
            every adapted weight meets its inputs, such as ``(batch, time)``.
        **options: of ``eva``: ``whiten``; of ``corda``: ``method``; of ``lora_ga``:
            ``direction``, ``scaling`` and ``stable_gamma``; of ``loftq``: ``bits`` and
            ``iterations``. See these functions. For EVA's ranks see ``eva_ranks``.

    Returns:
        ``(base, adapters)``. The base is a new tree that shares what did not change.

    Raises:
        ConfigError: lists the leaves whose kind or rank the initialisation cannot serve, and
            what it needs and was not given, or does not know.

    >>> import jax, jax.numpy as jnp
    >>> from lora_jax import LoraConfig, lora, plan as make_plan
    >>> def fn(params, x):
    ...     return x @ params["w"]
    >>> params, x = {"w": jnp.arange(12.0).reshape(4, 3)}, jnp.ones((2, 4))
    >>> config = LoraConfig(r=1, init_lora_weights="pissa", target_modules=["w"])
    >>> found = make_plan(fn, params, config, x)
    >>> base, adapters = initialise(found, params, jax.random.key(0))
    >>> bool(abs(lora(fn)(base, adapters, x) - fn(params, x)).max() < 1e-5)
    True
    """
    name = plan.config.init_lora_weights
    if not reads_more(name):
        return params, plan.init(key, params=params)
    method = "pissa_niter" if niter(name) is not None else str(name)
    options |= {} if mask is None else dict(mask=mask)
    _check(plan, method, fn, batches, options)
    leaves = paths.flatten(params)
    stacks = {leaf.name: _matrices(leaves[leaf.path], leaf) for leaf in plan.adapted}
    pairs = _METHODS[method](plan, params, stacks, key, fn, batches, **options)
    adapters: dict[str, Entry] = {}
    changed: dict[str, Any] = {}
    for leaf in plan.adapted:
        a, b, *quantised = pairs[leaf.name]
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        a, b = a.reshape(leaf.a_shape), b.reshape(leaf.b_shape)
        adapter = plan.placed(leaf, leaf.adapter(a, b, plan.config.lora_dropout))
        if changes_base(name):
            base = changed.get(leaf.path, leaves[leaf.path])
            taken_out = replace(adapter, scale=-leaf.scale)
            changed[leaf.path] = (
                _with_matrices(base, leaf, quantised[0])
                if quantised
                else delta.merged(base, taken_out)
            )
        if leaf.dora:
            norm = delta.dora_norm(changed.get(leaf.path, leaves[leaf.path]), adapter)
            adapter = plan.placed(leaf, replace(adapter, magnitude=norm))
        adapters[leaf.name] = adapter
    return paths.replace(params, changed), adapters | plan.with_params(params).copies()


def _from_weight(rule: Callable[..., Any]) -> Callable[..., Pairs]:
    def method(
        plan: Plan, params: Any, stacks: Stacks, key: Any, fn: Any, batches: Any, **options: Any
    ) -> Pairs:
        return {
            leaf.name: jax.vmap(partial(rule, r=leaf.r, scale=leaf.scale, **options))(
                stacks[leaf.name]
            )
            for leaf in plan.adapted
        }

    return method


def _pissa_niter(plan: Plan, params: Any, stacks: Stacks, key: Any, fn: Any, batches: Any) -> Pairs:
    rounds = niter(plan.config.init_lora_weights) or 0
    pairs = {}
    for leaf in plan.adapted:
        stack = stacks[leaf.name]
        keys = jax.random.split(fold_in_path(key, leaf.name), stack.shape[0])
        rule = partial(weights.pissa_niter, niter=rounds, r=leaf.r, scale=leaf.scale)
        pairs[leaf.name] = jax.vmap(lambda w, k, rule=rule: rule(w, key=k))(stack, keys)
    return pairs


def _lora_ga(
    plan: Plan, params: Any, stacks: Stacks, key: Any, fn: Any, batches: Any, **options: Any
) -> Pairs:
    wanted = {leaf.path for leaf in plan.adapted}
    found = gradients.mean_gradients(fn, params, batches, wanted)
    pairs = {}
    for leaf in plan.adapted:
        stack, rule = stacks[leaf.name], partial(gradients.lora_ga, r=leaf.r, scale=leaf.scale)
        keys = jax.random.split(fold_in_path(key, leaf.name), stack.shape[0])
        pairs[leaf.name] = jax.vmap(lambda w, g, k, rule=rule: rule(w, g, key=k, **options))(
            stack, _matrices(found[leaf.path], leaf), keys
        )
    return pairs


def _eva(
    plan: Plan,
    params: Any,
    stacks: Stacks,
    key: Any,
    fn: Any,
    batches: Any,
    mask: Any = None,
    **options: Any,
) -> Pairs:
    seen = activations.moments(fn, params, plan.adapted, batches, mask=mask)
    pairs = {}
    for leaf in plan.adapted:
        x, out = seen[leaf.path], stacks[leaf.name].shape[2]
        rule = partial(activations.eva, r=leaf.r, out=out, **options)
        pairs[leaf.name] = jax.vmap(rule)(x.gram, x.total, x.count)
    return pairs


def _corda(
    plan: Plan,
    params: Any,
    stacks: Stacks,
    key: Any,
    fn: Any,
    batches: Any,
    mask: Any = None,
    **options: Any,
) -> Pairs:
    seen = activations.moments(fn, params, plan.adapted, batches, scaled=True, mask=mask)
    pairs = {}
    for leaf in plan.adapted:
        x = seen[leaf.path]
        each = [
            activations.corda(w, gram / count, leaf.r, leaf.scale, **options)
            for w, gram, count in zip(stacks[leaf.name], x.gram, x.count, strict=True)
        ]
        pairs[leaf.name] = tuple(map(jnp.stack, zip(*each, strict=True)))
    return pairs


_METHODS: dict[str, Callable[..., Pairs]] = {
    "olora": _from_weight(weights.olora),
    "pissa": _from_weight(weights.pissa),
    "pissa_niter": _pissa_niter,
    "mica": _from_weight(weights.mica),
    "loftq": _from_weight(loftq.loftq),
    "lora_ga": _lora_ga,
    "eva": _eva,
    "corda": _corda,
}

# The others read the weights alone.
_READ_DATA = ("lora_ga", "eva", "corda")

# What each knows beside its rank and scale, and of those with few values, which.
_OPTIONS: dict[str, Mapping[str, Collection[Any] | None]] = {
    "eva": dict(whiten=(False, True), mask=None),
    "corda": dict(method=("ipm", "kpm"), mask=None),
    "lora_ga": dict(direction=gradients.DIRECTIONS, scaling=gradients.SCALES, stable_gamma=None),
    "loftq": dict(bits=loftq.GRIDS, iterations=None),
}


def _check(plan: Plan, method: str, fn: Any, batches: Any, options: Mapping[str, Any]) -> None:
    missing = [name for name, x in {"fn": fn, "batches": batches}.items() if x is None]
    if method not in _READ_DATA:
        missing = []
    problems = [f"{name}: got None, {method!r} wants it" for name in missing]
    known = _OPTIONS.get(method, {})
    for name, value in options.items():
        values = known.get(name)
        if name not in known:
            has = ", ".join(known) or "none"
            problems.append(f"{name}: {method!r} has no such option, but {has}")
        elif values is not None and value not in values:
            problems.append(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, values))}")
    if options.get("iterations", 1) < 1:
        problems.append(f"iterations: got {options['iterations']!r}, wanted at least 1")
    for leaf in plan.adapted:
        # EVA's B is zero, so its directions are those of the inputs alone.
        least = min(_size(leaf, IN), math.inf if method == "eva" else _size(leaf, OUT))
        wanted = 2 * leaf.r if method == "lora_ga" else leaf.r
        if wanted > least:
            problems.append(f"{leaf.name}: got r={leaf.r}, {method!r} has {least} directions here")
    raise_all(ConfigError, "this initialisation cannot be made", problems)


def _matrices(weight: Array, leaf: LeafPlan) -> Float[Array, "s in_ out"]:
    """Return the adapted part of a weight as one matrix for each stacked index.

    Each is whole on every device of a mesh with explicit axes, as decompositions want it.
    """
    weight = sharding.along(weight, ())
    if leaf.columns is not None:
        weight = lax.slice_in_dim(weight, *leaf.columns, axis=leaf.axes.index(OUT))
    order = [n for x in (STACKED, IN, OUT) for n, axis in enumerate(leaf.axes) if axis == x]
    wide = weight.astype(lowrank.accumulation_dtype(weight.dtype))
    return wide.transpose(order).reshape(-1, _size(leaf, IN), _size(leaf, OUT))


def _with_matrices(weight: Array, leaf: LeafPlan, stack: Float[Array, "s in_ out"]) -> Array:
    """Return the weight with these matrices as its adapted part; the inverse of ``_matrices``."""
    order = [n for x in (STACKED, IN, OUT) for n, axis in enumerate(leaf.axes) if axis == x]
    grouped = stack.reshape([leaf.part_shape[n] for n in order])
    part = grouped.transpose([order.index(n) for n in range(len(order))]).astype(weight.dtype)
    if leaf.columns is not None:
        axis, old = leaf.axes.index(OUT), sharding.along(weight, ())
        part = lax.dynamic_update_slice_in_dim(old, part, leaf.columns[0], axis)
    return sharding.as_sharded(part, weight)


def _size(leaf: LeafPlan, letter: str) -> int:
    return math.prod(pick(leaf.part_shape, leaf.axes, letter))
