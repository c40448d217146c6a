"""Adapters of a changed base, as plain LoRA of the original one."""

from __future__ import annotations

import math
from dataclasses import replace

import jax.numpy as jnp

from ...core import paths
from ...core.adapter import STACKED, Adapter, Adapters, Entry, Full, Rows
from ...core.buffers import apart
from ...core.config.lora_config import rank_and_alpha, scale
from ...core.errors import AdapterError, raise_all
from ...rewrite import LeafPlan, Plan


def relative_to(
    plan: Plan, original: Adapters, adapters: Adapters
) -> tuple[Plan, dict[str, Entry]]:
    """Return ``s·(A·B − A₀·B₀)`` of rank 2r, for the base that the model had at first.

    ``A' = [A A₀]``, ``B' = [B; −B₀]``, with the same scale: ``initialise`` had taken ``s·A₀·B₀``
    out of the base, so on the original base these give the same model, up to the rounding of
    the changed base. Save them with the plan that is returned: PEFT loads them as plain LoRA.

    Args:
        plan: the plan that ``original`` was made from.
        original: the adapters as ``initialise`` returned them.
        adapters: the adapters now.

    Returns:
        The plan for rank 2r, with an alpha that keeps every scale, and the adapters.

    Raises:
        AdapterError: lists the paths where the two differ in more than their values; with
            ``loftq`` there is no such adapter.

    Source: PEFT 0.21.2 ``path_initial_model_for_weight_conversion``.

    >>> import jax
    >>> from lora_jax import LoraConfig, plan as make_plan
    >>> from lora_jax.adapters.inits import initialise
    >>> from lora_jax.core import delta
    >>> params, x = {"w": jnp.eye(4, 3)}, jnp.ones((2, 4))
    >>> config = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["w"])
    >>> found = make_plan(lambda p, x: x @ p["w"], params, config, x)
    >>> changed, start = initialise(found, params, jax.random.key(0))
    >>> plain, same = relative_to(found, start, start)
    >>> same["w"].a.shape, bool(abs(delta.delta(same["w"])).max() < 1e-6), plain.config.r
    ((4, 4), True, 4)
    """
    if plan.config.init_lora_weights == "loftq":
        raise AdapterError(
            "loftq: the quantised base is not the original one less s·A·B, so there is no such "
            "adapter of rank 2r. Save the base that initialise returned, and beside it "
            "save_pretrained(directory, for_changed_base(plan), adapters); or serve "
            "merge(base, adapters)"
        )
    wanted = {leaf.name for leaf in plan.adapted} | set(plan.full) | set(plan.rows)
    problems = [
        f"{name}: planned, but not in both trees"
        for name in sorted(wanted | original.keys() | adapters.keys())
        if not (name in wanted and name in original and name in adapters)
    ]
    raise_all(AdapterError, "these adapters are not those of the plan", problems)
    raise_all(AdapterError, "these adapters differ from the original", _differ(original, adapters))
    doubled = _doubled(plan)
    joined = {name: _joined(original[name], entry) for name, entry in adapters.items()}
    # As the plan has them: with use_rslora they may differ in the last bit.
    scales = {leaf.name: leaf.scale for leaf in doubled.adapted}
    plain = {
        name: replace(entry, scale=scales[name]) if isinstance(entry, Adapter) else entry
        for name, entry in joined.items()
    }
    return doubled, apart(plain, original, adapters)


def for_changed_base(plan: Plan) -> Plan:
    """Return the plan with which adapters are saved as plain LoRA of the base they came with.

    The file is right with the base that ``initialise`` returned, and wrong with the original
    one: save that base, too. With ``loftq`` this is the only way; for others ``relative_to``
    gives a file for the original base.

    Args:
        plan: the plan that the adapters were made from.

    Source: LoftQ, arXiv 2310.08659, whose quantised base is published beside its adapter.

    >>> import jax
    >>> from lora_jax import LoraConfig, plan as make_plan
    >>> config = LoraConfig(r=2, init_lora_weights="loftq", target_modules=["w"])
    >>> found = make_plan(lambda p, x: x @ p["w"], {"w": jnp.eye(4)}, config, jnp.ones((2, 4)))
    >>> for_changed_base(found).config.init_lora_weights
    True
    """
    config = replace(plan.config, init_lora_weights=True)
    return replace(plan, config=config, of_changed_base=True)


def _joined(first: Entry, now: Entry) -> Entry:
    if not isinstance(now, Adapter) or not isinstance(first, Adapter):
        return now
    a = jnp.concatenate([now.a, first.a.astype(now.a.dtype)], axis=-1)
    stacked = now.axes.count(STACKED)
    b = jnp.concatenate([now.b, -first.b.astype(now.b.dtype)], axis=stacked)
    return replace(now, a=a, b=b)


def _differ(original: Adapters, adapters: Adapters) -> list[str]:
    def shape(entry: Entry) -> tuple[object, ...]:
        if isinstance(entry, Full):
            return ("trained in full", tuple(entry.value.shape))
        if isinstance(entry, Rows):
            return ("rows", tuple(entry.values.shape), entry.indices, entry.axes, entry.axis)
        return (tuple(entry.a.shape), tuple(entry.b.shape), entry.axes, entry.scale)

    pairs = ((name, shape(adapters[name]), shape(original[name])) for name in original)
    return [f"{name}: got {now}, wanted {first}" for name, now, first in pairs if now != first]


def _doubled(plan: Plan) -> Plan:
    """Return the plan with every rank doubled and every scale as it is."""
    config = plan.config
    factor = math.sqrt(2) if config.use_rslora else 2
    new = replace(
        config,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )

    def doubled(leaf: LeafPlan) -> LeafPlan:
        if not leaf.adapted:
            return leaf
        r, alpha = rank_and_alpha(new, paths.module_of(leaf.path))
        return replace(leaf, r=r, scale=scale(new, r, alpha))

    return replace(plan, config=new, leaves=tuple(map(doubled, plan.leaves)))
