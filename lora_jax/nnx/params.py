"""The variables that LoRA trains, and the filter of those that it does not."""

from __future__ import annotations

from flax import nnx


class LoRAParam(nnx.LoRAParam):
    """A or B: what LoRA trains; a subclass of Flax's own, so that its filters select it, too."""


BaseParam = nnx.All(nnx.Param, nnx.Not(LoRAParam))
"""The filter of the base model's parameters: Flax counts A and B among ``nnx.Param``."""
