"""What the ``lora-jax`` subcommands on files do; each returns what is printed."""

from .combine import CombineOptions, combine_files
from .diff import DiffOptions, diff_files
from .inspect import InspectOptions, inspect_files
from .merge import merge_files

__all__ = [
    "CombineOptions",
    "DiffOptions",
    "InspectOptions",
    "combine_files",
    "diff_files",
    "inspect_files",
    "merge_files",
]
