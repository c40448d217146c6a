"""Products that read the same input, brought together so that they share one ``x·A``.

Query, key and value are such products, and the two ways into a gated MLP. Equations depend on
each other by their variables alone, so that those which a weight goes through on its way to a
product may run earlier than they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core

from ..core import lowrank
from ..core.adapter import IN, OUT, Adapter
from .weight import LoraWeight, adapter_at

# What a weight goes through on its way without meeting data.
_STRUCTURE = frozenset(
    "transpose reshape squeeze expand_dims broadcast_in_dim slice dynamic_slice copy copy_p "
    "convert_element_type stop_gradient neg name".split()
)
# What a layer does to an input before its product, and its siblings do as well.
_VIEWS = frozenset("reshape squeeze expand_dims copy copy_p convert_element_type".split())


@dataclass(frozen=True)
class Step:
    """An equation and its place in its jaxpr; at the first of several siblings all their places."""

    index: int
    eqn: core.JaxprEqn
    siblings: tuple[int, ...] = ()


def in_order(jaxpr: core.Jaxpr, weights: Iterable[Any]) -> list[Step]:
    """Return the jaxpr's equations in an order in which siblings follow each other.

    With several devices it is the author's order: the adapters may be sharded each in its own way.

    Args:
        jaxpr: whose equations are put in order.
        weights: the variables by which adapted weights come in.
    """
    families = _families(jaxpr, weights) if jax.device_count() == 1 else {}
    if not families:
        return as_written(jaxpr)
    order = _Order(jaxpr)
    for index in range(len(jaxpr.eqns)):
        order.add(index, families.get(index, ()))
    return order.steps


def as_written(jaxpr: core.Jaxpr, weights: Iterable[Any] = ()) -> list[Step]:
    """Return the jaxpr's equations in their author's order, each by itself."""
    return [Step(index, eqn) for index, eqn in enumerate(jaxpr.eqns)]


def share(
    products: Mapping[int, tuple[core.JaxprEqn, Any, Any]], ready: Callable[[LoraWeight], bool]
) -> dict[int, Any]:
    """Return ``x·A`` of those siblings that can share it, formed as one product.

    Args:
        products: the siblings by their places, each with its input and its weight.
        ready: tells whether a weight's adapter sees the input as it is.
    """
    found: dict[Any, dict[int, Adapter]] = {}
    for index, (eqn, _, weight) in products.items():
        if isinstance(weight, LoraWeight) and not weight.planning and ready(weight):
            adapter = adapter_at(weight, eqn.params["dimension_numbers"][0][1])
            # A weight that is used transposed has B for A, and a stack of them no one A.
            if _is_plain(eqn, adapter):
                found.setdefault(adapter.a.dtype, {})[index] = adapter
    hidden: dict[int, Any] = {}
    for adapters in (family for family in found.values() if len(family) > 1):
        eqn, x, _ = products[next(iter(adapters))]
        ((axis,), _), _ = eqn.params["dimension_numbers"]
        # Slices of one weight's outputs have one A.
        distinct = {id(adapter.a): adapter for adapter in adapters.values()}
        formed = lowrank.hiddens(x, list(distinct.values()), axis, eqn.params["precision"])
        of_a = dict(zip(distinct, formed, strict=True))
        hidden |= {index: of_a[id(adapter.a)] for index, adapter in adapters.items()}
    return hidden


def _is_plain(eqn: core.JaxprEqn, adapter: Adapter) -> bool:
    (_, (axis,)), _ = eqn.params["dimension_numbers"]
    others = adapter.axes[:axis] + adapter.axes[axis + 1 :]
    return adapter.axes[axis] == IN and set(others) == {OUT}


def _families(jaxpr: core.Jaxpr, weights: Iterable[Any]) -> dict[int, tuple[int, ...]]:
    """Return for each product that has siblings their places, its own among them."""
    followed, number = set(weights), {}
    families: dict[Hashable, list[int]] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        inputs = [v for v in eqn.invars if not isinstance(v, core.Literal)]
        name = eqn.primitive.name
        if name in _STRUCTURE and not followed.isdisjoint(inputs):
            followed.update(eqn.outvars)
        elif name in _VIEWS and len(inputs) == len(eqn.invars) == 1:
            # Such a view is known by its shape and dtype.
            seen: Any = eqn.outvars[0].aval
            number[eqn.outvars[0]] = (
                name,
                seen.shape,
                seen.dtype,
                number.get(inputs[0], inputs[0]),
            )
        elif name == "dot_general" and len(inputs) == 2 and inputs[1] in followed:
            x, (contract, batch) = inputs[0], eqn.params["dimension_numbers"]
            if x not in followed and len(contract[0]) == 1 and not batch[0]:
                key = (number.get(x, x), tuple(contract[0]), str(eqn.params["precision"]))
                families.setdefault(key, []).append(index)
    return {
        index: tuple(family) for family in families.values() if len(family) > 1 for index in family
    }


class _Order:
    """Equations one by one, those that a family needs before it."""

    def __init__(self, jaxpr: core.Jaxpr) -> None:
        self.eqns = jaxpr.eqns
        self.steps: list[Step] = []
        self.done: set[int] = set()
        self.maker = {var: n for n, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}

    def add(self, index: int, family: Sequence[int]) -> None:
        """Add an equation, and its family's where what these need can run before it."""
        if index in self.done:
            return
        together = []
        for member in family:
            if member not in self.done and (needed := self._needed(member)) is not None:
                for earlier in sorted(needed):
                    self._append(earlier)
                together.append(member)
        for member in together or [index]:
            self._append(member, tuple(together) if len(together) > 1 and member == index else ())

    def _needed(self, index: int) -> set[int] | None:
        """Return what must run before a product; None where that is more than structure."""
        needed: set[int] = set()
        rest = [index]
        while rest:
            for var in self.eqns[rest.pop()].invars:
                maker = None if isinstance(var, core.Literal) else self.maker.get(var)
                if maker is None or maker in self.done or maker in needed:
                    continue
                if self.eqns[maker].primitive.name not in _STRUCTURE | _VIEWS:
                    return None
                needed.add(maker)
                rest.append(maker)
        return needed

    def _append(self, index: int, siblings: tuple[int, ...] = ()) -> None:
        self.done.add(index)
        self.steps.append(Step(index, self.eqns[index], siblings))
