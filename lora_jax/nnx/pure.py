"""An NNX call as a pure function of the model's parameters, which the rewriter takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from .entry import Method, bound
from .params import LoRAParam
from .state_updates import follow

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """One call of a model.

    Args:
        fn: ``fn(params, values, rest)`` returns the output and the variables that the call
            changes, by their numbers in ``changed``.
        params: the model's parameters.
        others: the values of all other variables, and the arguments that are no NNX objects.
        nodes: the model, and the NNX objects among the arguments.
        paths: of the other variables.
        graphs: the structure before the call, and once ``fn`` was traced, the one after it.
        changed: the paths of what the call changes, once ``fn`` was traced.
        order: all paths in the order of the last structure.
    """

    fn: Callable[..., tuple[Any, dict[str, Any]]]
    params: Any
    others: tuple[list[Any], list[Any]]
    nodes: Any
    paths: list[Path]
    graphs: list[nnx.GraphDef[Any]]
    changed: list[Path]
    order: list[Path]

    def update(self, values: Mapping[str, Any]) -> None:
        """Update the NNX objects with the values that ``fn`` returned.

        What did not change is left alone: a model whose call changes nothing may be called under
        any transform, as a closure, too.

        Raises:
            LoraError: the call adds modules, or changes the structure otherwise.
        """
        new = {path: values[str(n)] for n, path in enumerate(self.changed)}
        if self.graphs[-1] == self.graphs[0]:
            if new:
                nnx.update(self.nodes, nnx.from_flat_state(new))
            return
        held = dict(zip(self.paths, self.others[0], strict=True)) | _by_path(self.params)
        leaves = [new[path] if path in new else held[path] for path in self.order]
        # A copy, so that the variables of both are not the same.
        follow(self.nodes, nnx.unflatten(self.graphs[-1], leaves, copy_variables=True))


def pure(
    model: nnx.Module, method: Method, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Call:
    """Return a call of a model's method as a pure function."""
    given, tree = jax.tree.flatten((args, dict(kwargs)), is_leaf=_is_node)
    nodes = (model, {n: leaf for n, leaf in enumerate(given) if _is_node(leaf)})
    rest = [None if n in nodes[1] else leaf for n, leaf in enumerate(given)]
    # Flat: a State is no pytree where a list's numbers stand beside names, as in nnx.capture.
    graph, flat = nnx.flatten(nodes)
    first = [path for path, _ in flat]
    own = {path: value for path, value in flat if _is_param_of_model(path, value)}
    other = {path: value for path, value in flat if path not in own}
    paths, graphs, changed, order = list(other), [graph], [], list(first)

    def fn(params: Any, values: list[Any], rest: list[Any]) -> tuple[Any, dict[str, Any]]:
        held = dict(zip(paths, values, strict=True)) | _by_path(params)
        before = {path: jax.tree.flatten(value) for path, value in held.items()}
        leaves = [held[path] for path in first]
        model, others = nodes = nnx.unflatten(graph, leaves, copy_variables=True)
        whole = [others.get(n, leaf) for n, leaf in enumerate(rest)]
        args, kwargs = jax.tree.unflatten(tree, whole)
        out = bound(model, method)(*args, **kwargs)
        after, flat = nnx.flatten(nodes)
        new = {
            path: value
            for path, value in flat
            if path not in own
            and (path not in before or not _same(jax.tree.flatten(value), before[path]))
        }
        # The trace that comes last is the one whose values are returned.
        graphs[1:], changed[:], order[:] = [after], list(new), [path for path, _ in flat]
        return out, {str(n): value for n, value in enumerate(new.values())}

    params = nnx.from_flat_state({path[1:]: value for path, value in own.items()})
    return Call(fn, params, (list(other.values()), rest), nodes, paths, graphs, changed, order)


def _by_path(params: Mapping[Any, Any], above: Path = (0,)) -> dict[Path, Any]:
    """Return the model's parameters by their paths among all NNX objects of a call."""
    found = {}
    for key, value in params.items():
        inner = isinstance(value, nnx.State | dict)
        found |= _by_path(value, (*above, key)) if inner else {(*above, key): value}
    return found


def _same(one: tuple[list[Any], Any], other: tuple[list[Any], Any]) -> bool:
    """Tell whether two flattened values are the same objects, as what a call leaves alone is."""
    (ours, tree), (theirs, like) = one, other
    return tree == like and all(a is b for a, b in zip(ours, theirs, strict=True))


def _is_node(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def _is_param_of_model(path: Path, value: Any) -> bool:
    return path[0] == 0 and isinstance(value, nnx.Param) and not isinstance(value, LoRAParam)
