"""What the other side calls a module: patterns in a table, and tables of some families."""

from .naming import Fused, Table, stacked
from .tables import BART, BERT, CLIP, LLAMA, OPEN_CLIP, VIT, VIT_FLAX, WHISPER

__all__ = [
    "BART",
    "BERT",
    "CLIP",
    "LLAMA",
    "OPEN_CLIP",
    "VIT",
    "VIT_FLAX",
    "WHISPER",
    "Fused",
    "Table",
    "stacked",
]
