"""Every case, by its name."""

from __future__ import annotations

from collections.abc import Mapping

from . import decoder_step, minilm_step, rewrite_trace
from .harness import Case

CASES: Mapping[str, Case] = {
    case.name: case for case in (minilm_step.CASE, rewrite_trace.CASE, decoder_step.CASE)
}
