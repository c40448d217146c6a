"""LoRA for any JAX function, in PEFT's terms and files."""

from .adapter import Adapter, Adapters, Full
from .config import LoraConfig
from .errors import LoraError
from .inits import initialise, relative_to
from .many import Stacked, per_example, rescale, select, stack, unstack
from .merging import merge
from .peft import load_config, load_pretrained, save_pretrained
from .rewrite import Frugality, Plan, frugality, lora, plan

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Adapters",
    "Frugality",
    "Full",
    "LoraConfig",
    "LoraError",
    "Plan",
    "Stacked",
    "frugality",
    "initialise",
    "load_config",
    "load_pretrained",
    "lora",
    "merge",
    "per_example",
    "plan",
    "relative_to",
    "rescale",
    "save_pretrained",
    "select",
    "stack",
    "unstack",
]
