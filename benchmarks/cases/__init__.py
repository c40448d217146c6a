"""Every case, by its name."""

from __future__ import annotations

from collections.abc import Mapping

from ..case import Case
from . import (
    decoder_step,
    files,
    growing,
    layers,
    many,
    merging,
    minilm_step,
    planning,
    rewrite_trace,
    serving,
    smollm,
)

MODULES = (
    minilm_step,
    layers,
    smollm,
    many,
    serving,
    merging,
    files,
    planning,
    rewrite_trace,
    decoder_step,
    growing,
)

CASES: Mapping[str, Case] = {case.name: case for module in MODULES for case in module.cases()}
