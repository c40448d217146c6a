"""``lora-jax combine``: a weighted combination of adapter directories, as another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from ..adapters.combine import combination_error, combine
from ..core.adapter import Entry, Full
from ..core.config.problems import LARGEST_RANK
from ..core.errors import AdapterError, ConfigError, raise_all
from ..core.shown_text import escaped
from ..core.text_tables import table
from ..peft import AdapterFile, fitted, open_adapter, write_adapter
from ..peft.base_weights import base_weights
from ..peft.module_tensors import LOOKED_UP
from ..train import option_limits
from ..train.option_limits import Range


@dataclass(frozen=True)
class CombineOptions:
    """Combine adapters of one model into one, with weights, as PEFT's add_weighted_adapter does.

    Args:
        out: where the new adapter goes; a new or empty directory.
        adapters: two or more adapter directories. Modules trained in full, as a classifier is,
            have no weighted sum: adapters that hold any are refused, as in PEFT.
        weights: one for each adapter; negative ones subtract. If not given, equal shares.
        type: cat (exact; ranks add up), svd, linear, ties, ties_svd, dare_linear, dare_ties,
            dare_linear_svd, dare_ties_svd, magnitude_prune or magnitude_prune_svd.
        svd_rank: rank of the result, for svd and what ends in it; if not given, the largest.
        density: share of the values that pruning keeps.
        majority_sign_method: how ties elects a sign: total or frequency.
        seed: what dare draws from.
        overwrite: replace files of the same name; others stay.
    """

    out: Path
    adapters: tuple[Path, ...]
    weights: tuple[float, ...] = ()
    type: str = "svd"
    svd_rank: int | None = None
    density: float | None = None
    majority_sign_method: str = "total"
    seed: int = 0
    overwrite: bool = False


def _check(options: CombineOptions) -> None:
    ranges = [Range("seed", options.seed, 0, option_limits.SEED)]
    rate = option_limits.RATE
    ranges += [Range("weights", weight, -rate, rate) for weight in options.weights]
    if options.svd_rank is not None:
        ranges.append(Range("svd_rank", options.svd_rank, 1, LARGEST_RANK))
    if options.density is not None:
        ranges.append(Range("density", options.density, 0, 1, above=True))
    raise_all(ConfigError, "these options are out of range", option_limits.problems(ranges))


def combine_files(options: CombineOptions) -> str:
    """Write the combination and return how far each module is from the exact weighted sum.

    Raises:
        AdapterError: an adapter cannot be read, or they do not go together.
        OutputError: ``out`` cannot be written.
    """
    _check(options)
    opened = [open_adapter(directory) for directory in options.adapters]
    _refuse_other_tokens(opened, options.adapters)
    base = _base(opened)
    trees = [
        {name: one for name, one in adapters.items() if name not in base} for _, adapters in opened
    ]
    share = 1 / max(len(trees), 1)
    weights = options.weights or (share,) * len(trees)
    combined = combine(
        trees,
        weights,
        options.type,
        svd_rank=options.svd_rank,
        density=options.density,
        majority_sign_method=options.majority_sign_method,
        key=jax.random.key(options.seed),
    )
    errors = combination_error(trees, weights, combined)
    write_adapter(
        options.out,
        fitted(opened[0][0], combined),
        {**combined, **base},
        embeddings=[name for name, one in combined.items() if one.axes == LOOKED_UP],
        overwrite=options.overwrite,
    )
    rows = [(name, str(one.a.shape[-1]), f"{errors[name]:.3g}") for name, one in combined.items()]
    bases = {file.base_model for file, _ in opened}
    note = [f"note: they record different base models: {', '.join(sorted(map(str, bases)))}"]
    return "\n".join(
        [
            table(("module", "r", "error against the exact sum"), rows),
            *map(escaped, note if len(bases) > 1 else []),
            f"the combination is in {escaped(options.out)}",
        ]
    )


Opened = Sequence[tuple[AdapterFile, Mapping[str, Entry]]]


def _refuse_other_tokens(opened: Opened, names: Sequence[Path]) -> None:
    """Raise where adapters would act on other tokens of one text than they were trained for."""
    field = "alora_invocation_tokens"
    found = {
        name: getattr(file.config, field) for name, (file, _) in zip(names, opened, strict=True)
    }
    different = len({tokens or None for tokens in found.values()}) > 1
    lines = [f"{name}: {field} is {tokens}" for name, tokens in found.items() if different]
    raise_all(AdapterError, "these adapters act on different parts of a text", lines)


def _base(opened: Opened) -> dict[str, Full]:
    """Return the base weights that these adapters carry, which must be of one base.

    Raises:
        AdapterError: lists those that differ.
    """
    base: dict[str, Full] = {}
    problems = {}
    for file, adapters in opened:
        for name, one in base_weights(file.config, adapters).items():
            first = base.setdefault(name, one)
            if not np.array_equal(np.asarray(first.value), np.asarray(one.value)):
                problems[name] = f"{name}: the adapters carry different base weights"
    raise_all(AdapterError, "these adapters are of different models", problems.values())
    return base
