"""The rewriter: trace a function, plan its adapters, run its jaxpr with them.

One rule for each primitive, in the modules that are imported first.
"""

# Importing registers the rules.
from . import rules  # noqa: F401
from .frugality import Frugality, frugality
from .planning.leaf_plan import LeafPlan
from .planning.plan import Plan, plan
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
