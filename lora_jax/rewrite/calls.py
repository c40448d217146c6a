"""Rules for functions inside the function: jit, remat, scan, and authors' own derivatives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..adapter import is_number
from . import weight as weights
from .interpret import Call, Record, base_of, interpret
from .registry import Unsupported, rule
from .weight import LoraWeight


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
    num_consts, num_carry = _scan_counts(call)
    consts = operands[:num_consts]
    init = list(operands[num_consts : num_consts + num_carry])
    xs = operands[num_consts + num_carry :]
    if any(isinstance(value, LoraWeight) for value in init):
        raise Unsupported("the weight is carried from step to step")

    key = call.record.dropout_key
    keys = None if key is None else jax.random.split(key, call.params["length"])

    def body(carry: list[Any], step: tuple[list[Any], Any]) -> tuple[list[Any], list[Any]]:
        slices, step_key = step
        steps = [
            weights.step(x, *part) if isinstance(x, LoraWeight) else part
            for x, part in zip(xs, slices, strict=True)
        ]
        outs = call.interpret(call.jaxpr, *consts, *carry, *steps, dropout_key=step_key)
        if any(isinstance(out, LoraWeight) for out in outs):
            raise Unsupported("the loop returns the weight")
        return outs[:num_carry], outs[num_carry:]

    parts = [weights.split(x) if isinstance(x, LoraWeight) else x for x in xs]
    options = {name: call.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, init, (parts, keys), **options)
    return [*carry, *ys]


@rule("custom_jvp_call")
def custom_jvp(call: Call, *operands: Any) -> list[Any]:
    """Keep the author's tangent rule: it sees ``W + s·A·B`` and its tangent ``s·(dA·B + A·dB)``."""
    _refuse_dropout(call, operands)

    @jax.custom_jvp
    def function(*operands: Any) -> list[Any]:
        return call.interpret(call.jaxpr, *operands, dense_gradient=True)

    @function.defjvp
    def tangent_rule(operands: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        smooth = [n for n, operand in enumerate(operands) if _is_inexact(operand)]
        dense = [_tangent(operands[n], tangents[n]) for n in smooth]

        def author(arrays: list[Any], tangents: list[Any]) -> Any:
            return jax.jvp(_in_places(call, operands, smooth), arrays, tangents)

        primals = [operands[n] for n in smooth]
        closed = jax.make_jaxpr(author)([*map(base_of, primals)], dense)
        outs = call.interpret(closed, *primals, *dense, dense_gradient=True)
        return outs[: len(outs) // 2], outs[len(outs) // 2 :]

    return function(*operands)


@rule("custom_vjp_call", "custom_vjp_call_jaxpr")
def custom_vjp(call: Call, *operands: Any) -> list[Any]:
    """Keep the author's cotangent rule: its ``dW`` gives ``dA = s·dW·Bᵀ`` and ``dB = s·Aᵀ·dW``."""
    _refuse_dropout(call, operands)

    @jax.custom_vjp
    def function(*operands: Any) -> list[Any]:
        return call.interpret(call.jaxpr, *operands, dense_gradient=True)

    def forward(*operands: Any) -> Any:
        smooth = [n for n, operand in enumerate(operands) if _is_inexact(operand)]

        def author(arrays: list[Any]) -> Any:
            return jax.vjp(_in_places(call, operands, smooth), *arrays)

        primals = [operands[n] for n in smooth]
        closed, shape = jax.make_jaxpr(author, return_shape=True)([*map(base_of, primals)])
        values = call.interpret(closed, *primals, dense_gradient=True)
        outs, pullback = jax.tree.unflatten(jax.tree.structure(shape), values)
        return outs, (pullback, operands)

    def backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
        pullback, operands = residuals
        leaves, tree = jax.tree.flatten(pullback, is_leaf=lambda x: isinstance(x, LoraWeight))
        closed = jax.make_jaxpr(lambda leaves, ct: jax.tree.unflatten(tree, leaves)(ct))(
            [*map(base_of, leaves)], cotangents
        )
        # The record of the forward pass is closed by now: what has no rule is raised at once.
        record = Record()
        dense = iter(interpret(record, closed, [*leaves, *cotangents]))
        record.raise_rejected()
        return tuple(
            _cotangent(operand, next(dense)) if _is_inexact(operand) else None
            for operand in operands
        )

    function.defvjp(forward, backward)
    return function(*operands)


def _scan_counts(call: Call) -> tuple[int, int]:
    """Return how many operands of a scan are constants and how many are carried."""
    if "ft_in" in call.params:  # since jax 0.12
        consts, carry, _ = map(len, call.params["ft_in"].unpack())
        return consts, carry
    return call.params["num_consts"], call.params["num_carry"]


def _refuse_dropout(call: Call, operands: tuple[Any, ...]) -> None:
    dropping = any(isinstance(value, LoraWeight) and value.leaf.dropout for value in operands)
    if dropping and call.record.dropout_key is not None:
        raise Unsupported("the author's derivative knows nothing of lora_dropout")


def _in_places(call: Call, operands: tuple[Any, ...], smooth: list[int]) -> Any:
    """Return the author's function of the inexact operands alone."""

    def function(*arrays: Any) -> Any:
        values = [*map(base_of, operands)]
        for place, array in zip(smooth, arrays, strict=True):
            values[place] = array
        return call.plain(*values)

    return function


def _tangent(weight: Any, tangent: Any) -> Any:
    if not isinstance(weight, LoraWeight) or weight.planning:
        return base_of(tangent)
    _, moved = jax.jvp(
        lambda a, b: weights.change(weight, a, b), (weight.a, weight.b), (tangent.a, tangent.b)
    )
    return tangent.base + moved.astype(tangent.base.dtype)


def _cotangent(weight: Any, cotangent: Any) -> Any:
    if not isinstance(weight, LoraWeight):
        return cotangent
    if weight.planning:
        return replace(weight, base=cotangent)
    change, pull = jax.vjp(lambda a, b: weights.change(weight, a, b), weight.a, weight.b)
    a, b = pull(cotangent.astype(change.dtype))
    scale = weight.scale if is_number(weight.scale) else jnp.zeros_like(weight.scale)
    return replace(weight, base=cotangent, a=a, b=b, scale=scale)


def _is_inexact(operand: Any) -> bool:
    return jnp.issubdtype(base_of(operand).dtype, jnp.inexact)
