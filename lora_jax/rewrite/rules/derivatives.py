"""``custom_jvp`` and ``custom_vjp``: functions with derivatives of their authors' own.

The author's rule is traced on arrays of the weight's shape and run on the factored weight. It is
asked for what is differentiated alone: constants that the function reads, flags, and arguments
that nothing trained reaches are for it what they are without adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from ...core import lowrank
from ...core.adapter import is_number
from ...core.errors import PlanError
from .. import weight as weights
from ..interpret import Call, Record, base_of, interpret
from ..registry import Unsupported, rule
from ..weight import LoraWeight


@rule("custom_jvp_call")
def custom_jvp(call: Call, *operands: Any) -> list[Any]:
    """Keep the author's tangent rule: it sees ``W + s·A·B`` and its tangent ``s·(dA·B + A·dB)``."""
    _refuse_what_authors_do_not_know(call, operands)
    closed_over = call.params.get("num_consts", 0)
    if any(isinstance(value, LoraWeight) for value in operands[:closed_over]):
        raise Unsupported("the author's derivative is not one of the weight, which is no argument")

    @jax.custom_jvp
    def function(*operands: Any) -> list[Any]:
        return call.interpret(call.jaxpr, *operands, dense_gradient=True)

    def tangent_rule(operands: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        smooth = [n for n, tangent in enumerate(tangents) if not _is_zero(tangent)]
        if smooth and smooth[0] < closed_over:
            raise PlanError(
                "a custom_jvp function closes over a value that depends on an adapter, which its "
                "derivative knows nothing of: make the value an argument of the function"
            )
        dense = [_tangent(operands[n], _filled(tangents[n])) for n in smooth]

        traced = _traced(operands, smooth)

        def author(arrays: dict[int, Any], tangents: list[Any]) -> Any:
            function = _of_smooth(call, operands, arrays, smooth)
            return jax.jvp(function, [arrays[n] for n in smooth], tangents)

        closed = jax.make_jaxpr(author)({n: base_of(operands[n]) for n in traced}, dense)
        values = [operands[n] for n in traced]
        outs = call.interpret(closed, *values, *dense, dense_gradient=True, part=1)
        return outs[: len(outs) // 2], outs[len(outs) // 2 :]

    function.defjvp(tangent_rule, symbolic_zeros=True)
    return function(*operands)


@rule("custom_vjp_call", "custom_vjp_call_jaxpr")
def custom_vjp(call: Call, *operands: Any) -> list[Any]:
    """Keep the author's cotangent rule: its ``dW`` gives ``dA = s·dW·Bᵀ`` and ``dB = s·Aᵀ·dW``."""
    _refuse_what_authors_do_not_know(call, operands)

    @jax.custom_vjp
    def function(*operands: Any) -> list[Any]:
        return call.interpret(call.jaxpr, *operands, dense_gradient=True)

    def forward(*arguments: Any) -> Any:
        operands, smooth = _differentiated(arguments)
        traced = _traced(operands, smooth)

        def author(arrays: dict[int, Any]) -> Any:
            function = _of_smooth(call, operands, arrays, smooth)
            return jax.vjp(function, *(arrays[n] for n in smooth))

        closed, shape = jax.make_jaxpr(author, return_shape=True)(
            {n: base_of(operands[n]) for n in traced}
        )
        values = [operands[n] for n in traced]
        values = call.interpret(closed, *values, dense_gradient=True, part=1)
        outs, pullback = jax.tree.unflatten(jax.tree.structure(shape), values)
        kept = [operand if n in smooth else None for n, operand in enumerate(operands)]
        return outs, (pullback, kept)

    def backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
        (pullback, operands), cotangents = residuals, _filled(cotangents)
        leaves, tree = jax.tree.flatten(pullback, is_leaf=lambda x: isinstance(x, LoraWeight))
        closed = jax.make_jaxpr(lambda leaves, ct: jax.tree.unflatten(tree, leaves)(ct))(
            [*map(base_of, leaves)], cotangents
        )
        # The record of the forward pass is closed by now: what has no rule is raised at once.
        record = Record()
        dense = iter(interpret(record, closed, [*leaves, *cotangents]))
        record.raise_rejected()
        return tuple(
            None if operand is None else _cotangent(operand, next(dense)) for operand in operands
        )

    function.defvjp(forward, backward, symbolic_zeros=True)
    return function(*operands)


def _refuse_what_authors_do_not_know(call: Call, operands: tuple[Any, ...]) -> None:
    adapted = [value for value in operands if isinstance(value, LoraWeight)]
    if call.record.dropout_key is not None and any(weight.dropout for weight in adapted):
        raise Unsupported("the author's derivative knows nothing of lora_dropout")
    if any(weight.masked for weight in adapted):
        raise Unsupported("the author's derivative knows nothing of aLoRA's mask")
    if any(weight.gain is not None for weight in adapted):
        raise Unsupported("the author's derivative knows nothing of DoRA")
    if any(weight.bias is not None for weight in adapted):
        raise Unsupported("the author's derivative knows nothing of lora_bias")


def _differentiated(arguments: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Return the operands of a forward rule, and the places of those that are differentiated.

    Args:
        arguments: the operands, with a ``CustomVJPPrimal`` for each array in them.
    """
    marked = [jax.tree.flatten(one, is_leaf=lambda x: hasattr(x, "perturbed")) for one in arguments]
    operands = [tree.unflatten([leaf.value for leaf in leaves]) for leaves, tree in marked]
    smooth = [n for n, (leaves, _) in enumerate(marked) if any(leaf.perturbed for leaf in leaves)]
    return operands, smooth


def _traced(operands: Sequence[Any], smooth: Sequence[int]) -> list[int]:
    """Return the places of what the author's rule is traced with: weights, and what is moved."""
    return [n for n, one in enumerate(operands) if n in smooth or isinstance(one, LoraWeight)]


def _of_smooth(
    call: Call, operands: Sequence[Any], arrays: Mapping[int, Any], smooth: Sequence[int]
) -> Callable[..., Any]:
    """Return the author's function of the differentiated operands alone.

    Args:
        call: the equation.
        operands: its operands.
        arrays: what stands for those that are traced, by their places.
        smooth: the places of those that are differentiated.
    """
    fixed = [arrays.get(n, one) for n, one in enumerate(operands)]

    def function(*moved: Any) -> Any:
        values = list(fixed)
        for place, array in zip(smooth, moved, strict=True):
            values[place] = array
        return call.plain(*values)

    return function


def _is_zero(tangent: Any) -> bool:
    """Tell whether nothing in a tangent is differentiated."""
    return all(isinstance(leaf, SymbolicZero) for leaf in _leaves(tangent))


def _filled(tangents: Any) -> Any:
    """Return tangents with zeros in the places of symbolic ones."""

    def zeros(leaf: Any) -> Any:
        if not isinstance(leaf, SymbolicZero):
            return leaf
        aval: Any = leaf
        if aval.dtype == jax.dtypes.float0:
            return np.zeros(aval.shape, aval.dtype)
        return jnp.zeros(aval.shape, aval.dtype)

    return jax.tree.map(zeros, tangents, is_leaf=lambda x: isinstance(x, SymbolicZero))


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, SymbolicZero))


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
    a, b = pull(lowrank.cast(cotangent, change.dtype))
    scale = weight.scale if is_number(weight.scale) else jnp.zeros_like(weight.scale)
    return replace(weight, base=cotangent, a=a, b=b, scale=scale)
