"""LoRA for any JAX function, in PEFT's terms and files."""

from .adapters.arithmetic import add, rename, scale_by, subtract
from .adapters.combine import combination_error, combine
from .adapters.extract import extract, without_dora
from .adapters.inits import eva_ranks, for_changed_base, initialise, relative_to
from .adapters.merge import merge, merge_report
from .adapters.resize import resize
from .adapters.stack import Stacked, map_adapters, per_example, rescale, select, stack, unstack
from .core.adapter import Adapter, Adapters, Full, Rows
from .core.alora import alora_mask
from .core.config.lora_config import LoraConfig
from .core.errors import LoraError
from .peft import (
    load_config,
    load_pretrained,
    model_card,
    open_adapter,
    push_to_hub,
    save_pretrained,
    with_base_weights,
    write_adapter,
)
from .rewrite import Frugality, Plan, frugality, lora, plan

__version__ = "0.2.0"

__all__ = [
    "Adapter",
    "Adapters",
    "Frugality",
    "Full",
    "LoraConfig",
    "LoraError",
    "Plan",
    "Rows",
    "Stacked",
    "add",
    "alora_mask",
    "combination_error",
    "combine",
    "eva_ranks",
    "extract",
    "for_changed_base",
    "frugality",
    "initialise",
    "load_config",
    "load_pretrained",
    "lora",
    "map_adapters",
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
    "with_base_weights",
    "without_dora",
    "write_adapter",
]
