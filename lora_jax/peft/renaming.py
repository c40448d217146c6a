"""A configuration in the names of the other side: PyTorch's when saving, JAX's when loading.

Patterns mean modules by one side's names, so they are resolved there, for every module, before
anything is renamed; the new configuration names each module in full.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .. import config as configs
from .. import paths
from ..adapter import STACKED, pick
from ..config import LoraConfig
from ..errors import AdapterError, raise_all
from ..naming import Names, jax_name, name_of, torch_names
from ..rewrite import LeafPlan, Plan
from . import strict
from .tensors import MAGNITUDE, PREFIX

RankAndAlpha = tuple[int, int | float]

_HALVES = re.compile(rf"\.(lora_(A|B)\.weight|lora_embedding_(A|B)|{MAGNITUDE})$")


def file_names(plan: Plan, names: Names) -> dict[str, str]:
    """Return the PyTorch module name of every parameter that a file for this plan holds.

    Raises:
        AdapterError: lists every parameter without a name.
    """
    held = {leaf.path for leaf in plan.leaves if leaf.adapted or leaf.path in plan.full}
    return torch_names(names, sorted(held))


def in_torch(plan: Plan, names: Names) -> LoraConfig:
    """Return the plan's configuration in PyTorch's names, which give PEFT the same ranks.

    Where every name is the same in JAX, this is the plan's own configuration.

    Args:
        plan: what is saved.
        names: a table or a function, as in ``save_pretrained``.

    Raises:
        AdapterError: lists every parameter without a name.
    """
    held = file_names(plan, names)
    if not _renames(held):
        return plan.config
    known = {leaf.path: name_of(names, leaf.path) for leaf in plan.leaves}
    everything = {one for leaf in plan.leaves for one in _expanded(leaf, known[leaf.path])}
    wanted, saved = {}, set()
    for leaf in plan.leaves:
        own = paths.module_of(leaf.path)
        if leaf.adapted:
            found = configs.rank_and_alpha(plan.config, own)
            wanted |= dict.fromkeys(_expanded(leaf, held[leaf.path]), found)
        elif leaf.path in plan.full and configs.is_saved(plan.config, own):
            saved |= set(_expanded(leaf, held[leaf.path]))
    return exact(plan.config, wanted, saved, everything)


def in_jax(config: LoraConfig, keys: Iterable[str], names: Names, params: Any) -> LoraConfig:
    """Return a file's configuration in the names of the JAX model's modules.

    Args:
        config: as in the file.
        keys: the names of the file's tensors, which say what modules it adapts.
        names: a table or a function, as in ``load_pretrained``.
        params: the model's parameters; None does where ``names`` is a table.

    Raises:
        AdapterError: lists every module without a name in JAX, every one where targets and
            tensors disagree, and every stack whose layers differ in rank or alpha.
    """
    adapted, saved = _modules(config, keys)
    raise_all(
        AdapterError,
        "the configuration and the tensors disagree",
        strict.target_problems(config, sorted(adapted)),
    )
    if isinstance(names, Mapping) and params is None:
        found = {module: jax_name(names, module) for module in adapted | saved}
        known: set[str] | None = None
    elif params is None:
        raise AdapterError(
            "names is a function, which goes from JAX to PyTorch only: pass params=…, too"
        )
    else:
        found, known = _found(adapted | saved, names, params)
    unmapped = sorted(module for module in adapted | saved if found.get(module) is None)
    raise_all(AdapterError, "these modules of the file have no name in the JAX model", unmapped)
    renamed = {module: name for module, name in found.items() if name is not None}
    if all(module == name for module, name in renamed.items()):
        return config
    by_name: dict[str, dict[RankAndAlpha, str]] = defaultdict(dict)
    for module in sorted(adapted):
        by_name[renamed[module]].setdefault(configs.rank_and_alpha(config, module), module)
    raise_all(
        AdapterError,
        "stacked layers have one rank and one alpha",
        (
            f"{name}: " + ", ".join(f"{m} has r={r}, alpha={a}" for (r, a), m in own.items())
            for name, own in by_name.items()
            if len(own) > 1
        ),
    )
    wanted = {name: next(iter(own)) for name, own in by_name.items()}
    return exact(config, wanted, {renamed[module] for module in saved}, known)


def differing(plan: Plan, config: LoraConfig, names: Names) -> list[str]:
    """Return where plan and file, each by its own names, give other numbers or other modules."""
    held, modules = file_names(plan, names), _in_file(plan, names)
    if not _renames(held):
        return strict.config_problems(config, plan, held.__getitem__)
    problems = (
        strict.misfit(config, leaf, module)
        for leaf in plan.adapted
        for module in modules[leaf.path]
    )
    every = [module for leaf in plan.adapted for module in modules[leaf.path]]
    return [one for one in problems if one] + strict.target_problems(config, every)


def fitting(plan: Plan, config: LoraConfig, names: Names) -> set[str]:
    """Return the adapted parameters to which the file gives the plan's rank and scale."""
    modules = _in_file(plan, names)
    return {
        leaf.path
        for leaf in plan.adapted
        if not any(strict.misfit(config, leaf, module) for module in modules[leaf.path])
    }


