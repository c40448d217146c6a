"""The base model's own weights inside an adapter file; pure functions.

PEFT writes the embedding and the output head beside the adapters where one of them is a target
(``lm_head.base_layer.weight``) or where the vocabulary was resized (``lm_head.weight``), and puts
them in the place of the model's own when it reads the file. Here the parameters are given, so the
two are compared: equal ones say nothing new, and others are never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..core import paths
from ..core.adapter import Adapters, Entry, Full
from ..core.config import lora_config
from ..core.config.lora_config import LoraConfig
from ..core.errors import AdapterError, raise_all
from ..rewrite import LeafPlan, Plan
from ..rewrite.planning.token_rows import is_input_embedding
from .keys import PREFIX, file_axes, file_shape, is_held
from .names.naming import Names, name_of

# What transformers call the layer that gives the logits of a vocabulary.
_HEADS = ("lm_head", "embed_out", "decoder", "proj_out")

_BASE = re.compile(rf"{re.escape(PREFIX)}(.+?)(\.base_layer)?\.(weight|bias)")


class Carried(NamedTuple):
    """One tensor of the base model in a file.

    Args:
        key: its name.
        module: the PyTorch module.
        bias: whether it is the module's bias.
    """

    key: str
    module: str
    bias: bool


def is_vocabulary(module: str) -> bool:
    """Tell whether a module is an embedding of the tokens or an output head, by its name.

    >>> is_vocabulary("model.embed_tokens"), is_vocabulary("lm_head"), is_vocabulary("q_proj")
    (True, True, False)
    """
    return module.rpartition(paths.SEPARATOR)[2] in _HEADS or is_input_embedding(module)


def carried(keys: Iterable[str]) -> list[Carried]:
    """Return the tensors that are, by their names, the base model's embedding or output head.

    >>> carried(["base_model.model.lm_head.base_layer.weight", "base_model.model.q.weight"])
    [Carried(key='base_model.model.lm_head.base_layer.weight', module='lm_head', bias=False)]
    """
    found = ((key, _BASE.fullmatch(key)) for key in keys)
    return [
        Carried(key, one[1], one[3] == "bias")
        for key, one in found
        if one and ".lora_" not in key and is_vocabulary(one[1])
    ]


def taken(
    plan: Plan, names: Names, tensors: Mapping[str, np.ndarray], expected: Iterable[str]
) -> tuple[dict[str, np.ndarray], dict[str, Entry], dict[str, str]]:
    """Return the tensors without the base model's, those that differ as entries, and problems.

    A module that is not adapted gets a ``Full`` entry where the file's weight is not the model's.
    Where a pair belongs to the file's weight, the model needs that weight first. Problems are by
    path, or by key where the model has no such module.

    Args:
        plan: of the model, made from its parameters.
        names: the PyTorch module of a path.
        tensors: the file.
        expected: the names of the tensors that the plan means.
    """
    expected = set(expected)
    own = carried(key for key in tensors if key not in expected)
    if not own:
        return dict(tensors), {}, {}
    leaves = _leaves(plan, names)
    entries: dict[str, Entry] = {}
    problems: dict[str, str] = {}
    for one in own:
        tensor, leaf = tensors[one.key], leaves.get((one.module, one.bias))
        if leaf is None:
            if not any(_same(tensor, other) for other in _shared(plan, leaves, own, tensors)):
                problems[one.key] = (
                    f"{one.key}: unexpected: base weights of a module that the model has not, and "
                    "not those of an embedding that it shares"
                )
            continue
        problem, value = _in_model(leaf, one, tensor)
        if problem:
            problems[leaf.path] = problem
        elif _same(value, plan.given.get(leaf.path)):
            continue
        elif is_held(plan, leaf):
            problems[leaf.path] = _unlike(plan, leaf, one)
        else:
            entries[leaf.path] = Full(jnp.asarray(value))
    rest = {key: tensor for key, tensor in tensors.items() if key not in {one.key for one in own}}
    return rest, entries, problems


def put(plan: Plan, names: Names, tensors: Mapping[str, np.ndarray], params: Any) -> Any:
    """Return the parameters with the base model's weights of a file; see ``with_base_weights``.

    Raises:
        AdapterError: lists every one that has no place in the model.
    """
    leaves, given = _leaves(plan, names), paths.flatten(params)
    changed, problems = {}, []
    own = carried(tensors)
    for one in own:
        leaf, tensor = leaves.get((one.module, one.bias)), tensors[one.key]
        if leaf is None:
            others = _shared(plan, leaves, own, tensors)
            if not any(_same(tensor, other) for other in others):
                known = sorted({name for name, _ in leaves if is_vocabulary(name)})
                problems.append(
                    f"{one.key}: the model has no such module, its embeddings and output heads "
                    f"are {', '.join(known) or 'unknown by their names'}; give names=… if it is one"
                )
            continue
        problem, value = _in_model(leaf, one, tensor, resized=True)
        problems += [problem] if problem else []
        if value is not None:
            changed[leaf.path] = jnp.asarray(value, given[leaf.path].dtype)
    raise_all(AdapterError, "the file's base weights do not fit the model", problems)
    return paths.replace(params, changed)


def base_weights(config: LoraConfig, adapters: Adapters) -> dict[str, Full]:
    """Return the entries of an opened file that are the base model's, not trained ones."""
    return {
        name: one
        for name, one in adapters.items()
        if isinstance(one, Full)
        and is_vocabulary(paths.module_of(name))
        and not lora_config.is_saved(config, paths.module_of(name))
        and (config.bias == "none" or paths.leaf_name(name) not in paths.BIAS_NAMES)
    }


