"""Reference models that read and write Hugging Face files.

The names are loaded when they are asked for: reading a file's header needs no model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bert import BertConfig, BertForSequenceClassification, BertModel
    from .huggingface import from_pretrained, load_params, model_files, save_model, to_state_dict
    from .planning import plan_model

__all__ = [
    "BertConfig",
    "BertForSequenceClassification",
    "BertModel",
    "from_pretrained",
    "load_params",
    "model_files",
    "plan_model",
    "save_model",
    "to_state_dict",
]


def __getattr__(name: str) -> Any:
    for module in ("bert", "huggingface", "planning") if name in __all__ else ():
        found = import_module(f".{module}", __name__)
        if hasattr(found, name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
