"""Rules for structure: what moves a weight's axes without using its values."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from . import weight as weights
from .interpret import Call
from .registry import Unsupported, rule
from .weight import LoraWeight


@rule("transpose")
def transpose(call: Call, weight: LoraWeight) -> LoraWeight:
    """Permute the axes."""
    return weights.transpose(weight, call.params["permutation"])


@rule("reshape", "squeeze", "expand_dims")
def reshape(call: Call, weight: LoraWeight, *dynamic: Any) -> LoraWeight:
    """Split or merge whole axes, add or drop size-1 axes; ``squeeze`` is one of these."""
    if call.params.get("dimensions") is not None and call.eqn.primitive.name == "reshape":
        raise Unsupported("the reshape also permutes axes")
    return weights.reshape(weight, call.out_shape)


@rule("broadcast_in_dim")
def broadcast_in_dim(call: Call, weight: LoraWeight, *dynamic: Any) -> LoraWeight:
    """Add size-1 axes, which is how ``w[None]`` is traced."""
    shape = call.params["shape"]
    kept = [shape[axis] for axis in call.params["broadcast_dimensions"]]
    if kept != list(weight.base.shape) or weight.base.size != math.prod(call.out_shape):
        raise Unsupported("the weight is repeated")
    return weights.reshape(weight, shape)


@rule("convert_element_type")
def convert_element_type(call: Call, weight: LoraWeight) -> LoraWeight:
    """Change the base's dtype; A and B keep theirs."""
    dtype = call.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise Unsupported(f"the weight is converted to {dtype}")
    return weights.cast(weight, dtype)


@rule("copy", "copy_p")
def copy(call: Call, weight: LoraWeight) -> LoraWeight:
    """Nothing changes."""
    return weight
