"""Which parameters a configuration means: pattern matching with PEFT's semantics, loudly."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from ...core import paths
from ...core.adapter import IN, OUT, STACKED
from ...core.config import lora_config
from ...core.config.lora_config import ALL_LINEAR, LoraConfig
from ...core.errors import PlanError, raise_all
from ..interpret import Record
from ..sites import bias_problem
from . import hints
from .token_rows import tied_head

Leaves = Mapping[str, Any]

_OTHER_KINDS = {"gather": "an embedding", "conv_general_dilated": "a convolution"}


def refuse_hanging(config: LoraConfig, leaves: Leaves) -> None:
    """Raise for a regular expression that would never come to an end on these names.

    Raises:
        PlanError: names the pattern.
    """
    names = [name for path in leaves for name in (paths.module_of(path), path.replace("/", "."))]
    raise_all(PlanError, "these patterns cannot be resolved", lora_config.hanging(config, names))


def targets(config: LoraConfig, leaves: Leaves, record: Record) -> set[str]:
    """Return the weights that the patterns name, biases and norms of their modules apart."""
    return bare(config, leaves) | _of_modules(config, leaves, record)


def bare(config: LoraConfig, leaves: Leaves) -> set[str]:
    """Return the parameters that ``target_parameters`` names."""
    return {path for path in leaves if lora_config.parameter_name(config, path) is not None}


def _of_modules(config: LoraConfig, leaves: Leaves, record: Record) -> set[str]:
    """Return the weights of the modules that ``target_modules`` names."""
    if config.target_modules is None and config.target_parameters:
        return set()
    if config.target_modules is None:
        raise PlanError(
            "target_modules is not set. Name modules, give one regular expression, or use "
            f"{ALL_LINEAR!r}. This model has: {_some(map(paths.module_of, record.sites))}"
        )
    attention = paths.attentions(leaves)
    if config.target_modules == ALL_LINEAR:
        formed = {path for path in record.left_out if _may_be_formed(config, path)}
        named = {
            path
            for path in (record.sites.keys() - record.rejected.keys()) | formed
            if not is_no_linear(path, record) and path not in attention
        }
    else:
        named = {path for path in leaves if _is_target(config, path)}
        named -= _companions(config.target_modules, named, record)
        named = _matrices(config, named, record)
    excluded = {path for path in named if _named(config.exclude_modules, path)}
    saved = {path for path in named if lora_config.is_saved(config, paths.module_of(path))}
    chosen = {path for path in named - excluded - saved if could_adapt(leaves[path])}
    # PEFT adapts an nn.MultiheadAttention as a whole, by its name alone.
    whole = {attention[path] for path in chosen if paths.leaf_name(path) == paths.IN_PROJ}
    return chosen | {path for path, owner in attention.items() if owner in whole}


def is_no_linear(path: str, record: Record) -> str:
    """Return what a weight is if PEFT's ``all-linear`` does not mean it, by its use or name."""
    head = lora_config.is_output_head(paths.module_of(path))
    return "output head" if head else _other_kind(path, record)


def left_out(config: LoraConfig, leaves: Leaves, record: Record) -> dict[str, str]:
    """Return the weights that ``all-linear`` means and that stay as they are, and why."""
    if config.target_modules != ALL_LINEAR:
        return {}
    attention = paths.attentions(leaves)
    return {
        path: why
        for path, why in record.left_out.items()
        if not is_no_linear(path, record)
        and path not in attention
        and not _named(config.exclude_modules, path)
        and not lora_config.is_saved(config, paths.module_of(path))
        and not (_may_be_formed(config, path) and could_adapt(leaves[path]))
        and lora_config.parameter_name(config, path) is None
    }


def _may_be_formed(config: LoraConfig, path: str) -> bool:
    """Tell whether ``W + s·A·B`` may be formed of a weight; none that is holds a bias."""
    return lora_config.materializes(config, paths.module_of(path)) and not config.lora_bias


def owners(targets: set[str]) -> dict[str, str]:
    """Return the module by whose name the patterns mean a target, where it is not its own.

    >>> owners({"attn.in_proj_weight", "attn.out_proj.weight", "mlp.weight"})
    {'attn.out_proj.weight': 'attn'}
    """
    found = paths.attentions(targets)
    return {path: own for path, own in found.items() if own != paths.module_of(path)}


def reject_shared(config: LoraConfig, leaves: Leaves, record: Record) -> None:
    """Record as rejected the bare parameters whose experts would share one A and B."""
    for path in bare(config, leaves):
        for site in record.sites.get(path, {}).values():
            letters = stacked_letters(site.letters)
            kept = letters == site.letters
            apart = site.primitive == "dot_general" and letters[-2:] == site.letters[-2:]
            if not kept and not apart:
                record.rejected.setdefault(path, {})[(-2,)] = (
                    f"{site.primitive} uses it with axes {site.letters!r}, where PEFT has a pair "
                    "for each index of all but the last two"
                )


