"""Initialisations that read the weight, the data or the gradient; see ``initialise``."""

from .eva_ranks import eva_ranks
from .initialise import initialise
from .relative import for_changed_base, relative_to

__all__ = ["eva_ranks", "for_changed_base", "initialise", "relative_to"]
