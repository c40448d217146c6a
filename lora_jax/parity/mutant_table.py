"""The bugs of the mutation gate, each planted at the one home of what it breaks."""

from .mutants_learning import LEARNING
from .mutants_model import MODEL

MUTANTS = (*MODEL, *LEARNING)

__all__ = ["MUTANTS"]
