"""What ``load_pretrained`` checks beside the tensors' shapes, pure functions."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import config as configs
from .. import paths
from ..adapter import STACKED, pick
from ..config import LoraConfig
from ..rewrite import LeafPlan, Plan
from . import config_json

# safetensors' own limit.
_LONGEST_HEADER = 100_000_000

# What decides the numbers beside the tensors.
_DECISIVE = ("r", "lora_alpha", "use_rslora", "use_dora")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class LoadReport:
    """What ``load_pretrained(…, strict=False)`` did not load, and why.

    Args:
        left_out: paths that the plan has and the result has not.
        problems: everything that a strict load refuses the file for; empty for a whole file.
    """

    left_out: tuple[str, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        lines = [*self.problems, f"left out: {', '.join(self.left_out) or 'nothing'}"]
        return "\n  ".join(["this adapter file was loaded in part:", *lines])


def header_problem(path: Path) -> str | None:
    """Return what is wrong with a safetensors header that its own reader lets pass.

    The reader takes the last of two tensors of one name. A length beyond the file's is refused
    before anything is allocated.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            return f"the header claims {length} bytes of a file of {size}"
        content = stream.read(length)
    try:
        _, twice = config_json.parse(content)
    except ValueError as error:
        return f"the header is not JSON: {error}"
    return f"the header says these names twice: {', '.join(twice)}" if twice else None


def config_problems(config: LoraConfig, plan: Plan, names: Callable[[str], str]) -> list[str]:
    """Return where the file's configuration and the plan's would give other numbers or modules."""
    found = [
        f"{name}: the file has {getattr(config, name)!r}, the plan {getattr(plan.config, name)!r}"
        for name in _DECISIVE
        if getattr(config, name) != getattr(plan.config, name)
    ]
    # The order counts: the first hit wins.
    found += [
        f"{name}: the file has {json.dumps(one)}, the plan {json.dumps(other)}"
        for name in _PATTERNS
        if (one := dict(getattr(config, name))) != (other := dict(getattr(plan.config, name)))
        or list(one) != list(other)
    ]
    if all(getattr(config, name) == getattr(plan.config, name) for name in _TARGETS):
        return found
    return found + target_problems(config, [_names_of(leaf, names) for leaf in plan.adapted])


def misfit(config: LoraConfig, leaf: LeafPlan, module: str) -> str | None:
    """Return where the file's configuration gives a module another rank or scale than the plan."""
    r, alpha = configs.rank_and_alpha(config, module)
    scale = configs.scale(config, r, alpha)
    same_scale = math.isclose(scale, leaf.scale, rel_tol=1e-6)
    if (r, config.use_dora) == (leaf.r, leaf.dora) and same_scale:
        return None
    if config.use_dora != leaf.dora:
        return f"{module}: the file has use_dora={config.use_dora}, the plan {leaf.dora}"
    return (
        f"{module}: the file has r={r} and scale {scale:g}, the plan r={leaf.r} and "
        f"{leaf.scale:g} for {leaf.path}"
    )


def target_problems(config: LoraConfig, modules: Iterable[str | Sequence[str]]) -> list[str]:
    """Return where ``target_modules`` and the modules that have adapters disagree.

    Args:
        config: the configuration.
        modules: the name of every module, or its names, any of which may be meant.
    """
    targets = config.target_modules
    if targets is None or targets == configs.ALL_LINEAR:
        return []
    named = [(one,) if isinstance(one, str) else tuple(one) for one in modules]
    found = [
        f"{own[0]}: has an adapter, but target_modules={targets!r} leaves it out"
        for own in named
        if not any(_is_target(config, name) for name in own)
    ]
    if not isinstance(targets, str):
        found += [
            f"target_modules: {name!r} has no adapter"
            for name in targets
            if not any(configs.matches([name], one) for own in named for one in own)
        ]
    return found


def _names_of(leaf: LeafPlan, names: Callable[[str], str]) -> list[str]:
    """Return a weight's names in JAX and in the file, where each of stacked layers has its own."""
    name, stacked = names(leaf.path), pick(leaf.shape, leaf.axes, STACKED)
    indices = itertools.product(*map(range, stacked))
    return [paths.module_of(leaf.path), *(name.format(*index) for index in indices)]


def _is_target(config: LoraConfig, module: str) -> bool:
    return (
        configs.matches(config.target_modules, module)
        and configs.in_chosen_layer(config, module)
        and not configs.matches(config.exclude_modules, module)
    )
