"""The one grammar of parameter paths: keys joined by ".", as PyTorch writes them.

``{"encoder": {"layer.0": {"query": {"kernel": w}}}}`` holds the path
``encoder.layer.0.query.kernel``; its module is ``encoder.layer.0.query``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax

SEPARATOR = "."

# What frameworks call the weight inside its module; a path that ends so has a module name.
BIAS_NAMES = frozenset({"bias", "b"})
_PART = re.compile(r"\[\d+:\d+\]$")
_LEAF_NAMES = frozenset({"kernel", "weight", "w", "embedding", "scale"}) | BIAS_NAMES

# An array in boxes of its own, as Penzai (``weights.value.data_array``) and haliax
# (``weight.array``) have it; and a name that says its axes, such as ``weight_MxN`` or ``bias_N``.
_BOXED = re.compile(r"(?:\.(?:value|raw_value|data_array|array))+$")
_OF_BOXES = {"weights": "weight", "biases": "bias"}
_SIZED = re.compile(
    r"(kernel|weight|embedding|scale)_[A-Z]\w*x[A-Z]\w*|(bias|scale)_[A-Z][A-Za-z]*"
)

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
    """Return the last key of a path, as frameworks call it.

    >>> leaf_name("mlp.up.kernel"), leaf_name("up.bias_N"), leaf_name("up.weights.value.data_array")
    ('kernel', 'bias', 'weight')
    """
    return _module_and_leaf(path)[1]


def module_of(path: str) -> str:
    """Return the name that PEFT's patterns see: the path of the module that owns the leaf.

    Haiku's "/" counts as a separator. A leaf without one of the usual weight names
    (``kernel``, ``weight``, ``w``, ``embedding``, …) is its own module; ``in_proj_weight``
    belongs to PyTorch's attention, which has its own. A name that says its axes, such as
    ``weight_MxN``, is a usual one, and so is one in boxes of its own (``weight.array``).

    >>> module_of("encoder.layer.0.query.kernel"), module_of("mlp/~/linear_0.w"), module_of("wq")
    ('encoder.layer.0.query', 'mlp.~.linear_0', 'wq')
    >>> module_of("attn.c_attn.weight_MxN"), module_of("query.weights.value.data_array")
    ('attn.c_attn', 'query')
    """
    return _module_and_leaf(path)[0]


@functools.lru_cache(maxsize=1 << 16)
def _module_and_leaf(path: str) -> tuple[str, str]:
    path = path.replace("/", SEPARATOR)
    inner = _BOXED.sub("", path)
    parent, _, name = inner.rpartition(SEPARATOR)
    if inner != path:
        name = _OF_BOXES.get(name, name)
    if sized := _SIZED.fullmatch(name):
        name = sized[1] or sized[2]
    if parent and name in _LEAF_NAMES | {IN_PROJ}:
        return parent, name
    return path, path.rpartition(SEPARATOR)[2]


def attentions(paths: Collection[str]) -> dict[str, str]:
    """Return the modules that have PyTorch's ``in_proj_weight`` by the paths of their two weights.

    >>> attentions(["attn.in_proj_weight", "attn.out_proj.weight", "attn.out_proj.bias"])
    {'attn.in_proj_weight': 'attn', 'attn.out_proj.weight': 'attn'}
    """
    found = {path: module_of(path) for path in paths if leaf_name(path) == IN_PROJ}
    outs = {f"{owner}.{OUT_PROJ}.weight": owner for owner in found.values()}
    return found | {path: outs[path] for path in paths if path in outs}
