"""LoRA and DoRA in PyTorch, written from the papers: the reference that ``lora_jax`` is held to."""

from .layers import A_INITS, SCALINGS, DoRALinear, LinearWithLoRA, LoRALayer, LoRAOptions
from .replace import freeze, replace_linear_with_lora, trainable_parameters

__all__ = [
    "A_INITS",
    "SCALINGS",
    "DoRALinear",
    "LinearWithLoRA",
    "LoRALayer",
    "LoRAOptions",
    "freeze",
    "replace_linear_with_lora",
    "trainable_parameters",
]
