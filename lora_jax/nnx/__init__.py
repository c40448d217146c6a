"""The Flax NNX front end: ``wrap`` for any model, and layers with a low-rank path."""

from ..core.serialization import tell_flax
from .layers import LoRALinear, LoRALinearGeneral, adapters_of
from .model import LoRAModel, adapters, put
from .params import BaseParam, LoRAParam
from .wrap import wrap

__all__ = [
    "BaseParam",
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
