"""Taps on JAX's side: marks in the traced function, where values and cotangents are read.

A mark is an identity with a name that stands in the jaxpr. So a function with marks is as pure as
one without, and no state exists that a compiled function could capture.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ...core import paths
from ...core.errors import ParityError, raise_all
from ...rewrite import replay
from ..sides import jax_side
from .marks import _mark_of, mark
from .taps import INPUT, MASK, OUTPUT, Calls, Place, Shape, largest

# The calls that a trace looks into. Elsewhere a mark runs a number of times that is not known, or
# has a derivative that its author wrote.
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"})

Visit = Callable[[Place, Any], Any]


def function(model: Any) -> Callable[..., Any]:
    """Return a model as a function of keywords whose modules are marked.

    Args:
        model: a Linen module, called with ``params`` and the arguments; an NNX module, called
            with its arguments, and with ``params`` where they are not its own; a PyTorch module,
            the same, which ``from_torch`` runs in JAX; or a function, which comes back as it is:
            Linen modules in it are marked while it is traced.
    """
    linen, nnx, torch = (sys.modules.get(name) for name in ("flax.linen", "flax.nnx", "torch"))
    if linen is not None and isinstance(model, linen.Module):
        return lambda params, **given: model.apply({"params": params}, **given)
    if nnx is not None and isinstance(model, nnx.Module):
        return _nnx_function(model)
    if torch is not None and isinstance(model, torch.nn.Module):
        from ...torch.from_torch import from_torch
        from .torch_taps import marked

        fn, own = from_torch(marked(model))
        return lambda params=own, **given: fn(params, **given)
    return model


def places(fn: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[Place, Shape]:
    """Return every marked place with the shape there, in the order of execution."""
    found: dict[Place, Shape] = {}

    def visit(place: Place, value: Any) -> Any:
        found[place] = tuple(value.shape)
        return value

    given = paths.replace(inputs, jax_side.leaves(inputs))
    jax.eval_shape(lambda given: _visited(fn, visit, given)[0], given)
    return found


def tapped(fn: Callable[..., Any], keys: Mapping[Place, str]) -> Callable[..., dict[str, Any]]:
    """Return ``fn`` with the values at these places among its outputs, by their keys.

    It takes for each key a keyword of zeros, added to the value there: the gradient with respect
    to it is the cotangent at the place.
    """

    def run(**given: Any) -> dict[str, Any]:
        zeros = {key: given.pop(key) for key in keys.values()}
        seen: dict[str, Any] = {}

        def visit(place: Place, value: Any) -> Any:
            key = keys.get(place)
            if key is None:
                return value
            # Values are looked at and do not join the loss.
            seen[key] = jax.lax.stop_gradient(_shown(value))
            return value + zeros[key].astype(value.dtype)

        out, shape = _visited(fn, visit, given)
        tree = jax.tree.unflatten(jax.tree.structure(shape), out)
        return {name or "y": leaf for name, leaf in paths.flatten(tree).items()} | seen

    return run


def _shown(value: Any) -> Any:
    far = jnp.abs(value) > largest(float(jnp.finfo(value.dtype).max))
    return jnp.where(far, jnp.sign(value) * MASK, value)


def _visited(
    fn: Callable[..., Any], visit: Visit, given: Mapping[str, Any]
) -> tuple[list[Any], Any]:
    """Run ``fn(**given)`` with every marked value passed through ``visit``."""
    # Without jit no function is left out because it was compiled before, and a scan is a loop.
    with _marking(), jax.disable_jit():
        closed, shape = jax.make_jaxpr(lambda given: fn(**given), return_shape=True)(given)
    raise_all(
        ParityError,
        "these taps cannot be read where they are; put them outside",
        dict.fromkeys(_unreachable(closed.jaxpr)),
    )
    calls = Calls()

    def see(name: str, kind: str, index: int, value: Any) -> Any:
        return visit(calls.place(name, kind, index), value)

    return _evaluate(closed, see, jax.tree.leaves(given)), shape


def _evaluate(
    closed: core.ClosedJaxpr, visit: Callable[..., Any], args: Sequence[Any]
) -> list[Any]:
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if found := _mark_of(eqn):
            outs = [visit(*found, *operands)]
        elif eqn.primitive.name in _CALLS and _holds_mark(eqn):
            inner = next(one for value in eqn.params.values() for one in _jaxprs(value))
            whole = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            outs = _evaluate(whole, visit, operands)
        else:
            outs = replay.evaluate(jaxpr, [eqn], eqn.invars, eqn.outvars, operands)
        env |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _jaxprs(value: Any) -> list[Any]:
    kinds = (core.Jaxpr, core.ClosedJaxpr)
    leaves = jax.tree.leaves(value, is_leaf=lambda one: isinstance(one, kinds))
    return [one for one in leaves if isinstance(one, kinds)]


def _inner(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in eqn.params.values():
        for one in _jaxprs(value):
            yield getattr(one, "jaxpr", one)


def _marks(jaxpr: core.Jaxpr) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        if found := _mark_of(eqn):
            yield found[0]
        for one in _inner(eqn):
            yield from _marks(one)


def _holds_mark(eqn: core.JaxprEqn) -> bool:
    return any(True for one in _inner(eqn) for _ in _marks(one))


def _unreachable(jaxpr: core.Jaxpr) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        for one in _inner(eqn):
            if eqn.primitive.name in _CALLS:
                yield from _unreachable(one)
            else:
                yield from (f"{name}: inside {eqn.primitive.name}" for name in _marks(one))


@contextmanager
def _marking() -> Iterator[None]:
    """Mark what enters and leaves the methods of Linen modules, where Linen is in use."""
    linen = sys.modules.get("flax.linen")
    if linen is None:
        yield
        return
    with linen.intercept_methods(_intercept):
        yield


def _intercept(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    method = context.method_name
    name = ".".join((*context.module.path, *([] if method == "__call__" else [method])))
    if not name or method == "setup":
        return run(*args, **kwargs)
    args, kwargs = mark(name, INPUT, (args, kwargs))
    return mark(name, OUTPUT, run(*args, **kwargs))


def _nnx_function(model: Any) -> Callable[..., Any]:
    from flax import nnx

    graph, own, others = nnx.split(model, nnx.Param, ...)

    def fn(params: Any = None, **given: Any) -> Any:
        state = jax.tree.map(lambda leaf: leaf, own)
        if params is not None:
            nnx.replace_by_pure_dict(state, params)
        # A model for this run alone, whose modules may become marked ones.
        fresh = nnx.merge(graph, state, others)
        for path, module in nnx.iter_modules(fresh):
            if path and callable(module):
                marked = _marked_class(type(module), ".".join(map(str, path)))
                object.__setattr__(module, "__class__", marked)
        return fresh(**given)

    return fn


@functools.cache
def _marked_class(kind: Any, name: str) -> Any:
    """Return a subclass whose calls are marked; an instance stays what it was otherwise."""
    from flax import nnx

    def is_node(value: Any) -> bool:
        return isinstance(value, nnx.Pytree | nnx.Variable)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = mark(name, INPUT, (args, kwargs), is_node)
        return mark(name, OUTPUT, kind.__call__(self, *args, **kwargs), is_node)

    return type(kind)(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
