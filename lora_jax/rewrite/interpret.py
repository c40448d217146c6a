"""Running a jaxpr with ``LoraWeight`` values in it.

Equations that no adapted weight reaches run as they are. For the others the registry has one
rule each. What the rules meet is recorded: where a weight is used, and where it cannot be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.extend import core

from ..errors import PlanError, raise_all
from ..initializers import fold_in_path
from .registry import RULES, Unsupported
from .runs import evaluate
from .weight import LoraWeight, use

# Under `disable_jit` these are opened as well, so that execution really is op by op.
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "scan")


@dataclass(frozen=True)
class Site:
    """One use of a parameter by one primitive.

    Args:
        primitive: the primitive's name.
        letters: the letter that this use gives each axis of the parameter.
        dense_gradient: whether an author's derivative around it forms the full ``dW``.
        rows: how many vectors the weight meets here, in all steps of the loops around it.
    """

    primitive: str
    letters: str
    dense_gradient: bool = False
    rows: int = 0


@dataclass
class Record:
    """What one interpretation met, by the parameter's path and by the equation's identity.

    A loop body may be traced more than once; the identity keeps its sites from counting twice.
    ``dropout_key`` is the random key of this interpretation, None for no dropout; ``times`` is how
    often the loops around it run it.
    """

    sites: dict[str, dict[int, Site]] = field(default_factory=dict)
    rejected: dict[str, dict[int, str]] = field(default_factory=dict)
    keep_alive: list[Any] = field(default_factory=list)
    dropout_key: Any = None
    times: int = 1

    def raise_rejected(self) -> None:
        """Raise one ``PlanError`` with every use that has no rule."""
        raise_all(
            PlanError,
            "these targets are used in a way that has no rule",
            (f"{path}: {why}" for path, found in self.rejected.items() for why in found.values()),
        )


@dataclass(frozen=True)
class Call:
    """One equation that an adapted weight reaches, as its rule sees it."""

    record: Record
    inside: core.Jaxpr
    eqn: core.JaxprEqn
    dense_gradient: bool = False

    @property
    def params(self) -> Mapping[str, Any]:
        """The primitive's parameters."""
        return self.eqn.params

    @property
    def jaxpr(self) -> core.ClosedJaxpr:
        """The jaxpr inside a call-like equation."""
        inner = self.params.get("jaxpr", self.params.get("call_jaxpr"))
        return inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the primitive's one output."""
        return self.eqn.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]

    def site(self, weight: LoraWeight, contracted: Sequence[int], batch: Sequence[int]) -> None:
        """Record that this equation is a site of the weight, or raise ``Unsupported``."""
        letters = use(weight, contracted, batch)
        ends = {*contracted, *batch}
        kept = math.prod(n for axis, n in enumerate(weight.base.shape) if axis not in ends)
        rows = self.record.times * math.prod(self.out_shape) // max(kept, 1)
        site = Site(self.eqn.primitive.name, letters, self.dense_gradient, rows)
        self.record.sites.setdefault(weight.leaf.path, {})[id(self.eqn)] = site
        self.record.keep_alive.append(self.eqn)

    def dropout_key(self, weight: LoraWeight) -> Any:
        """Return the random key of this site, None where nothing is dropped."""
        key = self.record.dropout_key
        if key is None or not weight.leaf.dropout:
            return None
        number = list(self.record.sites[weight.leaf.path]).index(id(self.eqn))
        return jax.random.fold_in(fold_in_path(key, weight.leaf.path), number)

    def interpret(
        self,
        closed: core.ClosedJaxpr,
        *operands: Any,
        dense_gradient: bool = False,
        dropout_key: Any = None,
    ) -> list[Any]:
        """Run an inner jaxpr with the same record, a loop's step with a key of its own."""
        key = self.record.dropout_key if dropout_key is None else dropout_key
        dense_gradient |= self.dense_gradient
        turns = self.params["length"] if self.eqn.primitive.name == "scan" else 1
        record = replace(self.record, dropout_key=key, times=turns * self.record.times)
        return interpret(record, closed, operands, dense_gradient=dense_gradient)

    def plain(self, *operands: Any) -> Any:
        """Run the equation as its author wrote it, on arrays."""
        outs = evaluate(self.inside, [self.eqn], self.eqn.invars, self.eqn.outvars, operands)
        return outs if self.eqn.primitive.multiple_results else outs[0]


def interpret(
    record: Record,
    closed: core.ClosedJaxpr,
    operands: Sequence[Any],
    *,
    dense_gradient: bool = False,
) -> list[Any]:
    """Return the jaxpr's outputs for operands of which some are ``LoraWeight``."""
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env |= dict(zip(jaxpr.invars, operands, strict=True))
    last_use = _last_use(jaxpr)
    pending: list[core.JaxprEqn] = []

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    def run_pending(upto: int) -> None:
        if not pending:
            return
        defined = {var: None for eqn in pending for var in eqn.outvars}
        used = {v: None for eqn in pending for v in eqn.invars if not isinstance(v, core.Literal)}
        inputs = [var for var in used if var not in defined]
        outputs = [var for var in defined if last_use.get(var, -1) >= upto]
        outs = evaluate(jaxpr, pending, inputs, outputs, map(read, inputs))
        env.update(zip(outputs, outs, strict=True))
        pending.clear()

    opened = _CALLS if jax.config.jax_disable_jit else ()  # pyright: ignore[reportAttributeAccessIssue]
    weights = {var for var, value in env.items() if isinstance(value, LoraWeight)}
    for index, eqn in enumerate(jaxpr.eqns):
        reached = any(not isinstance(v, core.Literal) and v in weights for v in eqn.invars)
        if not reached and eqn.primitive.name not in opened:
            pending.append(eqn)
            continue
        run_pending(index)
        outs = _apply(Call(record, jaxpr, eqn, dense_gradient), [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
        weights |= {v for v, out in zip(eqn.outvars, outs, strict=True) if _is_weight(out)}
    run_pending(len(jaxpr.eqns))
    return [read(atom) for atom in jaxpr.outvars]


def base_of(value: Any) -> Any:
    """Return the frozen array of a ``LoraWeight``, anything else as it is."""
    return value.base if isinstance(value, LoraWeight) else value


def _apply(call: Call, operands: list[Any]) -> list[Any]:
    name = call.eqn.primitive.name
    try:
        if name not in RULES:
            raise Unsupported("there is no rule for it")
        outs = RULES[name](call, *operands)
    except Unsupported as why:
        for weight in filter(_is_weight, operands):
            rejected = call.record.rejected.setdefault(weight.leaf.path, {})
            rejected[id(call.eqn)] = f"{name} of shape {tuple(weight.base.shape)}: {why}"
        call.record.keep_alive.append(call.eqn)
        outs = call.plain(*map(base_of, operands))
    return list(outs) if call.eqn.primitive.multiple_results else [outs]


def _last_use(jaxpr: core.Jaxpr) -> dict[Any, int]:
    last: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        last |= {v: index for v in eqn.invars if not isinstance(v, core.Literal)}
    end = len(jaxpr.eqns)
    return last | {v: end for v in jaxpr.outvars if not isinstance(v, core.Literal)}


def _is_weight(value: Any) -> bool:
    return isinstance(value, LoraWeight)
