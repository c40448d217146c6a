"""A plan as the file sees it, where a table fuses weights or names PyTorch's attention.

A view has the file's weights in the places of the plan's, at paths that begin with ``torch:``; what
encodes, decodes and renames works on it as on any plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ..core import paths
from ..core.adapter import IN, OUT, STACKED, Adapter, Adapters, Entry, Full, pick
from ..core.config import lora_config
from ..core.config.lora_config import LoraConfig
from ..core.errors import AdapterError, raise_all
from ..rewrite import LeafPlan, Plan
from .keys import PREFIX
from .names.naming import Names, places
from .shapes import fused
from .shapes.attention import FILE, Ranks, Sides, scaled_alpha, whole
from .shapes.fused import Flat, Group

Back = Callable[[Adapters], tuple[dict[str, Entry], list[str]]]


def to_file(plan: Plan, adapters: Adapters, names: Names) -> tuple[Plan, Adapters, Names]:
    """Return plan, adapters and names with the file's weights in the places of the plan's.

    Args:
        plan: without ranges of columns.
        adapters: of this plan.
        names: a table or a function, as in ``save_pretrained``. Returned as they are where
            nothing is fused and no attention is PyTorch's.

    Raises:
        AdapterError: as ``fused.groups`` and ``attention.whole``; or lists every fused weight
            where DoRA has no magnitude for a part.
    """
    view = _View(plan, names)
    values = dict(adapters)
    problems = []
    for group in view.groups:
        own = {leaf.path: values.pop(leaf.path, None) for leaf in group.leaves}
        if group.bias:
            flats = [one.value for one in own.values() if isinstance(one, Full)]
            for name, value in zip(group.names, fused.flat_biases(flats, group), strict=True):
                values[view.full(name, value.shape, group)] = Full(jnp.asarray(value))
            continue
        made = fused.fused_from(group, own)
        if isinstance(made, str):
            problems.append(made)
            continue
        r, alpha = lora_config.rank_and_alpha(plan.config, group.leaves[made[1]].module)
        for name, one in zip(group.names, made[0], strict=True):
            new = one.a.shape[-1]
            ranks = (new, scaled_alpha(plan.config, r, alpha, new))
            path, entry = view.add(group, name, one, ranks)
            values[path] = entry
    raise_all(AdapterError, "these adapters have no place in a fused weight", problems)
    return view.finish(values, complete=True)


def from_file(
    plan: Plan, names: Names, config: LoraConfig, keys: Iterable[str]
) -> tuple[Plan, Names, Back]:
    """Return plan and names with the file's weights in them, and the way back for its adapters.

    Args:
        plan: made from ``load_config``.
        names: as in ``load_pretrained``.
        config: the file's.
        keys: the names of the file's tensors: parts that it leaves out change nothing.

    Raises:
        AdapterError: as ``fused.groups``; or lists every fused weight of the file whose parts
            differ in rank or scale in the plan, or are not all adapted.
    """
    view = _View(plan, names)
    problems: list[str] = []
    made = [(group, _expected(view, group, config, set(keys), problems)) for group in view.groups]
    raise_all(
        AdapterError,
        "the parts of one weight in the file have one rank; plan with load_config(…, names=…)",
        problems,
    )
    seen, _, file_names = view.finish({}, complete=False)

    def back(adapters: Adapters) -> tuple[dict[str, Entry], list[str]]:
        values = {view.origin.get(path, path): one for path, one in adapters.items()}
        wrong = []
        for group, added in made:
            # a path that stays is that of an entry which does not fit, and is listed already
            own = [None if path is None else values.pop(path, path) for path in added]
            if not any(isinstance(one, str) for one in own):
                found, problem = fused.restored(group, own)
                values |= found
                wrong += problem
        return values, wrong

    return seen, file_names, back


def _expected(
    view: _View, group: Group, config: LoraConfig, keys: set[str], problems: list[str]
) -> list[str | None]:
    """Add what the file has for a group; return the paths, None for a part that it leaves out."""
    if group.bias:
        sizes = list(map(len, group.rows)) if group.whole else [group.size]
        return [view.full(n, (s,), group) for n, s in zip(group.names, sizes, strict=True)]
    if group.whole:
        index = [0] * len(fused.stack(group.whole))
        modules = {name: name.format(*index) for name in group.names}
        there = {n for n, one in modules.items() if f"{PREFIX}{one}.lora_A.weight" in keys}
        return [
            view.planned(
                group,
                name,
                lora_config.rank_and_alpha(config, modules[name]),
                len(own),
                group.whole,
            )
            if name in there or not there
            else None
            for name, own in zip(group.names, group.rows, strict=True)
        ]
    first, *others = (
        lora_config.rank_and_alpha(view.plan.config, one.module) for one in group.parts
    )
    if any(pair != first for pair in others) or not all(leaf.adapted for leaf in group.parts):
        own = [f"{leaf.path} r={leaf.r} scale={leaf.scale:g}" for leaf in group.parts]
        problems.append(f"{group.name}: got {', '.join(own)}, wanted one rank and scale")
        return []
    return [view.planned(group, group.name, first, group.size, group.parts[0])]


class _View:
    """A plan in the making whose leaves are the file's weights."""

    def __init__(self, plan: Plan, names: Names):
        self.plan, self.names = plan, names
        self.groups = fused.groups(plan, names)
        self.added: dict[str, list[LeafPlan]] = {}
        self.full_added: dict[str, Any] = {}
        self.ranks: dict[str, Ranks] = {}
        self.origin: dict[str, str] = {}

    def planned(self, group: Group, name: str, ranks: Ranks, out: int, like: LeafPlan) -> str:
        """Add a weight of the file of this rank and alpha; return its path."""
        path = FILE + name + ("" if paths.leaf_name(name) == paths.IN_PROJ else ".weight")
        stack, r = fused.stack(like), ranks[0]
        leaf = LeafPlan(
            path,
            (*stack, out, math.prod(pick(like.shape, like.axes, IN))),
            like.why,
            r,
            lora_config.scale(self.plan.config, *ranks),
            STACKED * len(stack) + OUT + IN,
            1,
            primitives=("dot_general",),
            dora=like.dora,
        )
        self.added.setdefault(group.leaves[0].path, []).append(leaf)
        self.ranks[leaf.module] = ranks
        return path

    def add(self, group: Group, name: str, one: Flat, ranks: Ranks) -> tuple[str, Adapter]:
        """Add a weight of the file with this adapter; return its path and its entry."""
        like = next(leaf for leaf in group.leaves if leaf.adapted)
        path = self.planned(group, name, ranks, one.b.shape[-1], like)
        return path, fused.shaped(one, self.added[group.leaves[0].path][-1])

    def full(self, name: str, shape: tuple[int, ...], group: Group) -> str:
        """Add a bias of the file; return its path."""
        path, like = f"{FILE}{name}.bias", self.plan.full[group.leaves[0].path]
        leaf = replace(group.leaves[0], path=path, shape=shape, axes="")
        self.added.setdefault(group.leaves[0].path, []).append(leaf)
        self.full_added[path] = jax.ShapeDtypeStruct(shape, like.dtype)
        return path

    def finish(self, values: Adapters, *, complete: bool) -> tuple[Plan, Adapters, Names]:
        """Return plan, adapters and names; attentions of PyTorch's are one module in them."""
        gone = {leaf.path for group in self.groups for leaf in group.leaves}
        leaves = [
            one
            for leaf in self.plan.leaves
            for one in (self.added.get(leaf.path, []) if leaf.path in gone else [leaf])
        ]
        full = {p: v for p, v in self.plan.full.items() if p not in gone} | self.full_added
        known = {
            leaf.path: leaf.path.removeprefix(FILE)
            if leaf.path.startswith(FILE)
            else next((place.name for place in places(self.names, leaf.path)), None)
            for leaf in leaves
        }
        sides = Sides(tuple(leaves), values, full, known, self.ranks, {})
        sides = whole(sides, self.plan.config, complete=complete)
        self.origin = dict(sides.origin)
        if not self.groups and not sides.origin:
            return self.plan, values, self.names
        # The names of the file's modules in full come first: no pattern of the model's means them.
        ranks = {re.escape(name): pair for name, pair in sides.ranks.items()}
        config = self.plan.config
        config = replace(
            config,
            rank_pattern={name: r for name, (r, _) in ranks.items()} | dict(config.rank_pattern),
            alpha_pattern={name: a for name, (_, a) in ranks.items()} | dict(config.alpha_pattern),
        )
        made = replace(self.plan, config=config, leaves=sides.leaves, full=sides.full)
        modules = {
            path: paths.module_of(name) if name and path.startswith(FILE) else name
            for path, name in sides.names.items()
        }
        return made, sides.values, modules.get
