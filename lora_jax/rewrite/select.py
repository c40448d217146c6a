"""Which parameters a configuration means: pattern matching with PEFT's semantics, loudly."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from .. import config as configs
from .. import paths
from ..config import ALL_LINEAR, LoraConfig
from ..errors import PlanError, raise_all
from .interpret import Record

Leaves = Mapping[str, Any]

_OTHER_KINDS = {"gather": "an embedding", "conv_general_dilated": "a convolution"}


def targets(config: LoraConfig, leaves: Leaves, record: Record) -> set[str]:
    """Return the weights that the patterns name, biases and norms of their modules apart."""
    if config.target_modules is None:
        raise PlanError(
            "target_modules is not set. Name modules, give one regular expression, or use "
            f"{ALL_LINEAR!r}. This model has: {_some(map(paths.module_of, record.sites))}"
        )
    if config.target_modules == ALL_LINEAR:
        named = {
            path
            for path in record.sites
            if path not in record.rejected
            and not configs.is_output_head(paths.module_of(path))
            and not _other_kind(path, record)
        }
    else:
        named = {path for path in leaves if _named(config.target_modules, path)}
        named -= _companions(config.target_modules, named, record)
    excluded = {path for path in named if _named(config.exclude_modules, path)}
    saved = {path for path in named if configs.is_saved(config, paths.module_of(path))}
    return {path for path in named - excluded - saved if could_adapt(leaves[path])}


def reject_pairs(targets: set[str], record: Record) -> None:
    """Record as rejected the targets that cannot both be adapted."""
    for n, (one, other, why) in enumerate(record.together):
        if one & targets and other & targets:
            for path in (one | other) & targets:
                record.rejected.setdefault(path, {})[(-1, n)] = why


def saved(config: LoraConfig, leaves: Leaves, targets: set[str]) -> set[str]:
    """Return the parameters that ``modules_to_save`` and ``bias`` train in full."""
    modules = {paths.module_of(path) for path in targets}

    def whole(path: str) -> bool:
        module = paths.module_of(path)
        if configs.is_saved(config, module):
            return jnp.issubdtype(leaves[path].dtype, jnp.inexact)
        if paths.leaf_name(path) not in paths.BIAS_NAMES:
            return False
        return config.bias == "all" or (config.bias == "lora_only" and module in modules)

    return {path for path in leaves if whole(path)}


def check(config: LoraConfig, targets: set[str], leaves: Leaves, record: Record) -> None:
    """Raise when a pattern has no effect or a target cannot be adapted.

    Raises:
        PlanError: lists every such pattern with close names, or every such target.
    """
    modules = {paths.module_of(path): None for path in leaves}
    raise_all(
        PlanError,
        "these patterns match no module",
        (
            f"{name}: got {pattern!r}, wanted a module such as {_close(pattern, modules)}"
            for name, pattern in _unmatched(config, targets, leaves)
        ),
    )
    problems = []
    for path in sorted(targets):
        if configs.materializes(config, paths.module_of(path)):
            continue
        problems += [f"{path}: {why}" for why in record.rejected.get(path, {}).values()]
        if path not in record.rejected and path not in record.sites:
            problems.append(f"{path}: the function never uses it")
    raise_all(
        PlanError,
        "these targets are used in a way that has no rule (leave them out with exclude_modules, or "
        'form their W + AB with on_unsupported="materialize")',
        problems,
    )


def reason(config: LoraConfig, path: str, leaf: Any, record: Record) -> str:
    """Return why a parameter stays frozen."""
    if _named(config.exclude_modules, path):
        return "excluded"
    if not could_adapt(leaf):
        return "not a matrix"
    if path in record.rejected:
        return "no rule: " + next(iter(record.rejected[path].values()))
    if path not in record.sites:
        return "never used"
    if config.target_modules != ALL_LINEAR:
        return "not targeted"
    head = configs.is_output_head(paths.module_of(path))
    return "output head" if head else _other_kind(path, record) or "not targeted"


def _other_kind(path: str, record: Record) -> str:
    """Return what a weight is if PEFT's ``all-linear`` does not mean it."""
    used_by = {site.primitive for site in record.sites.get(path, {}).values()}
    return next((kind for name, kind in _OTHER_KINDS.items() if name in used_by), "")


def could_adapt(leaf: Any) -> bool:
    """Tell whether a parameter has the axes and the dtype of a matmul weight."""
    return leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _companions(names: Any, named: set[str], record: Record) -> set[str]:
    """Return what a module holds beside its matmul weight, unless it is named by its own path."""
    modules = {paths.module_of(path) for path in named & record.sites.keys()}
    return {
        path
        for path in named - record.sites.keys()
        if paths.module_of(path) in modules and not configs.matches(names, path.replace("/", "."))
    }


def _named(names: Any, path: str) -> bool:
    module = paths.module_of(path)
    return configs.matches(names, module) or configs.matches(names, path.replace("/", "."))


def _unmatched(config: LoraConfig, targets: set[str], leaves: Leaves) -> Iterator[tuple[str, str]]:
    """Yield every field and pattern that has no effect."""
    names = config.target_modules
    for name in () if names == ALL_LINEAR or names is None else _each(names):
        kept = (path for path in leaves if configs.is_saved(config, paths.module_of(path)))
        if not any(_named(_alike(names, name), path) for path in (*targets, *kept)):
            yield "target_modules", name
    for name in _each(config.exclude_modules):
        if not any(_named(_alike(config.exclude_modules, name), path) for path in leaves):
            yield "exclude_modules", name
    saved = config.modules_to_save or ()
    # PEFT lists every head name it knows, so one that fits is enough.
    if saved and not any(configs.is_saved(config, paths.module_of(path)) for path in leaves):
        yield "modules_to_save", ", ".join(saved)
    for field_name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field_name):
            modules = (paths.module_of(path) for path in targets)
            if not any(configs.hits(pattern, module) for module in modules):
                yield field_name, pattern


def _each(names: Any) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _alike(names: Any, name: str) -> Any:
    """Return one pattern in the form it was given: a regex alone, a name in a list."""
    return name if isinstance(names, str) else (name,)


def _close(pattern: str, modules: Mapping[str, None]) -> str:
    tails = {module.rpartition(".")[2]: module for module in modules}
    close = [tails[name] for name in difflib.get_close_matches(pattern, tails, n=3, cutoff=0.4)]
    return _some(close or modules)


def _some(names: Any, most: int = 6) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" … ({len(names)} in all)" if len(names) > most else "")
