"""The one grammar of parameter paths: keys joined by ".", as PyTorch writes them.

``{"encoder": {"layer.0": {"query": {"kernel": w}}}}`` holds the path
``encoder.layer.0.query.kernel``; its module is ``encoder.layer.0.query``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax

SEPARATOR = "."

# What frameworks call the weight inside its module; a path that ends so has a module name.
BIAS_NAMES = frozenset({"bias", "b"})
_PART = re.compile(r"\[\d+:\d+\]$")
_LEAF_NAMES = frozenset({"kernel", "weight", "w", "embedding", "scale"}) | BIAS_NAMES

# PyTorch's nn.MultiheadAttention: query, key and value as one weight of its own, and a child.
IN_PROJ, OUT_PROJ = "in_proj_weight", "out_proj"


def path_of(key_path: tuple[Any, ...]) -> str:
    """Return the path of a leaf from ``jax.tree_util``'s key path.

    >>> import jax
    >>> [(keys, _)] = jax.tree_util.tree_leaves_with_path({"mlp": [{"kernel": 1}]})
    >>> path_of(keys)
    'mlp.0.kernel'
    """
    path = jax.tree_util.keystr(key_path, simple=True, separator=SEPARATOR)
    # A leaf of an NNX state sits one attribute below its variable.
    variable = bool(key_path) and getattr(key_path[-1], "name", None) == "value"
    return path.removesuffix(f"{SEPARATOR}value") if variable else path


def flatten(tree: Any) -> dict[str, Any]:
    """Return every leaf of ``tree`` by its path, in the order of ``jax.tree.leaves``.

    Raises:
        ValueError: two leaves have the same path, as ``{"a": {"b": 1}, "a.b": 2}`` has.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    by_path = {path_of(keys): leaf for keys, leaf in leaves}
    if len(by_path) != len(leaves):
        seen: set[str] = set()
        paths = [path_of(keys) for keys, _ in leaves]
        twice = sorted({path for path in paths if path in seen or seen.add(path)})
        raise ValueError(f"these paths name two leaves each: {', '.join(twice)}; rename a key")
    return by_path


def replace(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Return ``tree`` with the leaves at these paths replaced; all others are the same objects."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: leaves.get(path_of(keys), leaf), tree
    )


def part_name(path: str, columns: tuple[int, int] | None) -> str:
    """Return the name of the adapter for a range of a parameter's output axis.

    >>> part_name("c_attn.kernel", (0, 768)), parameter_of("c_attn.kernel[0:768]")
    ('c_attn.kernel[0:768]', 'c_attn.kernel')
    """
    return path if columns is None else f"{path}[{columns[0]}:{columns[1]}]"


def parameter_of(name: str) -> str:
    """Return the path of the parameter that an adapter of this name belongs to."""
    return _PART.sub("", name)


def leaf_name(path: str) -> str:
    """Return the last key of a path."""
    return path.rpartition(SEPARATOR)[2]


def module_of(path: str) -> str:
    """Return the name that PEFT's patterns see: the path of the module that owns the leaf.

    Haiku's "/" counts as a separator. A leaf without one of the usual weight names
    (``kernel``, ``weight``, ``w``, ``embedding``, …) is its own module; ``in_proj_weight``
    belongs to PyTorch's attention, which has its own.

    >>> module_of("encoder.layer.0.query.kernel"), module_of("mlp/~/linear_0.w"), module_of("wq")
    ('encoder.layer.0.query', 'mlp.~.linear_0', 'wq')
    """
    path = path.replace("/", SEPARATOR)
    parent, _, name = path.rpartition(SEPARATOR)
    return parent if parent and name in _LEAF_NAMES | {IN_PROJ} else path


def attentions(paths: Collection[str]) -> dict[str, str]:
    """Return the modules that have PyTorch's ``in_proj_weight`` by the paths of their two weights.

    >>> attentions(["attn.in_proj_weight", "attn.out_proj.weight", "attn.out_proj.bias"])
    {'attn.in_proj_weight': 'attn', 'attn.out_proj.weight': 'attn'}
    """
    found = {path: module_of(path) for path in paths if leaf_name(path) == IN_PROJ}
    outs = {f"{owner}.{OUT_PROJ}.weight": owner for owner in found.values()}
    return found | {path: outs[path] for path in paths if path in outs}