def stacked_letters(letters: str) -> str:
    """Return a bare parameter's letters with all but the last two axes stacked.

    Those of one in, one out and stacked axes stay as they are.

    >>> stacked_letters("sio"), stacked_letters("iio"), stacked_letters("oi")
    ('sio', 'sio', 'oi')
    """
    if sorted(letters.replace(STACKED, "")) == [IN, OUT]:
        return letters
    last = letters[-2:] if letters[-2:] in (IN + OUT, OUT + IN) else IN + OUT
    return STACKED * (len(letters) - 2) + last


def reject_pairs(targets: set[str], record: Record) -> None:
    """Record as rejected the targets that cannot both be adapted."""
    for n, (one, other, why) in enumerate(record.together):
        if one & targets and other & targets:
            for path in (one | other) & targets:
                record.rejected.setdefault(path, {})[(-1, n)] = why


def reject_biases(targets: set[str], record: Record) -> None:
    """Record as rejected the targets' uses that ``lora_bias`` has no rule for."""
    for path in targets:
        sites = record.sites.get(path, {})
        # Which way round the adapter has it is the first use's, but for an author's derivative.
        letters = next((site.letters for site in sites.values()), "")
        for place, site in sites.items():
            if site.dense_gradient:
                why = "the author's derivative knows nothing of lora_bias"
            else:
                why = bias_problem(site.primitive, site.letters != letters, site.whole)
            if why:
                record.rejected.setdefault(path, {})[place] = f"{site.primitive}: {why}"


def saved(config: LoraConfig, leaves: Leaves, targets: set[str]) -> set[str]:
    """Return the parameters that ``modules_to_save`` and ``bias`` train in full."""
    modules = {paths.module_of(path) for path in targets}

    def whole(path: str) -> bool:
        module = paths.module_of(path)
        if lora_config.is_saved(config, module):
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
    raise_all(
        PlanError,
        "these target_parameters cannot be adapted",
        _bare_problems(config, leaves, record),
    )
    _tell_unmatched(config, targets, leaves, record)
    # A module's weight of whole numbers, where others that the pattern names are adapted.
    problems = [
        f"{path}: {why}"
        for path, why in sorted(record.left_out.items())
        if config.target_modules != ALL_LINEAR
        and not could_adapt(leaves[path])
        and _is_target(config, path)
        and not _named(config.exclude_modules, path)
        and not lora_config.is_saved(config, paths.module_of(path))
    ]
    for path in sorted(targets):
        if not _may_be_formed(config, path):
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
        return f"no rule: {record.left_out[path]}" if path in record.left_out else "not a matrix"
    if path in record.rejected:
        return "no rule: " + next(iter(record.rejected[path].values()))
    if path not in record.sites:
        return "never used"
    if config.target_modules != ALL_LINEAR:
        return "not targeted"
    if paths.leaf_name(path) == paths.IN_PROJ:
        return "PyTorch's attention, which PEFT adapts by its name"
    return is_no_linear(path, record) or "not targeted"


def _other_kind(path: str, record: Record) -> str:
    """Return what a weight is if PEFT's ``all-linear`` does not mean it."""
    used_by = {site.primitive for site in record.sites.get(path, {}).values()}
    return next((kind for name, kind in _OTHER_KINDS.items() if name in used_by), "")


def could_adapt(leaf: Any) -> bool:
    """Tell whether a parameter has the axes and the dtype of a matmul weight."""
    return leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _companions(names: Any, named: set[str], record: Record) -> set[str]:
    """Return what a module holds beside its matmul weight, unless it is named by its own path.

    A bias is beside it even where its rows are looked up, as those of a group of experts are.
    """
    weights = {path for path in named & record.sites.keys() if not _is_bias(path)}
    modules = {paths.module_of(path) for path in weights}
    return {
        path
        for path in named - weights
        if paths.module_of(path) in modules
        and not lora_config.matches(names, path.replace("/", "."))
    }


def _matrices(config: LoraConfig, named: set[str], record: Record) -> set[str]:
    """Return what a regular expression names without what is no matrix, as in PEFT.

    A norm's scale or a bias is none, also where layers are stacked or it has the axes of heads:
    it meets the data element by element. Where an expression names nothing else, it stays.
    """
    if not isinstance(config.target_modules, str):
        return named
    weights = record.sites.keys() | record.left_out.keys()
    found = {path for path in named if path in weights or path not in record.rejected}
    return found if found & weights else named


def _is_bias(path: str) -> bool:
    return paths.leaf_name(path) in paths.BIAS_NAMES


def _named(names: Any, path: str) -> bool:
    module = paths.module_of(path)
    return lora_config.matches(names, module) or lora_config.matches(names, path.replace("/", "."))


def _is_target(config: LoraConfig, path: str) -> bool:
    chosen = lora_config.in_chosen_layer(config, path.replace("/", "."))
    return chosen and _named(config.target_modules, path)


