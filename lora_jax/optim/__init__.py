"""Optimizers and losses made for LoRA."""

from .adam import adamw
from .losses import LossError, linear_cross_entropy
from .optimizers import freeze, lora_fa, loraplus, riemannian

__all__ = [
    "LossError",
    "adamw",
    "freeze",
    "linear_cross_entropy",
    "lora_fa",
    "loraplus",
    "riemannian",
]
