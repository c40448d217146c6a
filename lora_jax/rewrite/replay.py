"""Evaluating the equations that no adapted weight reaches.

A model's layers repeat each other. JAX traces a jitted function once for all its calls, so
equations that are met again, of the same structure, become one function, inlined where it is
called. That makes tracing, and differentiating what was traced, several times cheaper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.core import Tracer
from jax.extend import core

from ..core.xla.trace_once import inlined


def evaluate(
    inside: core.Jaxpr,
    eqns: Sequence[core.JaxprEqn],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    values: Iterable[Any],
) -> list[Any]:
    """Return the values of ``outputs``, some of the variables that these equations define.

    Args:
        inside: the jaxpr that the equations are from.
        eqns: the equations, in order.
        inputs: what they read: variables, or literals, which are passed over.
        outputs: the variables asked for.
        values: of the inputs.
    """
    arguments = {
        var: value
        for var, value in zip(inputs, values, strict=True)
        if not isinstance(var, core.Literal)
    }

    def function() -> Callable[..., list[Any]]:
        part = inside.replace(
            constvars=(),
            invars=list(arguments),
            outvars=list(outputs),
            eqns=list(eqns),
            effects=frozenset().union(*(eqn.effects for eqn in eqns)),
        )
        return as_function(core.ClosedJaxpr(part, ()))

    # Without a tracer nothing is traced, and every operation is compiled by itself already.
    traced = any(isinstance(value, Tracer) for value in arguments.values())
    structure = _structure(eqns, tuple(arguments), outputs) if traced else None
    if structure is None:
        return function()(*arguments.values())
    return shared(structure).of(function)(*arguments.values())


# As JAX evaluates a jaxpr: one equation after the other.
as_function = core.jaxpr_as_fun


class _Shared:
    """One function for a structure from its second use on; the first is evaluated as it is."""

    def __init__(self) -> None:
        self.used = False
        self.function: Callable[..., list[Any]] | None = None

    def of(self, function: Callable[[], Callable[..., list[Any]]]) -> Callable[..., list[Any]]:
        if self.function is None and self.used:
            self.function = inlined(function())
        self.used = True
        return self.function or function()


@functools.lru_cache(maxsize=1024)
def shared(structure: Hashable) -> _Shared:
    """Return what every run of equations of this structure shares."""
    return _Shared()


def _structure(
    eqns: Sequence[core.JaxprEqn], inputs: Sequence[Any], outputs: Sequence[Any]
) -> Hashable | None:
    """Return what two runs of equations have in common when one may stand for the other."""
    number = {var: n for n, var in enumerate(inputs)}
    parts = []
    for eqn in eqns:
        if eqn.effects or not _is_closed(eqn):
            return None
        operands = [
            _literal(atom) if isinstance(atom, core.Literal) else number[atom]
            for atom in eqn.invars
        ]
        params = [(name, type(value), _exact(value)) for name, value in eqn.params.items()]
        scope = eqn.source_info.name_stack
        parts.append((eqn.primitive, *operands, *params, len(eqn.outvars), eqn.ctx, scope))
        for var in eqn.outvars:
            number[var] = len(number)
    structure = (tuple(parts), len(inputs), *(number[var] for var in outputs))
    try:
        hash(structure)
    except TypeError:
        return None
    return structure


def _is_closed(eqn: core.JaxprEqn) -> bool:
    """Tell whether the equation's parameters hold no jaxpr but that of a ``jit`` without consts.

    Other jaxprs are new in every tracing, so that none would be met again; consts may be large.
    """
    if eqn.primitive.name in ("jit", "pjit"):
        return not eqn.params["jaxpr"].consts
    return not any(True for _ in core.jaxprs_in_params(eqn.params))


def _literal(atom: Any) -> Hashable:
    # As bytes: 0.0 equals -0.0, and nan not even itself.
    return atom.aval, np.asarray(atom.val).tobytes()


def _exact(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value
