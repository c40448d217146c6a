"""PEFT's adapter files: pure encoding and decoding, and the directory on disk."""

from .checks import LoadReport
from .config_json import AdapterFile
from .files import (
    load_adapter_file,
    load_config,
    load_pretrained,
    save_pretrained,
    with_base_weights,
)
from .hub import model_card, push_to_hub
from .tensors import decode, encode
from .without_model import fitted, open_adapter, write_adapter

__all__ = [
    "AdapterFile",
    "LoadReport",
    "decode",
    "encode",
    "fitted",
    "load_adapter_file",
    "load_config",
    "load_pretrained",
    "model_card",
    "open_adapter",
    "push_to_hub",
    "save_pretrained",
    "with_base_weights",
    "write_adapter",
]
