"""The bugs of the mutation gate, each planted at the one home of what it breaks."""

from .bugs_in_learning import LEARNING
from .bugs_in_models import MODEL

MUTANTS = (*MODEL, *LEARNING)

__all__ = ["MUTANTS"]
