"""PEFT's adapter files: pure encoding and decoding, and the directory on disk."""

from .config_json import AdapterFile
from .files import load_adapter_file, load_config, load_pretrained, save_pretrained
from .tensors import decode, encode

__all__ = [
    "AdapterFile",
    "decode",
    "encode",
    "load_adapter_file",
    "load_config",
    "load_pretrained",
    "save_pretrained",
]