def _in_file(plan: Plan, names: Names) -> dict[str, tuple[str, ...]]:
    """Return the modules by whose names the file's configuration means each parameter."""
    held = file_names(plan, names)
    if not _renames(held):
        return {leaf.path: (paths.module_of(leaf.path),) for leaf in plan.adapted}
    return {leaf.path: tuple(_expanded(leaf, held[leaf.path])) for leaf in plan.adapted}


def _renames(held: Mapping[str, str]) -> bool:
    return any(name != paths.module_of(path) for path, name in held.items())


def _expanded(leaf: LeafPlan, name: str | None) -> Iterator[str]:
    """Yield the module of every index of the stacked axes."""
    sizes = pick(leaf.shape, leaf.axes, STACKED) if leaf.axes else ()
    if name is not None and name.count("{}") == len(sizes):
        for index in itertools.product(*map(range, sizes)):
            yield name.format(*index)


def exact(
    config: LoraConfig,
    wanted: Mapping[str, RankAndAlpha],
    saved: Collection[str],
    known: Collection[str] | None,
) -> LoraConfig:
    """Return a configuration that means these modules, and no other.

    Targets are names, or one regular expression where names would mean another of those known,
    or where None are.
    """
    targets: str | tuple[str, ...] = tuple(sorted(wanted))
    if known is None or any(n not in wanted and configs.matches(targets, n) for n in known):
        targets = "|".join(re.escape(name) for name in sorted(wanted))
    # A name hits what it is the end of, too; the first hit wins, so the longest comes first.
    order = sorted(wanted, key=lambda name: (-len(name), name))
    patterns = {re.escape(name): wanted[name] for name in order}

    def differ(index: int, default: Any) -> dict[str, Any]:
        values = {pattern: value[index] for pattern, value in patterns.items()}
        return values if any(value != default for value in values.values()) else {}

    return replace(
        config,
        target_modules=targets,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=differ(0, config.r),
        alpha_pattern=differ(1, config.lora_alpha),
        modules_to_save=tuple(sorted(saved)) or None,
    )


def _modules(config: LoraConfig, keys: Iterable[str]) -> tuple[set[str], set[str]]:
    """Return the modules of these tensors: those adapted, and those saved in full."""
    names = [key.removeprefix(PREFIX) for key in keys]
    adapted = {_HALVES.sub("", name) for name in names if _HALVES.search(name)}
    rest = (name.rpartition(paths.SEPARATOR)[0] for name in names if not _HALVES.search(name))
    return adapted, {module for module in rest if configs.is_saved(config, module)}


def _found(
    modules: Collection[str], names: Names, params: Any
) -> tuple[dict[str, str | None], set[str]]:
    """Return the JAX module of each PyTorch module, and every JAX module there is."""
    own = {paths.module_of(path): name_of(names, path) for path in paths.flatten(params)}
    plain = {name: module for module, name in own.items() if name is not None}
    stacked = [
        (re.compile(r"\d+".join(map(re.escape, name.split("{}")))), module)
        for name, module in plain.items()
        if "{}" in name
    ]
    found: dict[str, str | None] = {}
    for module in modules:
        inside = (jax for regex, jax in stacked if regex.fullmatch(module))
        found[module] = plain.get(module) or next(inside, None)
    return found, set(own)
