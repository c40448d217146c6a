"""``dot_general``, convolutions, ragged products: the sites, where a weight meets the data."""

from __future__ import annotations

from typing import Any

from ...core import contractions, delta, lowrank
from ...core.adapter import IN, OUT, STACKED
from ...core.xla import bf16_dot
from ..interpret import Call, base_of
from ..registry import Unsupported, rule
from ..weight import LoraWeight, adapter_at, bias_at, gain_at


@rule("dot_general")
def dot_general(call: Call, lhs: Any, rhs: Any) -> Any:
    """``x·W + s·(x·A)·B``, the axes read from ``dimension_numbers``, W on either side."""
    if isinstance(lhs, LoraWeight) and isinstance(rhs, LoraWeight):
        why = Unsupported("two adapted weights are multiplied with each other")
        if not lhs.planning:
            raise why
        # While planning every matrix is followed, and either may be the data of the other.
        call.reject_together(lhs, rhs, why)
        dot_general(call, lhs, rhs.base)
        return dot_general(call, lhs.base, rhs)
    weight_first = isinstance(lhs, LoraWeight)
    weight, x = (lhs, rhs) if weight_first else (rhs, lhs)
    contract, batch = call.params["dimension_numbers"]
    if weight_first:
        contract, batch = contract[::-1], batch[::-1]
    call.site(weight, contract[1], batch[1], stacks=True)
    y = _base_dot(call, base_of(lhs), base_of(rhs))
    if weight.planning:
        return y
    options = (contract, batch, weight_first, call.params["precision"])
    if weight.gain is not None:
        call.site(weight, contract[1], batch[1])
        return _dora_dot(call, y, x, weight, *options)
    biased = y
    if weight.bias is not None:
        bias, letters = bias_at(weight, contract[1], batch[1])
        place = _kept_places(weight, y, contract, batch, weight_first)
        biased = delta.biased(y, bias, letters, place)
    adapter = adapter_at(weight, contract[1], batch[1])
    if call.hidden is not None:
        return lowrank.add_raised(
            biased, call.hidden, adapter, x.dtype, call.params["precision"]
        ).astype(y.dtype)
    x, adapter = call.dropped(x, weight, adapter)
    x = call.activated(x, weight, (*contract[0], *batch[0]))
    if any(s == STACKED and axis not in batch[1] for axis, s in enumerate(adapter.axes)):
        return lowrank.add(biased, contractions.dot_of_stacks(x, adapter, *options)).astype(y.dtype)
    return call.record.product(biased, x, adapter, *options).astype(y.dtype)


def _base_dot(call: Call, lhs: Any, rhs: Any) -> Any:
    """Return the product as its author wrote it, or its equal that XLA does not widen."""
    result = call.eqn.outvars[0].aval.dtype  # pyright: ignore[reportAttributeAccessIssue]
    if bf16_dot.widens(call.params, lhs.dtype, rhs.dtype, result):
        return bf16_dot.dot(lhs, rhs, call.params["dimension_numbers"])
    return call.plain(lhs, rhs)


def _dora_dot(
    call: Call, y: Any, x: Any, weight: LoraWeight, contract: Any, batch: Any, *options: Any
) -> Any:
    """Return ``g·(x·W + s·(x·A)·B)``; where the out axes are summed over, g is a factor of x."""
    call.refuse_masked(weight)
    weight_first, _ = options

    def plain(x: Any) -> Any:
        operands = (weight.base, x) if weight_first else (x, weight.base)
        return _base_dot(call, *operands)

    def whole(y: Any, x: Any, adapter: Any) -> Any:
        return call.record.product(y, x, adapter, contract, batch, *options)

    adapter = adapter_at(weight, contract[1], batch[1])
    gain, letters = gain_at(weight, contract[1], batch[1])
    if letters[contract[1][0]] == OUT:
        call.refuse_dropout(weight)
        place = dict(zip([*contract[1], *batch[1]], [*contract[0], *batch[0]], strict=True))
        x = delta.gained(x, gain, letters, place)
        return whole(plain(x), x, adapter)
    place = _kept_places(weight, y, contract, batch, weight_first)
    kept, adapter = call.dropped(x, weight, adapter)
    if kept is x:
        return delta.gained(whole(y, x, adapter), gain, letters, place)
    # As in PEFT the base's own output stays; what DoRA adds to it is of the inputs kept.
    rest = plain(kept / (1 - weight.dropout))
    return y + delta.gained(whole(rest, kept, adapter), gain, letters, place) - rest


