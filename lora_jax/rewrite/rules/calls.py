"""``jit``, ``checkpoint``, ``scan``, ``while``, ``cond``, ``shard_map``: functions inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.sharding import PartitionSpec

from ...core import sharding
from .. import passed_through
from .. import weight as weights
from ..interpret import Call
from ..passed_through import scan_counts
from ..registry import Unsupported, rule
from ..weight import LoraWeight
from . import shards


@rule("jit", "pjit", "closed_call", "core_call")
def jit(call: Call, *operands: Any) -> list[Any]:
    """Interpret the body under a ``jit`` of its own, with the same name."""

    def body(*operands: Any) -> list[Any]:
        return call.interpret(call.jaxpr, *operands)

    body.__name__ = body.__qualname__ = call.params.get("name", "call")
    return jax.jit(body, inline=call.params.get("inline", False))(*operands)


@rule("checkpoint", "remat", "remat2")
def remat(call: Call, *operands: Any) -> list[Any]:
    """Interpret the body under ``jax.checkpoint`` with the author's policy."""

    def body(*operands: Any) -> list[Any]:
        return call.interpret(call.jaxpr, *operands)

    options = {name: call.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(body, **options)(*operands)


@rule("scan")
def scan(call: Call, *operands: Any) -> list[Any]:
    """Scan over base, A and B together; a weight that is not scanned over is closed over."""
    num_consts, num_carry = scan_counts(call.eqn)
    consts, init = operands[:num_consts], operands[num_consts : num_consts + num_carry]
    xs = operands[num_consts + num_carry :]
    carry = _Carry(call.jaxpr.jaxpr, num_consts, init)
    passed = _Passed(passed_through.of_scan(call.eqn)[num_carry:], operands)

    key = call.record.dropout_key
    keys = None if key is None else jax.random.split(key, call.params["length"])

    def body(carried: list[Any], step: tuple[list[Any], Any]) -> tuple[list[Any], list[Any]]:
        slices, step_key = step
        steps = [
            weights.step(x, *part) if isinstance(x, LoraWeight) else part
            for x, part in zip(xs, slices, strict=True)
        ]
        whole = carry.whole(carried)
        outs = call.interpret(call.jaxpr, *consts, *whole, *steps, dropout_key=step_key)
        made = passed.made(outs[num_carry:], "the loop returns the weight")
        return carry.moving(outs[:num_carry]), made

    parts = [weights.split(x) if isinstance(x, LoraWeight) else x for x in xs]
    options = {name: call.params[name] for name in ("length", "reverse", "unroll")}
    carried, ys = lax.scan(body, carry.moving(init), (parts, keys), **options)
    return [*carry.whole(carried), *passed.whole(ys)]


@rule("while")
def while_(call: Call, *operands: Any) -> list[Any]:
    """Close over the weights of condition and body; carry what the loop changes."""
    cond_consts, body_consts = call.params["cond_nconsts"], call.params["body_nconsts"]
    for_cond, rest = operands[:cond_consts], operands[cond_consts:]
    for_body, init = rest[:body_consts], rest[body_consts:]
    carry = _Carry(call.params["body_jaxpr"].jaxpr, body_consts, init)

    def condition(state: tuple[Any, list[Any]]) -> Any:
        whole = carry.whole(state[1])
        return call.interpret(call.params["cond_jaxpr"], *for_cond, *whole)[0]

    def body(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        key, carried = state
        key, own = (None, None) if key is None else jax.random.split(key)
        inner, whole = call.params["body_jaxpr"], carry.whole(carried)
        outs = call.interpret(inner, *for_body, *whole, dropout_key=own, part=1)
        return key, carry.moving(outs)

    # The key of the next turn is carried along; None, and so nothing, without dropout.
    start = (call.record.dropout_key, carry.moving(init))
    return carry.whole(lax.while_loop(condition, body, start)[1])


@rule("cond")
def cond(call: Call, index: Any, *operands: Any) -> list[Any]:
    """Interpret every branch; the weights are closed over."""
    if isinstance(index, LoraWeight):
        raise Unsupported("the weight decides which branch is taken")
    moving = [None if isinstance(value, LoraWeight) else value for value in operands]
    passed = _Passed(passed_through.of_cond(call.eqn), (index, *operands))

    def branch(part: int, closed: core.ClosedJaxpr) -> Any:
        def run(moving: list[Any]) -> list[Any]:
            values = [
                value if isinstance(value, LoraWeight) else moved
                for value, moved in zip(operands, moving, strict=True)
            ]
            outs = call.interpret(closed, *values, part=part)
            return passed.made(outs, "a branch returns the weight")

        return run

    branches = [branch(part, closed) for part, closed in enumerate(call.params["branches"])]
    return passed.whole(lax.switch(index, branches, moving))


@rule("shard_map")
def shard_map(call: Call, *operands: Any) -> list[Any]:
    """Map over the shards of base, A and B; A and B are sharded as the weight's axes are."""
    specs = [
        weights.specs(value, spec) if isinstance(value, LoraWeight) else spec
        for value, spec in zip(operands, call.params["in_specs"], strict=True)
    ]
    # Inside, base, A and B have other shapes than the LoraWeight outside.
    parts = [
        _placed(value, spec, call.params["mesh"]) if isinstance(value, LoraWeight) else value
        for value, spec in zip(operands, specs, strict=True)
    ]
    passed = _Passed(passed_through.of_shard_map(call.eqn), operands)

    def body(*parts: Any) -> tuple[Any, ...]:
        key, *own = parts
        named = zip(operands, own, call.params["in_specs"], strict=True)
        local = [
            shards.local(value, part, spec) if isinstance(value, LoraWeight) else part
            for value, part, spec in named
        ]
        outs = call.interpret(call.jaxpr, *local, dropout_key=key)
        return tuple(passed.made(outs, "the shards' function returns the weight"))

    mapped = jax.shard_map(
        body,
        mesh=call.params["mesh"],
        in_specs=(PartitionSpec(), *specs),
        out_specs=tuple(passed.made(call.params["out_specs"], "")),
        axis_names=set(call.params["newly_manual_axes"]),
        check_vma=call.params["check_vma"],
    )
    # The key is an argument, as explicit meshes let nothing be closed over; None without dropout.
    return passed.whole(mapped(call.record.dropout_key, *parts))


def _placed(weight: LoraWeight, specs: Sequence[Any], mesh: Any) -> tuple[Any, ...]:
    """Return the arrays of a weight, A and B sharded as the shards' function takes them."""
    base, *rest = weights.parts(weight)
    named = zip(rest, specs[1:], strict=True)
    return base, *(None if x is None else sharding.placed(x, spec, mesh) for x, spec in named)


@dataclass(frozen=True)
class _Passed:
    """The outputs of a call that are weights which went into it, unchanged: not formed again."""

    places: passed_through.Places
    operands: Sequence[Any]

    @property
    def weights(self) -> dict[int, LoraWeight]:
        """The weights, by their place among the outputs."""
        found = {n: self.operands[k] for n, k in enumerate(self.places) if k is not None}
        return {n: value for n, value in found.items() if isinstance(value, LoraWeight)}

    def made(self, outs: Sequence[Any], why: str) -> list[Any]:
        """Return the other outputs, which must be arrays."""
        made = [out for n, out in enumerate(outs) if n not in self.weights]
        _refuse_weights(made, why)
        return made

    def whole(self, made: Sequence[Any]) -> list[Any]:
        """Return all outputs."""
        rest, weights = iter(made), self.weights
        return [weights[n] if n in weights else next(rest) for n in range(len(self.places))]


@dataclass(frozen=True)
class _Carry:
    """What a loop carries, and the weights among it that its body hands on unchanged.

    Such a weight is closed over instead; a body that changes one has no rule.
    """

    body: core.Jaxpr
    num_consts: int
    init: Sequence[Any]

    @property
    def fixed(self) -> dict[int, LoraWeight]:
        """The weights, by their place in the carry."""
        return {n: value for n, value in enumerate(self.init) if isinstance(value, LoraWeight)}

    def whole(self, moving: Sequence[Any]) -> list[Any]:
        """Return the carry with its weights."""
        rest = iter(moving)
        return [value if n in self.fixed else next(rest) for n, value in enumerate(self.init)]

    def moving(self, whole: Sequence[Any]) -> list[Any]:
        """Return the carry without its weights."""
        if self.fixed:
            same = passed_through.carried(self.body, self.num_consts, len(self.init))
            if not all(same[n] for n in self.fixed):
                raise Unsupported("the loop changes the weight from step to step")
        moving = [value for n, value in enumerate(whole) if n not in self.fixed]
        _refuse_weights(moving, "the loop's carry becomes the weight")
        return moving


def _refuse_weights(values: Sequence[Any], why: str) -> None:
    if any(isinstance(value, LoraWeight) for value in values):
        raise Unsupported(why)
