"""Computing the real tokens of a padded batch alone.

A layer that looks at one token at a time does the same work for padding as for tokens. Packing
takes the tokens out of ``(b, t)`` into ``n`` rows for those layers, and spreads them again where
attention needs them side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

NOWHERE = -1
QUARTERS = 4


def token_places(mask: Int[np.ndarray, "b t"]) -> Int32[np.ndarray, "n"]:
    """Return where the tokens are in the flattened ``(b, t)``, filled up with ``NOWHERE``.

    n is the next quarter of ``b·t``, so that a compiled step meets four shapes at most. A row
    without any token counts as full: its attention is uniform, as PyTorch's is.

    >>> token_places(np.array([[1, 1, 0, 0], [1, 0, 0, 0]])).tolist()
    [0, 1, 4, -1]
    """
    mask = np.where(np.any(mask, axis=1, keepdims=True), mask, 1)
    places = np.flatnonzero(mask)
    quarter = -(-mask.size // QUARTERS)
    n = min(mask.size, -(-places.size // quarter) * quarter)
    return np.pad(places, (0, n - places.size), constant_values=NOWHERE).astype(np.int32)


@dataclass(frozen=True)
class Packing:
    """How ``n`` packed rows and ``(b, t)`` tokens turn into each other.

    Args:
        shape: b and t.
        places: of each row in the flattened tokens, ``NOWHERE`` for a row that only fills.
        rows: of each flattened token among the rows, ``NOWHERE`` for padding.
    """

    shape: tuple[int, ...]
    places: Int[Array, "n"]
    rows: Int[Array, "bt"]

    def pack(self, x: Float[Array, "b t d"]) -> Float[Array, "n d"]:
        """Return the tokens' rows; those that only fill are zero."""
        return _move(x.reshape(-1, x.shape[-1]), self.places, self.rows)

    def spread(self, x: Float[Array, "n d"]) -> Float[Array, "b t d"]:
        """Return the rows in their places; padding is zero."""
        return _move(x, self.rows, self.places).reshape(*self.shape, -1)


@dataclass(frozen=True)
class Unpacked:
    """The same for a model that computes padding as well: nothing moves."""

    def pack(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return x."""
        return x

    def spread(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return x."""
        return x


def packing(
    shape: tuple[int, ...], places: Int[Array | np.ndarray, "n"] | None
) -> Packing | Unpacked:
    """Return the packing of a batch for what ``token_places`` returned; None computes padding."""
    if places is None:
        return Unpacked()
    places, size = jnp.asarray(places), shape[0] * shape[1]
    # A negative index would count from the end; one beyond the end is dropped.
    targets = jnp.where(places == NOWHERE, size, places)
    rows = jnp.full(size, NOWHERE, places.dtype)
    rows = rows.at[targets].set(jnp.arange(places.size, dtype=places.dtype), mode="drop")
    return Packing(shape, places, rows)


@jax.custom_vjp
def _move(
    x: Float[Array, "m d"], source: Int[Array, "n"], target: Int[Array, "m"]
) -> Float[Array, "n d"]:
    """Return ``y[i] = x[source[i]]``, zero where that is ``NOWHERE``; ``target`` is the way back.

    The gradient moves the same way back. Derived from the indexing it would be a scatter, which
    runs one row at a time on a CPU.
    """
    return jnp.where((source != NOWHERE)[:, None], x[source], jnp.zeros((), x.dtype))


_move.defvjp(
    lambda x, source, target: (_move(x, source, target), (source, target)),
    lambda places, ct: (_move(ct, places[1], places[0]), None, None),
)
