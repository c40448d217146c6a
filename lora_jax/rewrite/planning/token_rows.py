"""Which rows ``trainable_token_indices`` means, and what tied weights need; loudly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...core import paths, token_indices
from ...core.config import lora_config
from ...core.config.lora_config import LoraConfig
from ...core.errors import PlanError, raise_all
from ..interpret import Record

Leaves = Mapping[str, Any]

# What transformers call the embedding of the tokens; PEFT finds it through the model class.
INPUT_EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "token_embedding",
    "embed_in",
    "shared",
)


def rows(
    config: LoraConfig, leaves: Leaves, targets: set[str], saved: set[str], record: Record
) -> dict[str, tuple[int, ...]]:
    """Return the rows to train of every parameter that has some, in the order given.

    Raises:
        PlanError: lists every name without a weight of its own, every weight that has low-rank
            pairs or is trained in full, too, and every row that there is not.
    """
    given = config.trainable_token_indices
    if given is None:
        return {}
    matrices = [path for path in leaves if path in record.sites or path in record.rejected]
    if not isinstance(given, Mapping):
        wanted = {_input_embedding(matrices, record): [tuple(given)]}
    else:
        named = {path: lora_config.tokens_of(config, paths.module_of(path)) for path in matrices}
        wanted = {path: found for path, found in named.items() if found}
        raise_all(
            PlanError,
            "these names of trainable_token_indices mean no weight",
            (
                f"{name}: got no module that ends so, wanted one such as {_some(matrices, record)}"
                for name in given
                if not any(paths.module_of(path).endswith(name) for path in matrices)
            ),
        )
    problems = []
    for path, found in wanted.items():
        misuses = _misuses(path, leaves, record) or _row_problems(path, found, leaves, record)
        problems += [f"{path}: {problem}" for problem in misuses]
        if path in targets:
            problems.append(f"{path}: target_modules adapts it, too; exclude_modules takes it out")
        if path in saved:
            problems.append(f"{path}: modules_to_save trains all of it, too")
    raise_all(PlanError, "trainable_token_indices cannot be trained here", problems)
    return {path: found[0] for path, found in wanted.items()}


def check_tied(config: LoraConfig, saved: set[str], record: Record) -> None:
    """Raise where ``modules_to_save`` means a tied weight and the configuration does not say so.

    Raises:
        PlanError: lists them.
    """
    if config.ensure_weight_tying:
        return
    raise_all(
        PlanError,
        "modules_to_save means weights that the output head shares. One leaf is one weight: all "
        "its uses change, where PEFT trains a copy for the embedding and spares the head. Set "
        "ensure_weight_tying=True to have that",
        (
            f"{path}: used by {' and '.join(sorted(used))}"
            for path, used in _tied(record).items()
            if path in saved
        ),
    )


def tied_head(pattern: str, record: Record) -> str:
    """Return what to add where a pattern means an output head that has no weight of its own."""
    shared = ", ".join(_tied(record))
    is_head = any(map(lora_config.is_output_head, pattern.split(", ")))
    return f" (the output head is tied, it shares {shared})" if shared and is_head else ""


def _tied(record: Record) -> dict[str, set[str]]:
    """Return what uses each weight whose rows are looked up and that has another use, too."""
    uses = {path: {one.primitive for one in own.values()} for path, own in record.sites.items()}
    return {
        path: uses[path]
        for path in sorted(uses)
        if "gather" in uses[path] and uses[path] != {"gather"}
    }


def is_input_embedding(module: str) -> bool:
    """Tell whether transformers call the embedding of the tokens so.

    >>> is_input_embedding("model.embed_tokens"), is_input_embedding("transformer.wpe")
    (True, False)
    """
    return module.rpartition(paths.SEPARATOR)[2] in INPUT_EMBEDDINGS


def why(found: tuple[int, ...]) -> str:
    """Return what the plan's table says.

    >>> why((3, 1)), why((7,))
    ('2 rows trained', '1 row trained')
    """
    return f"{len(found)} row{'s' * (len(found) > 1)} trained"


def _input_embedding(matrices: list[str], record: Record) -> str:
    """Return the embedding of the tokens: one with a name that such have, or the only one."""
    found = [path for path in matrices if _looked_up(path, record)]
    known = [path for path in found if is_input_embedding(paths.module_of(path))]
    for choice in (known, found):
        if len(choice) == 1:
            return choice[0]
    raise PlanError(
        "trainable_token_indices is a list, which means the embedding of the tokens. Name it: "
        f"{{module: tokens}}. Looked up are: {', '.join(known or found) or 'no weights'}"
    )


def _misuses(path: str, leaves: Leaves, record: Record) -> list[str]:
    """Return why the rows of a weight cannot be trained."""
    if refused := record.rejected.get(path):
        return list(refused.values())
    letters = next(iter(record.sites[path].values())).letters
    if len(letters) != 2 or set(letters) != {"i", "o"}:
        return [f"got a weight with the axes {letters!r}, wanted one matrix"]
    module = paths.module_of(path)
    if _looked_up(path, record):
        return []
    if not lora_config.is_output_head(module):
        return ["no rows of it are looked up, and it is no output head by its name"]
    biased = any(
        paths.leaf_name(other) in paths.BIAS_NAMES and paths.module_of(other) == module
        for other in leaves
    )
    return ["it has a bias, which PEFT leaves out of a head with trained rows"] * biased


def _row_problems(
    path: str, found: list[tuple[int, ...]], leaves: Leaves, record: Record
) -> list[str]:
    if len(set(found)) > 1:
        return [f"got the tokens {' and '.join(map(str, found))}, wanted one list of them"]
    site = next(
        (one for one in record.sites[path].values() if one.primitive == "gather"),
        next(iter(record.sites[path].values())),
    )
    size = leaves[path].shape[site.letters.index("i" if site.primitive == "gather" else "o")]
    return token_indices.problems(found[0], size)


def _looked_up(path: str, record: Record) -> bool:
    return any(site.primitive == "gather" for site in record.sites.get(path, {}).values())


def _some(matrices: list[str], record: Record) -> str:
    found = [path for path in matrices if _looked_up(path, record)]
    return ", ".join(map(paths.module_of, found or matrices[:6]))
