"""A JAX function with its sums in another order: what rounding alone may change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core


def reordered(fn: Callable[..., Any], seed: int = 0) -> Callable[..., Any]:
    """Return ``fn`` with both operands of every matrix product permuted along what it sums over.

    The mathematics are the same, so every difference is rounding. Apply it outside of
    ``jax.grad``, so that the products of the gradient are reordered as well.

    Args:
        fn: any JAX function of arrays and pytrees of them.
        seed: of the permutations; each product has its own.

    >>> import jax.numpy as jnp
    >>> x, w = jnp.linspace(0, 1, 300).reshape(3, 100), jnp.linspace(-1, 1, 100)
    >>> apart = jnp.dot(x, w) - reordered(jnp.dot)(x, w)
    >>> bool((abs(apart) < 1e-5).all())
    True
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        outs = _evaluate(np.random.default_rng(seed), closed, *jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return run


def _evaluate(rng: np.random.Generator, closed: core.ClosedJaxpr, *args: Any) -> list[Any]:
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env |= dict(zip(closed.jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in closed.jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name == "dot_general":
            operands = _permuted(rng, operands, eqn.params["dimension_numbers"][0])
        params = {name: _inner(rng, value) for name, value in eqn.params.items()}
        outs = _run(closed.jaxpr, eqn.replace(params=params), operands)
        env |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _run(inside: core.Jaxpr, eqn: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Return the results of one equation of a jaxpr, run as JAX runs it."""
    arguments = {
        var: value
        for var, value in zip(eqn.invars, operands, strict=True)
        if not isinstance(var, core.Literal)
    }
    alone = inside.replace(
        constvars=(),
        invars=list(arguments),
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*arguments.values())


def _inner(rng: np.random.Generator, value: Any) -> Any:
    """Return a parameter of an equation with the jaxprs in it reordered."""
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)([_inner(rng, one) for one in value])
    if isinstance(value, core.Jaxpr):
        return _inner(rng, core.ClosedJaxpr(value, ())).jaxpr
    if not isinstance(value, core.ClosedJaxpr):
        return value
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in value.jaxpr.invars]  # pyright: ignore
    return jax.make_jaxpr(partial(_evaluate, rng, value))(*shapes)


def _permuted(
    rng: np.random.Generator, operands: Sequence[Any], contracted: Sequence[Sequence[int]]
) -> list[Any]:
    lhs, rhs = operands
    for left, right in zip(*contracted, strict=True):
        size = lhs.shape[left]
        start, stride = int(rng.integers(size)), int(rng.integers(2, 8))
        lhs, rhs = _dealt(lhs, left, start, stride), _dealt(rhs, right, start, stride)
    return [lhs, rhs]


def _dealt(array: Any, axis: int, start: int, stride: int) -> Any:
    """Return the array rotated along an axis and dealt out like cards.

    An index array would do as well, but it is a constant, and an inner jaxpr may hold none.
    """
    size = array.shape[axis]
    cut = partial(lax.slice_in_dim, axis=axis)
    rotated = lax.concatenate([cut(array, start, size), cut(array, 0, start)], axis)
    hands = [cut(rotated, n, size, stride) for n in range(min(stride, size))]
    return lax.rev(lax.concatenate(hands, axis), (axis,))
