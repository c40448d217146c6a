"""What to say of a pattern that has no effect: why what it names cannot be, or what would match."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ...core import paths
from ...core.config import lora_config

_MOST = 6


def hint(
    names: str | tuple[str, ...],
    reasons: Mapping[str, str],
    modules: Collection[str],
) -> str:
    """Return what a pattern names that is no target, or which patterns would name a module.

    Args:
        names: the pattern as its field has it: a regular expression, or one name in a tuple.
        reasons: every parameter's path, and why it is no target; empty where it may be one.
        modules: what the field may name.
    """
    dotted = {path: path.replace("/", paths.SEPARATOR) for path in reasons}
    named = [path for path, name in dotted.items() if _means(names, path, name)]
    one = names[0] if isinstance(names, tuple) else ""
    below = [path for path, name in dotted.items() if one and f".{one}." in f".{name}"]
    for found in (named, below):
        if found and all(reasons[path] for path in found):
            said = _some(f"{path} ({reasons[path]})" for path in found)
            return f"which names no weight that can be adapted: {said}"
    inside = [module for module in modules if one and f".{one}." in f".{module}"]
    close = inside or _close(one, modules)
    word = "which holds" if inside else "wanted a module such as"
    return f"{word} {_some(close)}: {_some(_patterns(close), 3)} would match"


def _means(names: Any, path: str, dotted: str) -> bool:
    return lora_config.matches(names, paths.module_of(path)) or lora_config.matches(names, dotted)


def _close(pattern: str, modules: Collection[str]) -> Collection[str]:
    tails = {_tail(module): module for module in modules}
    last = _tail(pattern)
    close = difflib.get_close_matches(last, tails, n=3, cutoff=0.4)
    return [tails[name] for name in close] or modules


def _patterns(modules: Iterable[str]) -> list[str]:
    """Return the names by which a list of targets means these modules, each once."""
    return list(dict.fromkeys(repr(_tail(module)) for module in modules))


def _tail(module: str) -> str:
    """Return the end of a module's name that is no number alone.

    >>> _tail("layers.0.query"), _tail("mlp.0")
    ('query', 'mlp.0')
    """
    parts = module.split(paths.SEPARATOR)
    named = [n for n, part in enumerate(parts) if not part.isdecimal()]
    return paths.SEPARATOR.join(parts[named[-1] :] if named else parts)


def _some(names: Iterable[str], most: int = _MOST) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" … ({len(names)} in all)" if len(names) > most else "")
