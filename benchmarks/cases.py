"""Every case, by its name."""

from __future__ import annotations

from collections.abc import Mapping

from . import minilm_step
from .harness import Case

CASES: Mapping[str, Case] = {case.name: case for case in (minilm_step.CASE,)}
