"""``tile``: a weight repeated along its own axes, as grouped-query attention does its heads."""

from __future__ import annotations

import jax.numpy as jnp

from .. import weight_moves
from ..interpret import Call
from ..registry import rule
from ..weight import LoraWeight


@rule("tile")
def tile(call: Call, weight: LoraWeight) -> LoraWeight:
    """Put copies of the weight one after the other; so many of each factor that has the axis."""
    reps = call.params["reps"]
    axes = [axis for axis, times in enumerate(reps) if times != 1]
    return weight_moves.cut(
        weight, lambda array, at, axis: jnp.concatenate([array] * reps[axis], at), axes
    )
