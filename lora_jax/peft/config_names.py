"""A configuration in the names of the other side: PyTorch's when saving, JAX's when loading.

Patterns mean modules by one side's names, so they are resolved there, for every module, before
anything is renamed; the new configuration names each module in full.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..core import paths
from ..core.adapter import STACKED, pick
from ..core.config import lora_config
from ..core.config.lora_config import LoraConfig
from ..core.errors import AdapterError, raise_all
from ..rewrite import LeafPlan, Plan
from . import checks
from .keys import BIAS, HALVED, MAGNITUDE, PREFIX, is_held
from .names.naming import Names, Place, name_of, origins, places, torch_names
from .shapes import experts, fused
from .shapes.attention import scaled_alpha

RankAndAlpha = tuple[int, int | float]

_HALVES = re.compile(rf"\.(lora_(A|B)\.weight|lora_embedding_(A|B)|{MAGNITUDE}|{BIAS})$")


def file_names(plan: Plan, names: Names) -> dict[str, str]:
    """Return the PyTorch module name of every parameter that a file for this plan holds.

    Raises:
        AdapterError: lists every parameter without a name.
    """
    held = {leaf.path for leaf in plan.leaves if is_held(plan, leaf)}
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
    if not _renames(plan, held):
        return plan.config
    known = {leaf.path: name_of(names, leaf.path) for leaf in plan.leaves}
    everything = {one for leaf in plan.leaves for one in _expanded(leaf, known[leaf.path])}
    wanted, saved = {}, set()
    bare = experts.in_given_order(plan.config, [leaf.path for leaf in plan.adapted])
    for leaf in plan.leaves:
        if leaf.adapted and leaf.path not in bare:
            found = lora_config.rank_and_alpha(plan.config, leaf.module)
            wanted |= dict.fromkeys(_expanded(leaf, leaf.owner or held[leaf.path]), found)
        elif leaf.path in plan.full and lora_config.is_saved(plan.config, leaf.module):
            saved |= set(_expanded(leaf, held[leaf.path]))
    rows = {held[leaf.path]: leaf.rows for leaf in plan.leaves if leaf.rows}
    parameters: dict[str, RankAndAlpha] = {}
    leaves = {leaf.path: leaf for leaf in plan.adapted}
    for path in bare:
        found = lora_config.rank_and_alpha(
            plan.config, lora_config.name_in_patterns(plan.config, path)
        )
        parameters |= dict.fromkeys(experts.names_in_torch(leaves[path], held[path]), found)
    parameters = {name: parameters[name] for name in experts.ordered(parameters)}
    return exact(plan.config, wanted, saved, everything, rows, parameters)


def in_jax(
    config: LoraConfig, tensors: Mapping[str, np.ndarray], names: Names, params: Any
) -> LoraConfig:
    """Return a file's configuration in the names of the JAX model's modules.

    Args:
        config: as in the file.
        tensors: the file, which says what modules it adapts, and which of them share A.
        names: a table or a function, as in ``load_pretrained``.
        params: the model's parameters; None does where ``names`` is a table.

    Raises:
        AdapterError: lists every module without a name in JAX, every one where targets and
            tensors disagree, and every stack whose layers differ in rank or alpha.
    """
    every, saved = _modules(config, tensors)
    adapted, parameters, problems = _told_apart(config, every)
    rows = checks.rows_of(config, tensors)
    meant = [*sorted({module.meant for module in adapted}), *parameters]
    checks.refuse_hanging(config, meant)
    unmet = checks.idle(config, meant)
    problems += checks.target_problems(config, meant) + checks.row_problems(config, rows)
    raise_all(AdapterError, "the configuration and the tensors disagree", problems)
    if unmet:
        warnings.warn(f"in the adapter's configuration: {', '.join(unmet)}", stacklevel=3)
    wanted = {module.name for module in adapted} | saved | rows.keys()
    if isinstance(names, Mapping) and params is None:
        found, known = {name: origins(names, name) for name in (*wanted, *parameters)}, None
    elif params is None:
        raise AdapterError(
            "names is a function, which goes from JAX to PyTorch only: pass params=…, too"
        )
    else:
        found, known = _found(wanted, names, params)
        paths_of = experts.in_jax(parameters, names, params)
        found |= {one: (Place(path),) if path else () for one, path in paths_of.items()}
    unmapped = sorted(name for name, own in found.items() if not own)
    raise_all(AdapterError, "these modules of the file have no name in the JAX model", unmapped)
    checks.refuse_hanging(config, sorted(known or ()))
    same = all(origin.name == name for name, own in found.items() for origin in own)
    if same and all(module.meant == module.name for module in adapted):
        return config
    parts: dict[str, dict[int, list[_Module]]] = defaultdict(lambda: defaultdict(list))
    for module in [*sorted(adapted), *(_Module(one, one, one) for one in parameters)]:
        for origin in found[module.name]:
            parts[origin.name][origin.part * origin.jax_is_fused].append(module)
    ranks = {name: _ranks(config, own, tensors) for name, own in parts.items()}
    raise_all(
        AdapterError,
        "stacked layers have one rank and one alpha",
        (f"{name}: {pair}" for name, pair in ranks.items() if isinstance(pair, str)),
    )
    plain = {name: pair for name, pair in ranks.items() if not isinstance(pair, str)}
    bare = dict.fromkeys(one.name for parameter in parameters for one in found[parameter])
    return exact(
        config,
        {name: pair for name, pair in plain.items() if name not in bare},
        {one.name for name in saved for one in found[name]},
        known,
        {one.name: own for module, own in rows.items() for one in found[module]},
        {name: plain[name] for name in bare},
    )


def targeting(config: LoraConfig, keys: Iterable[str]) -> LoraConfig:
    """Return a configuration without targets with those of a file's tensors: these, no other."""
    adapted, _ = _modules(config, keys)
    if not (meant := sorted({module.meant for module in adapted})):
        return config
    return replace(
        config,
        target_modules="|".join(map(re.escape, meant)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _told_apart(
    config: LoraConfig, every: set[_Module]
) -> tuple[set[_Module], list[str], list[str]]:
    """Return the modules, the bare parameters that wrappers hold, and problems."""
    if not config.target_parameters:
        return every, [], []
    plain = sorted(one.key for one in every if one.key == one.name)
    keys = {key.replace(experts.WRAPPED, ""): key for key in plain}
    modules, parameters, problems = experts.told_apart(config, plain)
    attention = {one for one in every if one.key != one.name}
    return attention | {_Module(keys[one], one, one) for one in modules}, parameters, problems


def _ranks(
    config: LoraConfig, parts: Mapping[int, list[_Module]], tensors: Mapping[str, np.ndarray]
) -> RankAndAlpha | str:
    """Return what a JAX module has whose parts are these modules, each of every stacked layer."""
    found = []
    for modules in parts.values():
        own: dict[RankAndAlpha, str] = {}
        for module in modules:
            own.setdefault(lora_config.rank_and_alpha(config, module.meant), module.key)
        if len(own) > 1:
            return ", ".join(f"{key} has r={r}, alpha={a}" for (r, a), key in own.items())
        found.append(next(iter(own)))
    r, alpha = next((pair for pair in found if pair[1]), found[0])
    layers = list(zip(*parts.values(), strict=False))
    if len(parts) == 1 or all(_share_a(layer, tensors) for layer in layers):
        return r, alpha
    new = sum(r for r, _ in found)
    return new, scaled_alpha(config, r, alpha, new)


def _share_a(modules: Iterable[_Module], tensors: Mapping[str, np.ndarray]) -> bool:
    every = [tensors.get(f"{PREFIX}{module.key}.lora_A.weight") for module in modules]
    return fused.share_a(every)


def refuse_hanging(config: LoraConfig, keys: Iterable[str]) -> None:
    """Raise where an expression of the file would not come to an end on its own modules."""
    adapted, _ = _modules(config, keys)
    checks.refuse_hanging(config, sorted({module.meant for module in adapted}))


def differing(plan: Plan, config: LoraConfig, names: Names) -> list[str]:
    """Return where plan and file, each by its own names, give other numbers or other modules."""
    held, modules = file_names(plan, names), _in_file(plan, names)
    rows = {held[leaf.path]: leaf.rows for leaf in plan.leaves if leaf.rows}
    of_rows = checks.row_problems(config, rows)
    meant = [n for path, own in modules.items() for n in (paths.module_of(path), *own)]
    checks.refuse_hanging(config, meant)
    if not _renames(plan, held):
        return checks.config_problems(config, plan, held.__getitem__) + of_rows
    problems = (
        checks.misfit(config, leaf, module)
        for leaf in plan.adapted
        for module in modules[leaf.path]
    )
    every = [module for leaf in plan.adapted for module in modules[leaf.path]]
    return [one for one in problems if one] + checks.target_problems(config, every) + of_rows


def fitting(plan: Plan, config: LoraConfig, names: Names) -> set[str]:
    """Return the parameters to which the file gives the plan's rank and scale, or its rows."""
    held = file_names(plan, names)
    rows = {
        leaf.path
        for leaf in plan.leaves
        if leaf.rows and checks.tokens(config, held[leaf.path]) == leaf.rows
    }
    modules = _in_file(plan, names)
    return rows | {
        leaf.path
        for leaf in plan.adapted
        if not any(checks.misfit(config, leaf, module) for module in modules[leaf.path])
    }


def _in_file(plan: Plan, names: Names) -> dict[str, tuple[str, ...]]:
    """Return the modules by whose names the file's configuration means each parameter."""
    held = file_names(plan, names)
    if not _renames(plan, held):
        return {
            leaf.path: (leaf.owner or lora_config.name_in_patterns(plan.config, leaf.path),)
            for leaf in plan.adapted
        }
    bare = experts.in_given_order(plan.config, [leaf.path for leaf in plan.adapted])
    return {
        leaf.path: tuple(
            experts.names_in_torch(leaf, held[leaf.path])
            if leaf.path in bare
            else _expanded(leaf, leaf.owner or held[leaf.path])
        )
        for leaf in plan.adapted
    }


def _renames(plan: Plan, held: Mapping[str, str]) -> bool:
    bare = experts.in_given_order(plan.config, held)
    return any(name != paths.module_of(path) for path, name in held.items()) or any(
        experts.in_torch(path, held[path]) != lora_config.name_in_patterns(plan.config, path)
        for path in bare
    )


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
    rows: Mapping[str, tuple[int, ...]] | None = None,
    parameters: Mapping[str, RankAndAlpha] | None = None,
) -> LoraConfig:
    """Return a configuration that means these modules, rows and bare parameters, and no other.

    Targets are names, or one regular expression where names would mean another of those known,
    or where None are.
    """
    targets: str | tuple[str, ...] = tuple(sorted(wanted))
    others = None if known is None else set(known) - wanted.keys()
    if wanted and (others is None or any(lora_config.matches(targets, n) for n in others)):
        targets = "|".join(re.escape(name) for name in sorted(wanted))
    # A name hits what it is the end of, too; the first hit wins, so the longest comes first.
    parameters = dict(parameters or {})
    ranked = {**wanted, **parameters}
    order = sorted(ranked, key=lambda name: (-len(name), name))
    patterns = {re.escape(name): ranked[name] for name in order}

    def differ(index: int, default: Any) -> dict[str, Any]:
        values = {pattern: value[index] for pattern, value in patterns.items()}
        return values if any(value != default for value in values.values()) else {}

    return replace(
        config,
        target_modules=targets,
        target_parameters=tuple(parameters) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=differ(0, config.r),
        alpha_pattern=differ(1, config.lora_alpha),
        modules_to_save=tuple(sorted(saved)) or None,
        trainable_token_indices=rows or None,
    )


class _Module(NamedTuple):
    """An adapted module of the file.

    Args:
        key: its name in the tensors' names.
        name: its name in PyTorch.
        meant: the name by which the configuration means it.
    """

    key: str
    name: str
    meant: str


def _modules(config: LoraConfig, keys: Iterable[str]) -> tuple[set[_Module], set[str]]:
    """Return the modules of these tensors: those adapted, and those saved in full."""
    names = [key.removeprefix(PREFIX) for key in keys]
    own = {_HALVES.sub("", name) for name in names if _HALVES.search(name)}
    owners = {key.removesuffix(HALVED) for key in own if key.endswith(HALVED)}
    adapted = set()
    for key in own:
        if key in owners:
            adapted.add(_Module(key, f"{key}.{paths.IN_PROJ}", key))
        elif key.endswith(HALVED):
            owner = key.removesuffix(HALVED)
            adapted.add(_Module(key, f"{owner}.{paths.OUT_PROJ}", owner))
        else:
            adapted.add(_Module(key, key, key))
    rest = (name.rpartition(paths.SEPARATOR)[0] for name in names if not _HALVES.search(name))
    return adapted, {module for module in rest if lora_config.is_saved(config, module)}


def _found(
    modules: Collection[str], names: Names, params: Any
) -> tuple[dict[str, tuple[Place, ...]], set[str]]:
    """Return the JAX modules of each PyTorch module, and every JAX module there is."""
    plain: dict[str, dict[str, Place]] = defaultdict(dict)
    own = {paths.module_of(path): path for path in paths.flatten(params)}
    for module, path in own.items():
        for place in places(names, path):
            plain[place.name].setdefault(module, replace(place, name=module))
    stacked = [
        (re.compile(r"\d+".join(map(re.escape, name.split("{}")))), name)
        for name in plain
        if "{}" in name
    ]
    found = {}
    for module in modules:
        inside = (name for regex, name in stacked if regex.fullmatch(module))
        name = module if module in plain else next(inside, None)
        found[module] = tuple(plain[name].values()) if name else ()
    return found, set(own)
