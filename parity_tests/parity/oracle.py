"""The names of ``lora_jax.parity`` that the tests use."""

from lora_jax.parity.suite.lora_oracle import Case, cond, evaluate, gain, refuse_vacuous, truth
from lora_jax.parity.verdicts import UNIT_ROUNDOFF, Vacuous, assert_within_rule, rel_l2, slope

__all__ = [
    "UNIT_ROUNDOFF",
    "Case",
    "Vacuous",
    "assert_within_rule",
    "cond",
    "evaluate",
    "gain",
    "refuse_vacuous",
    "rel_l2",
    "slope",
    "truth",
]
