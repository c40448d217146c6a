"""The Flax NNX front end: ``wrap`` for any model, and layers with a low-rank path."""

from ..serializing import tell_flax
from .layers import LoRALinear, LoRALinearGeneral, LoRAParam, adapters_of
from .wrap import LoRAModel, adapters, put, wrap

__all__ = [
    "LoRALinear",
    "LoRALinearGeneral",
    "LoRAModel",
    "LoRAParam",
    "adapters",
    "adapters_of",
    "put",
    "wrap",
]

tell_flax()
