"""One rule for each primitive that an adapted weight may meet; importing them registers them."""

from . import (
    calls,
    choices,
    complex_weights,
    derivatives,
    identities,
    lookups,
    products,
    repeats,
    shards,
    structure,
    sums,
)

__all__ = [
    "calls",
    "choices",
    "complex_weights",
    "derivatives",
    "identities",
    "lookups",
    "products",
    "repeats",
    "shards",
    "structure",
    "sums",
]