def _kept_places(
    weight: LoraWeight, y: Any, contract: Any, batch: Any, weight_first: bool
) -> dict[int, int]:
    """Return which axis of a ``dot_general``'s output each axis of the weight becomes."""
    free = [n for n in range(weight.base.ndim) if n not in {*contract[1], *batch[1]}]
    first = len(batch[1]) if weight_first else y.ndim - len(free)
    places = {axis: n for n, axis in enumerate(batch[1])}
    return places | {axis: first + n for n, axis in enumerate(free)}


@rule("conv_general_dilated")
def conv_general_dilated(call: Call, x: Any, kernel: Any) -> Any:
    """``x∗W + s·(x∗A)·B``: A takes window and input channels, B the output channels."""
    if isinstance(x, LoraWeight):
        raise Unsupported("the weight is what a convolution runs over")
    spec, groups = call.params["dimension_numbers"], call.params["feature_group_count"]
    if call.params["batch_group_count"] > 1:
        raise Unsupported("the batch is grouped, as in the gradient of a grouped convolution")
    # Used the other way round, the channels that are summed over are the adapter's out axis.
    window = spec.rhs_spec[2:]
    call.site(kernel, spec.rhs_spec[1:], window=window, groups=groups)
    y = call.plain(x, kernel.base)
    if kernel.planning:
        return y
    call.refuse_masked(kernel)
    adapter, gain = adapter_at(kernel, spec.rhs_spec[1:]), kernel.gain
    out, summed = spec.rhs_spec[:2]
    if gain is not None:
        call.refuse_dropout(kernel)
        if adapter.axes[out] == IN:
            x = delta.gained(x, gain, adapter.axes, {summed: spec.lhs_spec[1]})
            y = call.plain(x, kernel.base)
    if groups > 1 and adapter.axes[spec.rhs_spec[0]] != "o":
        raise Unsupported("a grouped kernel is used the other way round")
    biased = y
    if kernel.bias is not None:
        bias, letters = bias_at(kernel, spec.rhs_spec[1:])
        biased = delta.biased(y, bias, letters, {out: spec.out_spec[1]})
    x, adapter = call.dropped(x, kernel, adapter)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
    options = {name: call.params[name] for name in names}
    addend = contractions.conv(x, adapter, spec, groups, options)
    y = lowrank.add(biased, addend).astype(y.dtype)
    if gain is None or adapter.axes[out] == IN:
        return y
    return delta.gained(y, gain, adapter.axes, {out: spec.out_spec[1]})


@rule("ragged_dot_general")
def ragged_dot_general(call: Call, x: Any, weight: Any, group_sizes: Any) -> Any:
    """``x·W_g + s·(x·A_g)·B_g``, the rows of x sorted by their group g."""
    numbers = call.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    simple = isinstance(weight, LoraWeight) and len(groups) == 1 and len(contract[0]) == 1
    if not simple or batch[0] or getattr(base_of(x), "ndim", 0) != 2 or isinstance(x, LoraWeight):
        raise Unsupported("only rows sorted by group times one matrix for each group is supported")
    call.site(weight, contract[1], groups)
    y = call.plain(x, weight.base, group_sizes)
    if weight.planning:
        return y
    call.refuse_masked(weight)
    if weight.gain is not None:
        raise Unsupported("DoRA has no rule for groups of rows")
    biased = y
    if weight.bias is not None:
        biased = lowrank.add(
            y.astype(lowrank.wider(y.dtype, weight.bias.dtype)),
            contractions.by_group(weight.bias, group_sizes, y.shape[0]),
        )
    x, adapter = call.dropped(x, weight, adapter_at(weight, contract[1], groups))
    addend = contractions.ragged_dot(
        x,
        adapter,
        group_sizes,
        contract[0][0],
        contract[1][0],
        groups[0],
        call.params["precision"],
    )
    return lowrank.add(biased, addend).astype(y.dtype)