def _tell_unmatched(config: LoraConfig, targets: set[str], leaves: Leaves, record: Record) -> None:
    """Raise for what has no effect, or warn where the configuration is a file's and some has."""
    unmatched = list(_unmatched(config, targets, leaves))
    if unmatched and targets and config.on_unmatched == "warn":
        listed = ", ".join(
            f"{name} {pattern!r}{tied_head(pattern, record)}" for name, pattern in unmatched
        )
        warnings.warn(f"the configuration names what this model has not: {listed}", stacklevel=4)
        return
    if not unmatched:
        return
    every = dict.fromkeys(map(paths.module_of, leaves))
    weights = dict.fromkeys(map(paths.module_of, record.sites.keys() & leaves.keys()))
    bare_names = dict.fromkeys(path.replace("/", ".") for path in leaves)
    known = {"target_modules": sorted(weights) or every, "target_parameters": bare_names}
    reasons = {path: _why(config, path, leaves, record) for path in leaves}

    def said(name: str, pattern: str) -> str:
        if name == "layers_to_transform":
            return "which is the number of no layer with a target"
        given = _alike(getattr(config, name), pattern)
        why = reasons if name == "target_modules" else dict.fromkeys(leaves, "")
        return hints.hint(given, why, known.get(name, every)) + tied_head(pattern, record)

    raise_all(
        PlanError,
        "these patterns match no module",
        (f"{name}: got {pattern!r}, {said(name, pattern)}" for name, pattern in unmatched),
    )


def _why(config: LoraConfig, path: str, leaves: Leaves, record: Record) -> str:
    """Return why a parameter is no target though a pattern names it; empty where it may be one."""
    leaf = leaves[path]
    if path in record.left_out:
        return record.left_out[path]
    if not could_adapt(leaf):
        return f"{leaf.dtype}{tuple(leaf.shape)}, no matrix of floating point"
    if _named(config.exclude_modules, path):
        return "exclude_modules takes it out"
    chosen = lora_config.in_chosen_layer(config, path.replace("/", "."))
    return "" if chosen else "layers_to_transform leaves its layer out"


def _unmatched(config: LoraConfig, targets: set[str], leaves: Leaves) -> Iterator[tuple[str, str]]:
    """Yield every field and pattern that has no effect."""
    names = config.target_modules
    for name in () if names == ALL_LINEAR or names is None else _each(names):
        kept = (path for path in leaves if lora_config.is_saved(config, paths.module_of(path)))
        if not any(_named(_alike(names, name), path) for path in (*targets, *kept)):
            yield "target_modules", name
    for name in _each(config.exclude_modules):
        if not any(_named(_alike(config.exclude_modules, name), path) for path in leaves):
            yield "exclude_modules", name
    for name in config.target_parameters or ():
        if not bare(replace(config, target_parameters=(name,)), leaves):
            yield "target_parameters", name
    wanted = config.layers_to_transform
    for layer in (wanted,) if isinstance(wanted, int) else wanted or ():
        one = replace(config, layers_to_transform=layer)
        of_modules = targets - bare(config, leaves)
        if not any(lora_config.in_chosen_layer(one, path.replace("/", ".")) for path in of_modules):
            yield "layers_to_transform", str(layer)
    saved = config.modules_to_save or ()
    # PEFT lists every head name it knows, so one that fits is enough.
    if saved and not any(lora_config.is_saved(config, paths.module_of(path)) for path in leaves):
        yield "modules_to_save", ", ".join(saved)
    owner = owners(targets)
    for field_name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field_name):
            modules = (
                owner.get(path, lora_config.name_in_patterns(config, path)) for path in targets
            )
            if not any(lora_config.hits(pattern, module) for module in modules):
                yield field_name, pattern
    for pattern in config.output_slices:
        modules = (owner.get(path, paths.module_of(path)) for path in targets)
        if not any(lora_config.hits(pattern, module) for module in modules):
            yield "output_slices", pattern
    named = () if config.on_unsupported in ("error", "materialize") else config.on_unsupported
    for name in _each(named):
        one = _alike(config.on_unsupported, name)
        if not any(lora_config.matches(one, paths.module_of(path)) for path in leaves):
            yield "on_unsupported", name


def _each(names: Any) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _alike(names: Any, name: str) -> Any:
    """Return one pattern in the form it was given: a regex alone, a name in a list."""
    return name if isinstance(names, str) else (name,)


def _bare_problems(config: LoraConfig, leaves: Leaves, record: Record) -> Iterator[str]:
    """Yield every bare parameter that is no matrix, or that something else trains, too."""
    twice = _of_modules(config, leaves, record)
    if config.target_modules == ALL_LINEAR:
        # PEFT's linear layers are modules; a leaf of its own is none, but counts as one here.
        twice = {path for path in twice if paths.module_of(path) != path}
    for path in sorted(bare(config, leaves)):
        if not could_adapt(leaves[path]):
            shape = tuple(leaves[path].shape)
            yield f"{path}: got {leaves[path].dtype}{shape}, wanted floating point, 2 or 3 axes"
        if path in twice:
            yield f"{path}: target_modules means it, too"
        if lora_config.is_saved(config, paths.module_of(path)):
            yield f"{path}: modules_to_save trains it in full"


def _some(names: Any, most: int = 6) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" … ({len(names)} in all)" if len(names) > most else "")
