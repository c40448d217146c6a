"""``LoraConfig``: PEFT's field names and the rules that resolve them for one module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from .errors import ConfigError, raise_all

ALL_LINEAR = "all-linear"

# PEFT finds the output head through the model class; a pytree has only names.
OUTPUT_HEADS = ("lm_head", "embed_out", "score", "classifier")

T = TypeVar("T")

_SEQUENCES = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "on_unsupported",
)

BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoraConfig:
    """How to adapt a model; every field has PEFT's name, meaning and default.

    Module names are parameter paths without the leaf (see ``lora_jax.paths.module_of``).

    Args:
        r: rank of A and B, at least 1.
        lora_alpha: numerator of the scale.
        target_modules: names that match exactly or as a ``.suffix``; or one regular
            expression for the whole module name; or ``"all-linear"``: every matmul weight
            except the output head.
        exclude_modules: names or one regular expression, taken out of the targets.
        lora_dropout: probability of dropping an input of the low-rank path, in [0, 1).
        use_rslora: scale by ``alpha / sqrt(r)`` instead of ``alpha / r`` (arXiv 2312.03732).
        use_dora: also train the norm of each output's weights (arXiv 2402.09353).
        init_lora_weights: a name in ``lora_jax.initializers.INITIALIZERS``; ``True`` is PEFT's
            default (B = 0), ``False`` draws both at random. Or one that ``lora_jax.initialise``
            makes: ``"pissa"``, ``"olora"``, ``"eva"``, ….
        rank_pattern: r by module-name pattern; the first hit wins over ``r``.
        alpha_pattern: alpha by module-name pattern; the first hit wins over ``lora_alpha``.
        layers_to_transform: the numbers of the layers that are adapted, where ``target_modules``
            are names; None for all.
        layers_pattern: names of the list that holds the layers, such as ``"layers"``; by default
            the first number in a module's name counts.
        modules_to_save: names of modules trained in full and saved beside the adapters.
        bias: which biases are trained in full: ``"none"``, ``"all"``, or ``"lora_only"`` (those
            of adapted modules).
        on_unsupported: what happens to a target whose use has no rule: ``"error"``, or
            ``"materialize"``, which forms ``W + s·A·B`` there, correct and slow; names or one
            regular expression allow it for these modules alone. Not a field of PEFT's.
        output_slices: for modules whose kernel is several projections side by side, by
            module-name pattern: the ranges of the output axis that are adapted, with a pair
            for each: ``{"c_attn": [(0, 768), (1536, 2304)]}``. Not a field of PEFT's.

    Raises:
        ConfigError: lists every field that is out of range.

    Source: PEFT 0.21.2 ``LoraConfig``; LoRA, arXiv 2106.09685.

    >>> config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    >>> config.target_modules
    ('query', 'value')
    """

    r: int = 8
    lora_alpha: int | float = 8
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    lora_dropout: int | float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    bias: str = "none"
    on_unsupported: str | Sequence[str] = "error"
    output_slices: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _SEQUENCES:
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | int):
                object.__setattr__(self, name, tuple(value))
        raise_all(ConfigError, "these LoraConfig fields are out of range", _problems(self))


def scale(config: LoraConfig, r: int, alpha: int | float) -> float:
    """Return ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.

    >>> scale(LoraConfig(use_rslora=True), r=16, alpha=8)
    2.0
    """
    return alpha / (math.sqrt(r) if config.use_rslora else r)


def rank_and_alpha(config: LoraConfig, module: str) -> tuple[int, int | float]:
    """Return r and alpha of one module, after ``rank_pattern`` and ``alpha_pattern``."""
    return (
        _first_hit(config.rank_pattern, module, config.r),
        _first_hit(config.alpha_pattern, module, config.lora_alpha),
    )


def materializes(config: LoraConfig, module: str) -> bool:
    """Tell whether ``W + s·A·B`` may be formed where a use of this module has no rule."""
    if config.on_unsupported in ("error", "materialize"):
        return config.on_unsupported == "materialize"
    return matches(config.on_unsupported, module)


def slices(config: LoraConfig, module: str) -> tuple[tuple[int, int], ...]:
    """Return the ranges of the output axis that are adapted; empty for all of it."""
    return tuple(map(tuple, _first_hit(config.output_slices, module, ())))  # pyright: ignore


def hits(pattern: str, module: str) -> bool:
    """Tell whether a key of ``rank_pattern`` or ``alpha_pattern`` means this module."""
    return re.match(_suffix_regex(pattern), module) is not None


def matches(names: str | Sequence[str] | None, module: str) -> bool:
    r"""Tell whether PEFT would take this module: a regex for all of it, or names by suffix.

    >>> matches(["query"], "layer.0.query"), matches(["query"], "layer.0.subquery")
    (True, False)
    >>> matches(r".*\.(0|1)\..*", "layer.1.query")
    True
    """
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(_ends_with(module, name) for name in names)


def in_chosen_layer(config: LoraConfig, module: str) -> bool:
    """Tell whether ``layers_to_transform`` means the layer that this module is in.

    >>> config = LoraConfig(target_modules=["q"], layers_to_transform=[1])
    >>> in_chosen_layer(config, "layers.1.q"), in_chosen_layer(config, "layers.2.experts.1.q")
    (True, False)
    """
    wanted = config.layers_to_transform
    if wanted is None or wanted == ():
        return True
    lists = config.layers_pattern or r"[^.]*"
    for pattern in (lists,) if isinstance(lists, str) else lists:
        # The first number counts: an expert's comes later. PEFT overlooks it in a list at the
        # top of the model, which trees of parameters may have.
        if found := re.match(_layer_regex(pattern), module):
            return int(found[found.re.groups]) in ((wanted,) if isinstance(wanted, int) else wanted)
    return False


def is_output_head(module: str) -> bool:
    """Tell whether ``all-linear`` leaves this module out, by the names output heads have."""
    return any(_ends_with(module, name) for name in OUTPUT_HEADS)


def is_saved(config: LoraConfig, module: str) -> bool:
    """Tell whether the module, or one it lies in, is trained in full."""
    parts = module.split(".")
    owners = (".".join(parts[: n + 1]) for n in range(len(parts)))
    return any(matches(config.modules_to_save, owner) for owner in owners)


def _suffix_regex(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _layer_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\."


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _first_hit(patterns: Mapping[str, T], module: str, default: T) -> T:
    return next((value for key, value in patterns.items() if hits(key, module)), default)


def _problems(config: LoraConfig) -> list[str]:
    ranks = {"r": config.r} | {f"rank_pattern[{k!r}]": v for k, v in config.rank_pattern.items()}
    alphas = {"lora_alpha": config.lora_alpha} | {
        f"alpha_pattern[{k!r}]": v for k, v in config.alpha_pattern.items()
    }
    found = [
        f"{name}: got {r!r}, wanted an integer of at least 1"
        for name, r in ranks.items()
        if isinstance(r, bool) or not isinstance(r, int) or r < 1
    ]
    found += [
        f"{name}: got {alpha!r}, wanted a finite number"
        for name, alpha in alphas.items()
        if isinstance(alpha, bool) or not _is_finite(alpha)
    ]
    if not 0 <= config.lora_dropout < 1:
        found.append(f"lora_dropout: got {config.lora_dropout!r}, wanted 0 <= p < 1")
    if config.bias not in BIASES:
        found.append(f"bias: got {config.bias!r}, wanted one of {', '.join(BIASES)}")
    if isinstance(config.target_modules, str):
        found += [
            f"{name}: got {getattr(config, name)!r}, wanted None where target_modules is a string"
            for name in ("layers_to_transform", "layers_pattern")
            if getattr(config, name) is not None
        ]
    elif config.layers_pattern and config.layers_to_transform is None:
        found.append("layers_to_transform: got None, wanted numbers beside layers_pattern")
    if config.use_dora and config.output_slices:
        found.append("use_dora: got True, wanted False beside output_slices")
    if isinstance(config.modules_to_save, str):
        found.append(f"modules_to_save: got {config.modules_to_save!r}, wanted a list of names")
    found += [
        f"output_slices[{key!r}]: got {given!r}, wanted ranges (start, stop) that do not overlap"
        for key, given in config.output_slices.items()
        if not _are_ranges(given)
    ]
    suffixes = [*config.rank_pattern, *config.alpha_pattern, *config.output_slices]
    names = (config.target_modules, config.exclude_modules, config.on_unsupported)
    lists = config.layers_pattern or ()
    # As they are used, too: "(?i)q" is an expression, but not inside another one.
    used = [(pattern, pattern) for pattern in suffixes]
    used += [(pattern, _suffix_regex(pattern)) for pattern in suffixes]
    used += [(name, name) for name in names if isinstance(name, str)]
    used += [(name, _layer_regex(name)) for name in ([lists] if isinstance(lists, str) else lists)]
    bad = {name: problem for name, regex in reversed(used) if (problem := _regex_problem(regex))}
    return found + [f"{name!r}: {problem}" for name, problem in bad.items()]


def _is_finite(number: object) -> bool:
    try:
        return isinstance(number, int | float) and math.isfinite(number)
    except OverflowError:  # an integer beyond every float
        return False


def _are_ranges(given: Sequence[tuple[int, int]]) -> bool:
    try:
        ends = [int(end) for start, stop in sorted(given) for end in (start, stop)]
    except (TypeError, ValueError):
        return False
    starts_below_stops = all(a < b for a, b in zip(ends[::2], ends[1::2], strict=True))
    return bool(ends) and ends[0] >= 0 and starts_below_stops and ends == sorted(ends)


def _regex_problem(regex: str) -> str | None:
    try:
        re.compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        return f"not a regular expression ({error})"
    return None
