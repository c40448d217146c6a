"""Initialisations that read the weight, the data or the gradient; see ``initialise``."""

from .initialise import initialise
from .relative import relative_to

__all__ = ["initialise", "relative_to"]
