"""What a function's values are made of: the data, or parameters and constants alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from .passed_through import scan_counts
from .trace import Traced

Made = frozenset[str] | None
"""The matrices that a value is made of; None for what depends on the data."""

_PRODUCTS = (
    "dot_general conv_general_dilated ragged_dot ragged_dot_general scaled_matmul pallas_call "
    "ffi_call custom_call pure_callback".split()
)
# What reads one operand at a place that the others say.
_LOOKUPS = ("dynamic_slice", "dynamic_update_slice")


@dataclass
class Seen:
    """What a walk through a function has met.

    Args:
        in_products: the matrices that alone make one side of a product with the data.
        alone: the variables whose value is made of parameters and constants alone.
        mixed: those whose value is not, in at least one of the calls of their function.
    """

    in_products: set[str] = field(default_factory=set)
    alone: set[Any] = field(default_factory=set)
    mixed: set[Any] = field(default_factory=set)


def walk(traced: Traced) -> Seen:
    """Walk through a function once."""
    found = Seen()
    made: list[Made | str] = []
    for n, operand in enumerate(traced.operands):
        if n < len(traced.paths):
            matrix = operand.ndim >= 2 and operand.dtype != jnp.bool_
            made.append(frozenset({traced.paths[n]} if matrix else ()))
        else:
            made.append(frozenset() if _is_key(operand) else _GIVEN)
    _follow(traced.closed.jaxpr, made, found)
    return found


@dataclass(frozen=True)
class Alone:
    """Tells, of a variable or literal, whether it is made of parameters and constants alone."""

    traced: Traced

    @functools.cached_property
    def seen(self) -> Seen:
        """The walk, made when it is first asked for."""
        return walk(self.traced)

    def __call__(self, atom: Any) -> bool:
        """Tell it of one."""
        literal = isinstance(atom, core.Literal)
        return literal or (atom in self.seen.alone and atom not in self.seen.mixed)


# An argument as it came. It is data; but one of a weight's own shape that multiplies it, or that
# chooses among its values, is a mask.
_GIVEN = "given"


def _follow(jaxpr: core.Jaxpr, operands: Sequence[Any], found: Seen) -> list[Any]:
    """Return what each output is made of, and add to ``found`` what is met."""
    env: dict[Any, Any] = dict.fromkeys(jaxpr.constvars, frozenset())
    env |= dict(zip(jaxpr.invars, operands, strict=True))
    for eqn in jaxpr.eqns:
        made = [_of(env, atom) for atom in eqn.invars]
        follow = _CALLS.get(eqn.primitive.name, _plain)
        outs = follow(eqn, made, found)
        env |= {var: _narrowed(var, out) for var, out in zip(eqn.outvars, outs, strict=True)}
    for var, made in env.items():
        (found.alone if isinstance(made, frozenset) else found.mixed).add(var)
    return [_of(env, atom) for atom in jaxpr.outvars]


def _of(env: Mapping[Any, Any], atom: Any) -> Any:
    return frozenset() if isinstance(atom, core.Literal) else env[atom]


def _narrowed(var: Any, made: Any) -> Any:
    """Return what a value is made of; one without two axes, or of truth values, is no matrix."""
    matrix = getattr(var.aval, "ndim", 0) >= 2 and var.aval.dtype != jnp.bool_
    return made if matrix or not isinstance(made, frozenset) else frozenset()


def _plain(eqn: core.JaxprEqn, made: Sequence[Any], found: Seen) -> list[Any]:
    name, outs = eqn.primitive.name, len(eqn.outvars)
    if name in _PRODUCTS:
        data = [not isinstance(one, frozenset) for one in made]
        if any(data):
            found.in_products.update(*(one for one in made if isinstance(one, frozenset)))
        return [None if any(data) else frozenset()] * outs
    if name in _LOOKUPS and isinstance(made[0], frozenset):
        made = [one for one in made if isinstance(one, frozenset)]
    if name == "gather" and isinstance(made[1], frozenset):
        made = made[:1]
    if name == "convert_element_type":
        return list(made)
    if name in ("mul", "select_n"):
        shapes = [_shape(atom) for atom in eqn.invars]
        matrices = [
            s for s, one in zip(shapes, made, strict=True) if isinstance(one, frozenset) and one
        ]
        made = [
            frozenset() if one is _GIVEN and s in matrices else one
            for s, one in zip(shapes, made, strict=True)
        ]
    if not all(isinstance(one, frozenset) for one in made):
        return [None] * outs
    return [frozenset().union(*made)] * outs


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def _call(eqn: core.JaxprEqn, made: Sequence[Any], found: Seen) -> list[Any]:
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return _follow(_jaxpr(inner), made, found)


def _cond(eqn: core.JaxprEqn, made: Sequence[Any], found: Seen) -> list[Any]:
    branches = [_follow(_jaxpr(one), made[1:], found) for one in eqn.params["branches"]]
    return [functools.reduce(_joined, several) for several in zip(*branches, strict=True)]


def _scan(eqn: core.JaxprEqn, made: Sequence[Any], found: Seen) -> list[Any]:
    consts, carry = scan_counts(eqn)
    sides = made[:consts], made[consts : consts + carry], made[consts + carry :]
    return _turned(_jaxpr(eqn.params["jaxpr"]), *sides, found)


def _while(eqn: core.JaxprEqn, made: Sequence[Any], found: Seen) -> list[Any]:
    before, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    sides = made[before : before + consts], made[before + consts :], ()
    return _turned(_jaxpr(eqn.params["body_jaxpr"]), *sides, found)


def _turned(
    body: core.Jaxpr,
    consts: Sequence[Any],
    carry: Sequence[Any],
    xs: Sequence[Any],
    found: Seen,
) -> list[Any]:
    """Return what a loop's outputs are made of after as many turns as change anything."""
    carry = list(carry)
    inside = [
        _narrowed(var, one)
        for var, one in zip(body.invars[len(consts) + len(carry) :], xs, strict=True)
    ]
    while True:
        outs = _follow(body, [*consts, *carry, *inside], found)
        after = [_joined(one, two) for one, two in zip(carry, outs, strict=False)]
        if after == carry:
            return [*carry, *outs[len(carry) :]]
        carry = after


def _joined(one: Any, two: Any) -> Any:
    if isinstance(one, frozenset) and isinstance(two, frozenset):
        return one | two
    return one if one == two else None


_CALLS = {
    **dict.fromkeys(
        (
            "jit pjit closed_call core_call checkpoint remat remat2 custom_jvp_call "
            "custom_vjp_call custom_vjp_call_jaxpr shard_map"
        ).split(),
        _call,
    ),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}


def _jaxpr(inner: Any) -> core.Jaxpr:
    return inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner


def _is_key(value: Any) -> bool:
    new = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return new or (value.dtype == jnp.uint32 and value.shape[-1:] == (2,))
