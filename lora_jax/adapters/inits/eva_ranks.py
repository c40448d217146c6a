"""EVA's redistribution: the ranks go where the inputs vary most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ...core import paths
from ...core.adapter import STACKED, pick
from ...core.config import lora_config
from ...core.config.lora_config import LoraConfig
from ...core.errors import ConfigError, raise_all
from ...rewrite import LeafPlan, Plan
from . import activations
from .activations import Mask, Moments

# Grams that are nearer than this, relative to their size, are of the same inputs.
_SAME = 1e-5


def eva_ranks(
    plan: Plan,
    params: Any,
    *,
    fn: Callable[..., Any],
    batches: Iterable[Any],
    mask: Mask | None = None,
    rho: int | float = 2.0,
    adjust_scaling_factors: bool = True,
) -> Plan:
    """Return the plan with the same sum of ranks, redistributed by the variance they explain.

    The i-th direction of a module's inputs explains ``S_i² / Σ S²`` of their variance. Of all
    modules' first ``round(rho·r)`` directions those that explain most get the ranks. Among modules
    with the same inputs the first ones get what is left over, in the order of the parameters
    (PEFT: of the modules); one that gets no rank is no longer adapted.
    ``initialise(eva_ranks(plan, …), …)`` then makes the adapters.

    Args:
        plan: the plan with the ranks that a module has on average.
        params: the pretrained parameters.
        fn: the model, ``fn(params, *batch)``.
        batches: tuples of arguments of ``fn``; they are read once here and once by
            ``initialise``, so a generator has to be made again.
        mask: as for ``initialise``.
        rho: how many times its rank a module may get; 1 changes nothing.
        adjust_scaling_factors: let alpha grow with the rank, so that every scale stays.

    Returns:
        A plan whose configuration has every new rank in ``rank_pattern``, and names the modules.

    Raises:
        ConfigError: ``rho`` is below 1, or lists the leaves that cannot have a rank of their own:
            stacked layers, ranges of columns, embeddings and convolutions.

    Source: EVA, arXiv 2410.07170; PEFT 0.21.2 ``EvaConfig(rho=…)``.

    >>> import jax
    >>> from lora_jax import plan as make_plan
    >>> params = {"up": jnp.eye(4), "down": jnp.eye(4)}
    >>> fn = lambda p, x: (x @ p["up"]) ** 3 @ p["down"]
    >>> x = jax.random.normal(jax.random.key(0), (50, 4)) * jnp.array([1.0, 1.0, 1.0, 2.0])
    >>> config = LoraConfig(r=2, init_lora_weights="eva", target_modules=["up", "down"])
    >>> found = eva_ranks(make_plan(fn, params, config, x), params, fn=fn, batches=[(x,)])
    >>> {leaf.path: leaf.r for leaf in found.adapted}, found.adapted[0].scale
    ({'down': 1, 'up': 3}, 4.0)
    """
    problems = [] if rho >= 1 else [f"rho: got {rho!r}, wanted at least 1"]
    raise_all(ConfigError, "ranks cannot be redistributed", problems + _problems(plan))
    seen = activations.moments(fn, params, plan.adapted, batches, mask=mask)
    explained = {path: _explained(x) for path, x in seen.items()}
    first = _first_of_equals(seen)
    most = {leaf.path: round(leaf.r * rho) for leaf in plan.adapted}
    for path in most:
        most[path] = max(most[one] for one in most if first[one] == first[path])
    budget = sum(leaf.r for leaf in plan.adapted)
    ranks = _distributed(explained, first, most, budget)
    return _with_ranks(plan, ranks, adjust_scaling_factors)


def _problems(plan: Plan) -> list[str]:
    kinds: Mapping[str, Callable[[LeafPlan], Any]] = {
        "its layers are stacked and share a rank": lambda x: pick(x.shape, x.axes, STACKED),
        "it is a range of columns": lambda x: x.columns is not None,
        "its rows are looked up": lambda x: x.looked_up,
        "it is a convolution's kernel": lambda x: x.window,
    }
    return [
        f"{leaf.name}: {why}; initialise it with the ranks of the plan, as rho=1 has them"
        for leaf in plan.adapted
        for why, is_one in kinds.items()
        if is_one(leaf)
    ]


def _explained(moments: Moments) -> NDArray[Any]:
    """Return the share of the variance that each direction explains, the largest first."""
    mean = moments.total[0] / moments.count[0]
    squares = jnp.linalg.eigvalsh(moments.gram[0] - moments.count[0] * jnp.outer(mean, mean))
    squares = np.maximum(np.asarray(squares)[::-1], 0)
    return squares / max(squares.sum(), np.finfo(np.float32).tiny)


def _first_of_equals(seen: Mapping[str, Moments]) -> dict[str, str]:
    """Return, for every path, the first one that has the same inputs."""
    grams = {path: np.asarray(x.gram[0]) for path, x in seen.items()}

    def same(one: str, other: str) -> bool:
        a, b = grams[one], grams[other]
        return a.shape == b.shape and bool(np.linalg.norm(a - b) <= _SAME * np.linalg.norm(a))

    return {path: next(one for one in grams if same(one, path)) for path in grams}


def _distributed(
    explained: Mapping[str, NDArray[Any]],
    first: Mapping[str, str],
    most: Mapping[str, int],
    budget: int,
) -> dict[str, int]:
    """Return how many of the ``budget`` largest shares each path has."""
    # Among equal shares the first of a group comes before the others, as in PEFT.
    order = sorted(explained, key=lambda path: first[path] != path)
    shares = [
        (share, path) for path in order for share in explained[first[path]][: most[path]].tolist()
    ]
    chosen = [path for _, path in sorted(shares, key=lambda x: -x[0])[:budget]]
    ranks = {path: chosen.count(path) for path in order}
    for path in order:
        if ranks[first[path]] < ranks[path]:
            ranks[first[path]], ranks[path] = ranks[path], ranks[first[path]]
    return ranks


def _with_ranks(plan: Plan, ranks: Mapping[str, int], adjust: bool) -> Plan:
    """Return the plan, and the configuration that says the same."""
    config = plan.config
    r, alpha = {}, {}
    for leaf in plan.adapted:
        module = paths.module_of(leaf.path)
        was, its_alpha = lora_config.rank_and_alpha(config, module)
        new = ranks[leaf.path]
        if new:
            r[module] = new
            alpha[module] = its_alpha * new / was if adjust and new != was else its_alpha
    resolved = replace(
        config,
        target_modules=tuple(r),
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=_patterns(r, config.r),
        alpha_pattern=_patterns(alpha, config.lora_alpha),
    )
    removed = {paths.module_of(path) for path, rank in ranks.items() if not rank}
    lost = {
        path
        for path in plan.full
        if paths.module_of(path) in removed and _only_beside_lora(config, path)
    }

    def decided(leaf: LeafPlan) -> LeafPlan:
        if leaf.path in lost:
            return replace(leaf, why="not targeted")
        if not leaf.adapted:
            return leaf
        new = ranks[leaf.path]
        if not new:
            return replace(leaf, r=0, scale=0.0, dora=False, why="explains too little (EVA)")
        module = paths.module_of(leaf.path)
        return replace(leaf, r=new, scale=lora_config.scale(config, new, alpha[module]))

    return replace(
        plan,
        config=resolved,
        leaves=tuple(map(decided, plan.leaves)),
        full={path: value for path, value in plan.full.items() if path not in lost},
        normed={path: value for path, value in plan.normed.items() if ranks.get(path)},
    )


def _only_beside_lora(config: LoraConfig, path: str) -> bool:
    """Tell a bias that trains because its module is adapted."""
    return config.bias == "lora_only" and not lora_config.is_saved(config, paths.module_of(path))


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return the patterns that give every module its value, the longest names first.

    A name also hits those that end in it, so these need a pattern of their own, and before it.
    """
    own = [module for module, value in values.items() if value != default]
    hit = [m for m in values if m not in own and any(lora_config.hits(one, m) for one in own)]
    names: Sequence[str] = sorted([*own, *hit], key=len, reverse=True)
    return {name: values[name] for name in names}
