"""The standard suite: ``lora_jax`` against its PyTorch reference and PEFT, in levels 0 to 6."""

from .dropout import CHECKS as DROPOUT
from .kind_checks import CHECKS as KINDS
from .layers import CHECKS as LAYERS
from .losses import CHECKS as LOSSES
from .merging import CHECKS as MERGING
from .models import CHECKS as MODELS
from .steps import CHECKS as STEPS
from .steps import TRAJECTORIES

CHECKS = (*LAYERS, *KINDS, *DROPOUT, *LOSSES, *MODELS, *STEPS, *MERGING)

__all__ = ["CHECKS", "TRAJECTORIES"]
