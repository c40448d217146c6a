"""PyTorch models as JAX functions, so that LoRA fits them under their own names."""

from .from_torch import from_torch

__all__ = ["from_torch"]
