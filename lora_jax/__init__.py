"""LoRA for any JAX function, in PEFT's terms and files."""

from .adapter import Adapter, Adapters, Full
from .algebra import add, rename, scale_by, subtract
from .combining import combination_error, combine
from .compressing import resize
from .config import LoraConfig
from .errors import LoraError
from .extracting import extract
from .inits import initialise, relative_to
from .many import Stacked, per_example, rescale, select, stack, unstack
from .merging import merge, merge_report
from .peft import (
    load_config,
    load_pretrained,
    model_card,
    open_adapter,
    push_to_hub,
    save_pretrained,
    write_adapter,
)
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
    "add",
    "combination_error",
    "combine",
    "extract",
    "frugality",
    "initialise",
    "load_config",
    "load_pretrained",
    "lora",
    "merge",
    "merge_report",
    "model_card",
    "open_adapter",
    "per_example",
    "plan",
    "push_to_hub",
    "relative_to",
    "rename",
    "rescale",
    "resize",
    "save_pretrained",
    "scale_by",
    "select",
    "stack",
    "subtract",
    "unstack",
    "write_adapter",
]
