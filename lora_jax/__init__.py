"""LoRA for any JAX function, in PEFT's terms and files."""

from .adapter import Adapter, Adapters, Full
from .config import LoraConfig
from .errors import LoraError
from .merging import merge
from .rewrite import Plan, lora, plan

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Adapters",
    "Full",
    "LoraConfig",
    "LoraError",
    "Plan",
    "lora",
    "merge",
    "plan",
]
