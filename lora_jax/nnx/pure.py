"""An NNX call as a pure function of the model's parameters, which the rewriter takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from ..errors import LoraError


def pure(
    model: nnx.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, Callable[..., Any], Any, tuple[Any, Any]]:
    """Return the call's NNX objects, its pure function, the parameters and its other arguments.

    The function returns the call's output and all variables but the parameters.
    """
    leaves, tree = jax.tree.flatten((args, dict(kwargs)), is_leaf=_is_node)
    nodes = (model, {n: leaf for n, leaf in enumerate(leaves) if _is_node(leaf)})
    rest = [None if n in nodes[1] else leaf for n, leaf in enumerate(leaves)]
    graph, params, state = nnx.split(nodes, _is_param_of_model, ...)

    def fn(params: Any, state: Any, rest: list[Any]) -> tuple[Any, Any]:
        model, given = nodes = nnx.merge(graph, nnx.State({0: params}), state)
        whole = [given.get(n, leaf) for n, leaf in enumerate(rest)]
        args, kwargs = jax.tree.unflatten(tree, whole)
        out = model(*args, **kwargs)
        graph_after, _, after = nnx.split(nodes, _is_param_of_model, ...)
        if graph_after != graph:
            raise LoraError(
                "the call adds or removes variables of the model, or changes what is no variable; "
                "create them before, or adapt the function with lora_jax.lora"
            )
        return out, after

    return nodes, fn, params.get(0, nnx.State({})), (state, rest)


def _is_node(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def _is_param_of_model(path: tuple[Any, ...], value: Any) -> bool:
    return path[0] == 0 and isinstance(value, nnx.Param)
