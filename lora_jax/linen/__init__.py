"""The Flax Linen front end: ``wrap`` for any module, and layers with a low-rank path."""

from ..core.serialization import tell_flax
from .layers import LoRADense, LoRADenseGeneral, adapters_of
from .wrap import wrap

__all__ = ["LoRADense", "LoRADenseGeneral", "adapters_of", "wrap"]

tell_flax()
