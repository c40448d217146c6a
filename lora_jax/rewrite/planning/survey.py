"""What planning finds out by running the function on shapes: the sites, and what has no rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ..interpret import Record, interpret
from ..origins import Alone
from ..sites import Site, formed
from ..trace import Traced
from ..transform import reject_outputs, run_adapted
from ..weight import enter, same_use
from .leaf_plan import LeafPlan
from .select import could_adapt


def survey(traced: Traced) -> Record:
    """Find every site of every parameter that could be a matmul weight."""
    record = Record(alone=Alone(traced))

    def run(*operands: Any) -> list[Any]:
        values = list(operands)
        for place, path in enumerate(traced.paths):
            if could_adapt(values[place]):
                values[place] = enter(path, values[place])
        outs = interpret(record, traced.closed, values)
        reject_outputs(record, [formed(record, out, (-1 - n,)) for n, out in enumerate(outs)])
        return []

    _on_shapes(run, traced)
    for path, sites in record.sites.items():
        first, *others = sites.values()
        if odd := [one.letters for one in others if not _fit(first, one)]:
            problem = f"used with axes {first.letters!r} and with axes {odd[0]!r}"
            record.rejected.setdefault(path, {})[()] = problem
    return record


def rehearse(traced: Traced, rows: Iterable[LeafPlan], record: Record) -> None:
    """Record what has no rule for these adapters, by running the call with their shapes.

    The survey follows weights without A and B. What only DoRA or aLoRA meet, weights whose uses
    differ, and what their letters could forbid is seen with them; other adapters need no second
    run.
    """
    rows = [
        replace(row, columns=None)
        for row in rows
        if row.dora
        or row.masked
        or record.met.get(row.path, set()) - _SURVEYED
        or len({s.letters for s in record.sites[row.path].values()}) > 1
    ]
    if not rows:
        return
    rehearsal = Record()

    def run(*operands: Any) -> list[Any]:
        adapters = {}
        for row in rows:
            a, b = jnp.zeros(row.a_shape), jnp.zeros(row.b_shape)
            magnitude = jnp.zeros(row.magnitude_shape) if row.dora else None
            bias = jnp.zeros(row.bias_shape) if row.biased else None
            adapters[row.path] = row.adapter(a, b, magnitude=magnitude, bias=bias)
        run_adapted(rehearsal, traced, operands, adapters)
        return []

    _on_shapes(run, traced)
    for path, found in rehearsal.rejected.items():
        record.rejected.setdefault(path, {}).update(found)


# What asks nothing of the letters of a weight with one use that the survey does not see.
_SURVEYED = frozenset(
    "dot_general transpose squeeze expand_dims convert_element_type copy copy_p name stop_gradient "
    "jit pjit closed_call checkpoint remat remat2 scan reshape slice conv_general_dilated".split()
)


def _on_shapes(run: Callable[..., Any], traced: Traced) -> None:
    with jax.disable_jit(False):
        jax.eval_shape(run, *traced.operands)


def _fit(one: Site, other: Site) -> bool:
    return same_use(one.letters, other.letters, one.window | other.window)