def _leaves(plan: Plan, names: Names) -> dict[tuple[str, bool], LeafPlan]:
    found = ((leaf, name_of(names, leaf.path)) for leaf in plan.leaves)
    return {
        (name, paths.leaf_name(leaf.path) in paths.BIAS_NAMES): leaf
        for leaf, name in found
        if name is not None
    }


def _shared(
    plan: Plan,
    leaves: Mapping[tuple[str, bool], LeafPlan],
    own: list[Carried],
    tensors: Mapping[str, np.ndarray],
) -> Iterator[Any]:
    """Yield what a head that the model has not may share: each embedding, as the file has it."""
    again = {(one.module, one.bias): tensors[one.key] for one in own}
    for key, leaf in leaves.items():
        if is_vocabulary(key[0]) and (leaf.tied or len(leaf.shape) == 2):
            yield again.get(key, plan.given.get(leaf.path))


def _in_model(
    leaf: LeafPlan, one: Carried, tensor: np.ndarray, *, resized: bool = False
) -> tuple[str, np.ndarray | None]:
    """Return what is wrong with a tensor for this leaf, or the leaf's value by it."""
    matrix = not one.bias and len(leaf.axes) == 2
    wanted = file_shape(leaf, whole=True) if matrix else leaf.shape
    grown = tensor.shape[1:] == wanted[1:]
    if tensor.shape != wanted and not (grown and resized):
        hint = "; " + _HINT if grown else ""
        return f"{one.key}: got {tensor.shape}, the model has {wanted}{hint}", None
    return "", tensor.transpose(np.argsort(file_axes(leaf, "value"))) if matrix else tensor


_HINT = (
    "the file carries the base weights of a model that was changed: plan with params = "
    "with_base_weights(directory, plan, params)"
)


def _unlike(plan: Plan, leaf: LeafPlan, one: Carried) -> str:
    if plan.given.get(leaf.path) is None:
        return (
            f"{one.key}: base weights, which cannot be compared: the plan was made from shapes, or "
            "its parameters are gone. Plan with the parameters"
        )
    return f"{one.key}: other values than {leaf.path} of the model has; {_HINT}"


def _same(value: Any, given: Any) -> bool:
    """Tell whether two are equal, one of them perhaps rounded to the dtype of the other."""
    if given is None or value is None or np.shape(given) != np.shape(value):
        return False
    one, other = np.asarray(value), np.asarray(given)
    if np.array_equal(one.astype(np.float32), other.astype(np.float32)):
        return True
    return np.array_equal(one.astype(other.dtype), other) or np.array_equal(
        other.astype(one.dtype), one
    )
