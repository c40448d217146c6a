"""What may be wrong with the fields of a ``LoraConfig``, and the expressions among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .. import token_indices
from ..shown_text import shortened
from .endless_regexes import Expression, in_layers, suffixed

_LARGEST = (2 - 2**-23) * 2.0**127

# ``LoraConfig`` imports this module, so that a configuration is anything with its fields here.
Config = Any

# Above the width of every layer; beyond it sizes are more than 64 bits hold.
LARGEST_RANK = 1 << 20

BIASES = ("none", "all", "lora_only")
UNMATCHED = ("error", "warn")

# PEFT has a start for a bias only beside these two; the others here are names of the first.
_BIASED_INITS = (True, False, "kaiming_uniform", "kaiming_uniform_rank")


def problems(config: Config) -> list[str]:
    """Return a line for every field that is out of range or contradicts another."""
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
        f"{name}: got {shortened(repr(r), 40)}, wanted at most {LARGEST_RANK:,}"
        for name, r in ranks.items()
        if isinstance(r, int) and r > LARGEST_RANK
    ]
    found += [
        f"{name}: got {shortened(repr(alpha), 40)}, wanted a finite number of float32"
        for name, alpha in alphas.items()
        if isinstance(alpha, bool) or not _is_finite(alpha)
    ]
    if not 0 <= config.lora_dropout < 1:
        found.append(f"lora_dropout: got {config.lora_dropout!r}, wanted 0 <= p < 1")
    found += token_indices.token_problems(config.trainable_token_indices)
    if not isinstance(config.ensure_weight_tying, bool):
        found.append(f"ensure_weight_tying: got {config.ensure_weight_tying!r}, wanted a bool")
    if config.bias not in BIASES:
        found.append(f"bias: got {config.bias!r}, wanted one of {', '.join(BIASES)}")
    if config.on_unmatched not in UNMATCHED:
        found.append(f"on_unmatched: got {config.on_unmatched!r}, wanted 'error' or 'warn'")
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
    if config.lora_bias:
        found += [
            f"lora_bias: got True, wanted False beside {name}"
            for name in ("use_dora", "output_slices")
            if getattr(config, name)
        ]
        if config.init_lora_weights not in _BIASED_INITS:
            init = config.init_lora_weights
            found.append(f"lora_bias: got True, wanted False beside init_lora_weights={init!r}")
    found += _alora_problems(config)
    found += _parameter_problems(config)
    if isinstance(config.modules_to_save, str):
        found.append(f"modules_to_save: got {config.modules_to_save!r}, wanted a list of names")
    found += [
        f"output_slices[{key!r}]: got {given!r}, wanted ranges (start, stop) that do not overlap"
        for key, given in config.output_slices.items()
        if not _are_ranges(given)
    ]
    # As they are used, too: "(?i)q" is an expression, but not inside another one.
    used = [(pattern, pattern) for pattern in _suffixes(config)]
    used += [(one.pattern, one.regex) for one in expressions(config)]
    bad = {name: problem for name, regex in reversed(used) if (problem := _regex_problem(regex))}
    return found + [f"{name!r}: {problem}" for name, problem in bad.items()]


def _suffixes(config: Config) -> list[str]:
    return [*config.rank_pattern, *config.alpha_pattern, *config.output_slices]


def expressions(config: Config) -> list[Expression]:
    """Return every regular expression of the configuration as it is used."""
    names = (config.target_modules, config.exclude_modules, config.on_unsupported)
    lists = config.layers_pattern or ()
    used = [Expression(one, suffixed(one), whole=False) for one in _suffixes(config)]
    used += [Expression(one, one, whole=True) for one in names if isinstance(one, str)]
    for name in [lists] if isinstance(lists, str) else lists:
        used.append(Expression(name, in_layers(name), whole=False))
    return used


def _alora_problems(config: Config) -> list[str]:
    name, tokens = "alora_invocation_tokens", config.alora_invocation_tokens
    if not tokens:
        return []
    if not isinstance(tokens, tuple) or any(type(one) is not int or one < 0 for one in tokens):
        return [f"{name}: got {tokens!r}, wanted token ids, integers of at least 0"]
    others = {"use_dora": config.use_dora, "on_unsupported": config.on_unsupported != "error"}
    return [
        f"{name}: got {tokens!r}, wanted None beside {other}" for other in others if others[other]
    ]


def _parameter_problems(config: Config) -> list[str]:
    """Return what PEFT refuses beside ``target_parameters``, and names that are no list."""
    found = [
        f"{name}: got {value!r}, wanted a list of names"
        for name in ("target_parameters", "transposed_parameters")
        for value in (getattr(config, name),)
        if isinstance(value, str | int) or any(not isinstance(one, str) for one in value or ())
    ]
    given = tuple(config.target_parameters or ())
    if found or not given:
        return found
    found += [
        f"{name}: got {getattr(config, name)!r}, wanted {plain!r} beside target_parameters"
        for name, plain in (("lora_dropout", 0.0), ("use_dora", False), ("lora_bias", False))
        if getattr(config, name) != plain
    ]
    if len(set(given)) < len(given):
        found.append(f"target_parameters: got {given!r}, wanted each name once")
    return found


def _is_finite(number: object) -> bool:
    """Tell whether a number is finite in float32, in which scales are multiplied."""
    try:
        return isinstance(number, int | float) and abs(float(number)) <= _LARGEST
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
