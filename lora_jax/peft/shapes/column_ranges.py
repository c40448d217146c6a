"""Ranges of columns as PEFT knows them: one pair of the whole weight, B zero elsewhere."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import replace

from ...core import delta
from ...core.adapter import Adapter, Adapters, rank
from ...rewrite import LeafPlan, Plan


def without_ranges(plan: Plan, adapters: Adapters) -> tuple[Plan, Adapters]:
    """Return a plan without ``output_slices`` and adapters of the same ``ΔW``.

    ``s·[A₁ A₂]·[B₁ 0; 0 B₂]``: k ranges of rank r become one pair of rank k·r, and the
    configuration names its rank, and the alpha that keeps the scale, for its module.

    Args:
        plan: what the adapters belong to, one for each range.
        adapters: of this plan.
    """
    parts = defaultdict(list)
    for leaf in plan.adapted:
        if leaf.columns is not None:
            parts[leaf.path].append(leaf)
    whole, changed = {}, dict(adapters)
    for path, ranges in parts.items():
        own = [one for leaf in ranges if isinstance(one := changed.pop(leaf.name), Adapter)]
        changed[path] = joined = delta.joined(own, ranges[0].shape)
        whole[path] = replace(ranges[0], r=rank(joined), columns=None)
    patterns = {re.escape(leaf.module): leaf for leaf in whole.values()}
    ranks = {pattern: leaf.r for pattern, leaf in patterns.items()}
    alphas = {pattern: _alpha(plan, leaf) for pattern, leaf in patterns.items()}
    leaves = {leaf.path: whole.get(leaf.path, leaf) for leaf in plan.leaves}
    config = replace(
        plan.config,
        output_slices={},
        rank_pattern=ranks | dict(plan.config.rank_pattern),
        alpha_pattern=alphas | dict(plan.config.alpha_pattern),
    )
    return replace(plan, config=config, leaves=tuple(leaves.values())), changed


def _alpha(plan: Plan, leaf: LeafPlan) -> float:
    return leaf.scale * (math.sqrt(leaf.r) if plan.config.use_rslora else leaf.r)
