"""The one registry: what each primitive does to an adapted weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rule = Callable[..., Any]

RULES: dict[str, Rule] = {}


class Unsupported(Exception):
    """A rule's word that it cannot follow the weight here; the message says why."""


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Register the decorated function for these primitives, by their names in a jaxpr.

    It is called as ``rule(call, *operands)`` when an operand is a ``LoraWeight``. It returns
    what the primitive returns, one value or a list, or raises ``Unsupported``.
    """

    def register(function: Rule) -> Rule:
        for primitive in primitives:
            if primitive in RULES:
                raise ValueError(f"two rules for the primitive {primitive}")
            RULES[primitive] = function
        return function

    return register
