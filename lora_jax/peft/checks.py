"""Whether a file's header and configuration fit the plan: what ``load_pretrained`` checks."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.adapter import STACKED, pick
from ..core.config import lora_config
from ..core.config.lora_config import LoraConfig
from ..core.errors import AdapterError, raise_all
from ..core.io.intake import open_regular
from ..rewrite import LeafPlan, Plan
from . import config_json
from .keys import PREFIX, ROWS
from .tying import EMBEDDING, HEAD

# safetensors' own limit.
_LONGEST_HEADER = 100_000_000

# What decides the numbers beside the tensors.
_DECISIVE = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "alora_invocation_tokens")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_TARGETS = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)


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
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            return f"the header claims {length} bytes of a file of {size}"
        content = stream.read(length)
    try:
        _, twice = config_json.parse(content)
    except ValueError as error:
        return f"the header is not JSON: {error}"
    return f"the header says these names twice: {', '.join(twice)}" if twice else None


def refuse_hanging(config: LoraConfig, modules: Iterable[str]) -> None:
    """Raise for a regular expression of a file that would never come to an end on these names.

    Raises:
        AdapterError: names the pattern.
    """
    problems = lora_config.hanging(config, modules)
    raise_all(AdapterError, "the configuration's patterns cannot be resolved", problems)


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
    every = [_names_of(leaf, plan.config, names) for leaf in plan.adapted]
    return found + target_problems(config, every)


def misfit(config: LoraConfig, leaf: LeafPlan, module: str) -> str | None:
    """Return where the file's configuration gives a module another rank or scale than the plan."""
    r, alpha = lora_config.rank_and_alpha(config, module)
    scale = lora_config.scale(config, r, alpha)
    same_scale = math.isclose(scale, leaf.scale, rel_tol=1e-6)
    if bool(config.alora_invocation_tokens) != leaf.masked:
        tokens = config.alora_invocation_tokens
        return f"{module}: the file has alora_invocation_tokens={tokens}, the plan has another"
    kind = (config.use_dora, config.lora_bias)
    if (r, *kind) == (leaf.r, leaf.dora, leaf.biased) and same_scale:
        return None
    if config.lora_bias != leaf.biased:
        return f"{module}: the file has lora_bias={config.lora_bias}, the plan {leaf.biased}"
    if config.use_dora != leaf.dora:
        return f"{module}: the file has use_dora={config.use_dora}, the plan {leaf.dora}"
    return (
        f"{module}: the file has r={r} and scale {scale:g}, the plan r={leaf.r} and "
        f"{leaf.scale:g} for {leaf.path}"
    )


def target_problems(config: LoraConfig, modules: Iterable[str | Sequence[str]]) -> list[str]:
    """Return where the targets and the modules or parameters that have adapters disagree.

    A file's configuration may list names that mean nothing in this model (see ``idle``).

    Args:
        config: the configuration.
        modules: the name of every module, or its names, any of which may be meant; the names
            of bare parameters.
    """
    targets, bare = config.target_modules, config.target_parameters or ()
    named = [(one,) if isinstance(one, str) else tuple(one) for one in modules]
    found: list[str] = []
    if not (targets is None and not bare) and targets != lora_config.ALL_LINEAR:
        found += [
            f"{own[0]}: has an adapter, but target_modules={targets!r} leaves it out"
            + (f", as does target_parameters={bare!r}" if bare else "")
            for own in named
            if not any(_is_target(config, name) for name in own)
            and not (own[0].rpartition(".")[2] == HEAD and _ties(config, named))
        ]
    lenient = config.on_unmatched == "warn"
    return found if lenient else found + idle(config, (one for own in named for one in own))


def idle(config: LoraConfig, modules: Iterable[str]) -> list[str]:
    """Return a line for every listed target that none of these modules is."""
    modules = list(modules)
    listed = {
        "target_modules": config.target_modules,
        "target_parameters": config.target_parameters,
    }
    return [
        f"{field}: {name!r} has no adapter"
        for field, given in listed.items()
        for name in (() if given is None or isinstance(given, str) else given)
        if not any(lora_config.matches([name], module) for module in modules)
    ]


def rows_of(config: LoraConfig, keys: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the tokens of every module of which the file holds rows; () where it names none."""
    ends = f".{ROWS}"
    modules = [key.removeprefix(PREFIX).removesuffix(ends) for key in keys if key.endswith(ends)]
    return {module: tokens(config, module) for module in modules}


def row_problems(config: LoraConfig, rows: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return where ``trainable_token_indices`` and the rows of these modules disagree."""
    given, name_of = config.trainable_token_indices, "trainable_token_indices"
    found = [
        f"{module}: the file has the tokens {list(wanted) or None}, wanted {list(own)}"
        if own
        else f"{module}: has rows, but {name_of} does not name it"
        for module, own in rows.items()
        if (wanted := tokens(config, module)) != own or not own
    ]
    if isinstance(given, Mapping):
        idle = [name for name in given if not any(module.endswith(name) for module in rows)]
        return found + [f"{name_of}: {name!r} has no rows" for name in idle]
    if given is not None and len(rows) != 1:
        found.append(f"{name_of}: {list(given)} are of one embedding, got rows of {len(rows)}")
    return found


def tokens(config: LoraConfig, module: str) -> tuple[int, ...]:
    """Return the tokens whose rows a module has; () for none."""
    given = config.trainable_token_indices
    if given is None or isinstance(given, Mapping):
        return next(iter(lora_config.tokens_of(config, module)), ())
    return tuple(given)


def _ties(config: LoraConfig, named: list[tuple[str, ...]]) -> bool:
    """Tell whether PEFT adapts the output head with the embedding, which alone is a target."""
    embeddings = [name for own in named for name in own if name.rpartition(".")[2] == EMBEDDING]
    return config.ensure_weight_tying and any(_is_target(config, name) for name in embeddings)


def _names_of(leaf: LeafPlan, config: LoraConfig, names: Callable[[str], str]) -> list[str]:
    """Return a weight's names in JAX and in the file, where each of stacked layers has its own."""
    name, stacked = leaf.owner or names(leaf.path), pick(leaf.shape, leaf.axes, STACKED)
    # The experts of a bare parameter have no names of their own.
    indices = itertools.product(*map(range, stacked[: name.count("{}")]))
    own = leaf.owner or lora_config.name_in_patterns(config, leaf.path)
    return [own, *(name.format(*index) for index in indices)]


def _is_target(config: LoraConfig, module: str) -> bool:
    if lora_config.parameter_name(config, module) is not None:
        return True
    return (
        lora_config.matches(config.target_modules, module)
        and lora_config.in_chosen_layer(config, module)
        and not lora_config.matches(config.exclude_modules, module)
    )
