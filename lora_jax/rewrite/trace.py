"""Tracing any function of parameters to a jaxpr."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ..core import paths
from .signature import is_array


@dataclass(frozen=True)
class Traced:
    """A function as a jaxpr over the arrays among its arguments.

    Args:
        closed: the jaxpr; its first operands are the parameters in ``paths`` order.
        operands: the arrays among parameters and arguments.
        paths: the path of every parameter that is an array.
        rebuild: makes the function's output from the jaxpr's.
    """

    closed: core.ClosedJaxpr
    operands: list[Any]
    paths: tuple[str, ...]
    rebuild: Callable[[list[Any]], Any]


def trace(
    fn: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Traced:
    """Trace ``fn(params, *args, **kwargs)``.

    Only arrays are traced: a flag, a string or a number stays what it is, in and out.
    ``disable_jit`` is lifted for the tracing itself, since it would unroll every scan.
    """
    leaves, tree = jax.tree.flatten((params, args, dict(kwargs)))
    places = [n for n, leaf in enumerate(leaves) if is_array(leaf)]
    output: dict[str, Any] = {}

    def on_arrays(*arrays: Any) -> list[Any]:
        whole = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            whole[place] = array
        params, args, kwargs = jax.tree.unflatten(tree, whole)
        outs, output["tree"] = jax.tree.flatten(fn(params, *args, **kwargs))
        output["static"] = [None if is_array(out) else out for out in outs]
        return [out for out in outs if is_array(out)]

    operands = [canonical(leaves[n]) for n in places]
    with jax.disable_jit(False):
        closed = jax.make_jaxpr(on_arrays)(*operands)

    def rebuild(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        outs = [next(rest) if out is None else out for out in output["static"]]
        return jax.tree.unflatten(output["tree"], outs)

    names = tuple(path for path, leaf in paths.flatten(params).items() if is_array(leaf))
    return Traced(closed, operands, names, rebuild)


def canonical(value: Any) -> Any:
    """Return NumPy's arrays in the dtype that JAX traces them in, int32 for int64 by default."""
    return jnp.asarray(value) if isinstance(value, np.ndarray | np.generic) else value
