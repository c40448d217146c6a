"""The rewriter: trace a function, plan its adapters, run its jaxpr with them.

One rule for each primitive: ``structure``, ``complexes``, ``products``, ``calls``, ``derivatives``.
"""

from . import (  # noqa: F401  (importing registers the rules)
    calls,
    complexes,
    derivatives,
    products,
    structure,
)
from .frugality import Frugality, frugality
from .leaf import LeafPlan
from .plan import Plan, plan
from .registry import RULES, Unsupported, rule
from .transform import lora
from .weight import LoraWeight

__all__ = [
    "RULES",
    "Frugality",
    "LeafPlan",
    "LoraWeight",
    "Plan",
    "Unsupported",
    "frugality",
    "lora",
    "plan",
    "rule",
]
