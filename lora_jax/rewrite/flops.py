"""How many FLOPs a function has: XLA's figure, with what that leaves out or has too often."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(fn: Callable[..., Any], *operands: Any, notes: set[str] | None = None) -> int:
    """Return the FLOPs of ``fn(*operands)``, with every step of every scan.

    Args:
        fn: the function.
        *operands: arrays or ``jax.ShapeDtypeStruct``.
        notes: where to say what has been left out.

    >>> import jax.numpy as jnp
    >>> ten = lambda x: jax.lax.scan(lambda h, _: (h @ h, None), x, None, length=10)[0]
    >>> count(ten, jax.ShapeDtypeStruct((8, 8), jnp.float32)) // (2 * 8**3)
    10
    """
    traced = jax.jit(fn).trace(*operands)
    notes = set() if notes is None else notes
    return _flops(traced) + _uncounted(traced.jaxpr.jaxpr, notes)


def _uncounted(jaxpr: core.Jaxpr, notes: set[str]) -> int:
    """Return the FLOPs that XLA does not count: it counts a loop's body once."""
    flops = 0
    for eqn in _live(jaxpr):
        bodies = list(core.jaxprs_in_params(eqn.params))
        inner = [_uncounted(body, notes) for body in bodies]
        if eqn.primitive.name == "scan":
            length, unroll = eqn.params["length"], int(eqn.params["unroll"])
            counted = unroll + length % unroll if length >= unroll else length
            flops += (length - counted) * _once(bodies[0]) + length * inner[0]
        elif eqn.primitive.name in _RAGGED:
            flops += _RAGGED[eqn.primitive.name](eqn) - _once_of(eqn)
        elif eqn.primitive.name == "cond" and any(inner):
            once = [*map(_once, bodies)]
            flops += max(map(sum, zip(once, inner, strict=True))) - max(once)
        else:
            flops += sum(inner)
        notes |= _NOTES.get(eqn.primitive.name, set())
    return flops


_NOTES = {
    "cond": {"of a cond the dearest branch is counted"},
    "while": {"a while loop is counted as one step"},
}


def _live(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """Return the equations whose values are used: JAX lowers no others."""
    used, live = {id(atom) for atom in jaxpr.outvars}, []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(id(var) in used for var in eqn.outvars):
            used.update(map(id, eqn.invars))
            live.append(eqn)
    return live[::-1]


def _ragged(eqn: core.JaxprEqn) -> int:
    """Return ``2·m·k·n``: each row meets the matrix of its own group."""
    lhs, rhs = (atom.aval.shape for atom in eqn.invars[:2])  # pyright: ignore
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    groups = numbers.rhs_group_dimensions
    contract, batch = numbers.dot_dimension_numbers
    own = {*contract[1], *batch[1], *groups}
    return 2 * math.prod(lhs) * math.prod(n for axis, n in enumerate(rhs) if axis not in own)


# What the lowering for CPUs computes with every group's matrix, or mask.
_RAGGED = {"ragged_dot_general": _ragged}


def _once_of(eqn: core.JaxprEqn) -> int:
    operands = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]  # pyright: ignore
    return _flops(
        jax.jit(lambda *values: eqn.primitive.bind(*values, **eqn.params)).trace(*operands)
    )


def _once(body: core.Jaxpr) -> int:
    operands = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)  # pyright: ignore
        for v in (*body.constvars, *body.invars)
    ]

    def run(*values: Any) -> list[Any]:
        consts = len(body.constvars)
        return core.jaxpr_as_fun(core.ClosedJaxpr(body, values[:consts]))(*values[consts:])

    return _flops(jax.jit(run).trace(*operands))


def _flops(traced: Any) -> int:
    return round(traced.lower().cost_analysis().get("flops", 0))
