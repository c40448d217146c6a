"""What the ``lora-jax`` subcommands on files do; each returns what is printed."""

from .combine import CombineOptions, combine_files
from .convert import ConvertOptions, convert_files
from .diff import DiffOptions, diff_files
from .inspect import InspectOptions, inspect_files
from .merge import merge_files
from .parity import ParityOptions

__all__ = [
    "CombineOptions",
    "ConvertOptions",
    "DiffOptions",
    "InspectOptions",
    "ParityOptions",
    "combine_files",
    "convert_files",
    "diff_files",
    "inspect_files",
    "merge_files",
]
