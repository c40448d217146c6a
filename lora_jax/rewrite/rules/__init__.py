"""One rule for each primitive that an adapted weight may meet; importing them registers them."""

from . import (
    calls,
    choices,
    derivatives,
    factors,
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
    "factors",
    "derivatives",
    "identities",
    "lookups",
    "products",
    "repeats",
    "shards",
    "structure",
    "sums",
]
