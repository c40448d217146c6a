"""Losses over a vocabulary that never hold the logits of all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from ..core.errors import LoraError, raise_all
from ..core.lowrank import accumulation_dtype
from ..core.xla import bf16_slices

# Tokens at a time for a head's gradient, each sum of which reads and writes as much as the head.
_FEWEST = 64


class LossError(LoraError):
    """Arguments of a loss that do not fit each other."""


def linear_cross_entropy(
    hidden: Float[Array, "*tokens _"],
    head: Float[Array, "_ _"],
    labels: Int[Array, "..."],
    *,
    ignore_index: int = -100,
    label_smoothing: int | float = 0.0,
    chunk: int = 2048,
    transposed: bool = False,
) -> Float[Array, ""]:
    """Return the mean cross-entropy of ``softmax(hidden·head)`` at the labels.

    ``−Σᵢ Σᵥ tᵢᵥ·log softmax(hiddenᵢ·head)ᵥ / n`` over the n tokens that are not ignored, with
    ``t = (1 − ε)·onehot(label) + ε/vocabulary``. Logits exist for a part of the vocabulary at a
    time, accumulated in at least float32, as are the softmax and the loss.

    Differentiated, the forward pass sums each part's gradient beside its loss, so that nothing is
    computed twice, the head is read once, and what is kept has the size of ``hidden``: two products
    with the head in all. A third, and a gradient of the head's size, only where the head is
    differentiated, too. That is so as well where ``lora`` adapts the head: A and B get their
    gradients from the head's.

    Args:
        hidden: what enters the head.
        head: (width, vocabulary), or (vocabulary, width) where ``transposed``, as tied embeddings
            have it; of the dtype of ``hidden``.
        labels: of the shape of ``hidden`` without its last axis. The loss is NaN where one that
            is not ignored is outside the vocabulary, and where all are ignored.
        ignore_index: the label of tokens that do not count.
        label_smoothing: ε, from 0 to 1.
        chunk: how many columns of the vocabulary have logits at a time, at most; they are shared
            out evenly. Where the head is differentiated as many logits exist, of all columns and
            so of fewer tokens, but of 64 at least.
        transposed: the layout of ``head``.

    Raises:
        LossError: shapes or dtypes do not fit, or a number is out of range.

    Source: ``torch.nn.functional.cross_entropy`` of PyTorch 2.13 on the product, and for the
    running softmax arXiv 1805.02867, algorithm 3.

    >>> hidden, head = jnp.eye(3), jnp.zeros((3, 4))
    >>> linear_cross_entropy(hidden, head, jnp.array([1, 3, -100]), chunk=2).round(4)
    Array(1.3863, dtype=float32)
    """
    problems = [*_misfits(hidden, head, labels, transposed)]
    if not 0 <= label_smoothing <= 1:
        problems.append(f"label_smoothing: got {label_smoothing}, wanted 0 to 1")
    if chunk < 1:
        problems.append(f"chunk: got {chunk}, wanted 1 or more")
    raise_all(LossError, "linear_cross_entropy cannot be computed", problems)
    how = _How(ignore_index, float(label_smoothing), chunk, transposed)
    return _loss(how, hidden.reshape(-1, hidden.shape[-1]), head, labels.reshape(-1))


@dataclass(frozen=True)
class _How:
    ignore_index: int
    smoothing: float
    chunk: int
    transposed: bool

    def logits(self, x: Array, head: Array) -> Array:
        return _dot(x, head, (1, 1 if self.transposed else 0))

    def to_hidden(self, d: Array, head: Array) -> Array:
        return _dot(d, head, (1, 0 if self.transposed else 1))

    def to_head(self, x: Array, d: Array) -> Array:
        return _dot(d, x, (0, 0)) if self.transposed else _dot(x, d, (0, 0))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(how: _How, hidden: Array, head: Array, labels: Array) -> Array:
    return _forward(how, hidden, head, labels, of_hidden=False, of_head=False)[0]


def _remembering(how: _How, hidden: Any, head: Any, labels: Any) -> tuple[Array, Any]:
    return _forward(
        how,
        hidden.value,
        head.value,
        labels.value,
        of_hidden=hidden.perturbed,
        of_head=head.perturbed,
    )


def _gradients(how: _How, kept: Any, cotangent: Any) -> tuple[Any, Any, None]:
    if isinstance(cotangent, SymbolicZero):
        return None, None, None
    count, *sums = kept
    # Where no token counts the sums are zero.
    rate = cotangent / jnp.maximum(count, 1)

    def mean(total: Array | None) -> Array | None:
        return None if total is None else (total.astype(rate.dtype) * rate).astype(total.dtype)

    of_hidden, of_head = map(mean, sums)
    return of_hidden, of_head, None


# With symbolic zeros the forward pass is told which gradients are asked for.
_loss.defvjp(_remembering, _gradients, symbolic_zeros=True)


def _forward(
    how: _How, hidden: Array, head: Array, labels: Array, *, of_hidden: bool, of_head: bool
) -> tuple[Array, tuple[Array, Array | None, Array | None]]:
    """Return the mean; and the count, and what the sum's gradients are, where asked for."""
    if of_head:
        total, d_hidden, d_head = _by_tokens(how, hidden, head, labels, of_hidden=of_hidden)
    else:
        total, d_hidden = _by_vocabulary(how, hidden, head, labels, of_hidden=of_hidden)
        d_head = None
    count = jnp.sum(labels != how.ignore_index).astype(total.dtype)
    return total / count, (count, d_hidden, d_head)


def _by_vocabulary(
    how: _How, hidden: Array, head: Array, labels: Array, *, of_hidden: bool
) -> tuple[Array, Array | None]:
    """Return the sum of the losses and its gradient, from one pass over the head.

    ``Σᵥ exp(zᵥ − m)`` and ``Σᵥ exp(zᵥ − m)·headᵥ`` are summed along, m the largest logit so far; a
    larger one scales them down.
    """
    axis = 0 if how.transposed else 1
    vocabulary, wide = head.shape[axis], accumulation_dtype(hidden.dtype)
    chunks = max(-(-vocabulary // how.chunk), 1)
    size = max(-(-vocabulary // chunks), 1)

    def body(carry: tuple[Array, Array, Array | None], n: Array) -> Any:
        top, norm, mean = carry
        # The last part begins where a whole one still fits, among columns that were counted.
        start = jnp.minimum(n * size, vocabulary - size)
        part = bf16_slices.dynamic_slice_in_dim(head, start, size, axis)
        logits = how.logits(hidden, part)
        if vocabulary % size:
            new = start + lax.iota(n.dtype, size) >= n * size
            logits = jnp.where(new, logits, -jnp.inf)
        # The results are the same for any m.
        larger = lax.stop_gradient(jnp.maximum(top, jnp.max(logits, axis=-1)))
        powers, kept = jnp.exp(logits - larger[:, None]), jnp.exp(top - larger)
        norm = norm * kept + jnp.sum(powers, axis=-1)
        if mean is not None:
            mean = mean * kept[:, None] + how.to_hidden(powers.astype(hidden.dtype), part)
        return (larger, norm, mean), None

    tokens = hidden.shape[0]
    mean = jnp.zeros(hidden.shape, wide) if of_hidden else None
    start = jnp.full(tokens, -jnp.inf, wide), jnp.zeros(tokens, wide), mean
    (top, norm, mean), _ = lax.scan(body, start, jnp.arange(chunks))

    ignored, known = _kinds(how, labels, vocabulary)
    wanted = _wanted(how, head, labels)
    along = jnp.sum(hidden.astype(wide) * wanted, axis=-1)
    # An unknown label spoils its row; an ignored one may stand in a row of anything.
    weight = jnp.where(known, 1, jnp.nan).astype(wide)
    total = jnp.sum(jnp.where(ignored, 0, (top + jnp.log(norm) - along) * weight))
    if mean is None:
        return total, None
    d = (mean / norm[:, None] - wanted) * weight[:, None]
    return total, jnp.where(ignored[:, None], 0, d).astype(hidden.dtype)


def _wanted(how: _How, head: Array, labels: Array) -> Array:
    """Return ``Σᵥ tᵢᵥ·headᵥ``, (tokens, width)."""
    axis = 0 if how.transposed else 1
    wide = accumulation_dtype(head.dtype)
    columns = jnp.take(head, labels, axis=axis, mode="clip").astype(wide)
    columns = columns if how.transposed else columns.T
    if not how.smoothing:
        return columns
    mean = jnp.mean(head, axis=axis, dtype=wide)
    return (1 - how.smoothing) * columns + how.smoothing * mean


def _by_tokens(
    how: _How, hidden: Array, head: Array, labels: Array, *, of_hidden: bool
) -> tuple[Array, Array | None, Array]:
    """Return the sum of the losses and its gradients, from all logits of a few tokens at a time."""
    tokens, width = hidden.shape
    vocabulary = head.shape[0 if how.transposed else 1]
    at_a_time = max(how.chunk * tokens // max(vocabulary, 1), _FEWEST)
    chunks = max(-(-tokens // at_a_time), 1)
    size = -(-tokens // chunks)
    missing = chunks * size - tokens
    wide = accumulation_dtype(hidden.dtype)

    def body(carry: tuple[Array, Array], part: tuple[Array, Array]) -> Any:
        (total, d_head), (x, y) = carry, part
        losses, d = _chunk(how, how.logits(x, head), y)
        d = d.astype(x.dtype)
        d_hidden = how.to_hidden(d, head).astype(x.dtype) if of_hidden else None
        return (total + losses, d_head + how.to_head(x, d)), d_hidden

    rows = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(chunks, size, width)
    filled = jnp.pad(labels, (0, missing), constant_values=how.ignore_index)
    start = jnp.zeros((), wide), jnp.zeros(head.shape, wide)
    (total, d_head), d_rows = lax.scan(body, start, (rows, filled.reshape(chunks, size)))
    d_hidden = d_rows.reshape(-1, width)[:tokens] if of_hidden else None
    return total, d_hidden, d_head.astype(head.dtype)


def _chunk(how: _How, logits: Array, labels: Array) -> tuple[Array, Array]:
    """Return the sum of a chunk's losses, and its gradient by the logits."""
    vocabulary, even = logits.shape[-1], how.smoothing / logits.shape[-1]
    ignored, known = _kinds(how, labels, vocabulary)
    at = lax.broadcasted_iota(labels.dtype, logits.shape, 1) == labels[:, None]
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    powers = jnp.exp(shifted)
    norm = jnp.sum(powers, axis=-1, keepdims=True)
    chosen = jnp.sum(jnp.where(at, shifted, 0), axis=-1)
    losses = jnp.log(norm[:, 0]) - (1 - how.smoothing) * chosen
    if how.smoothing:
        losses -= even * jnp.sum(shifted, axis=-1)
    wanted = jnp.where(at, 1 - how.smoothing + even, even)
    weight = jnp.where(known, 1, jnp.nan).astype(logits.dtype)
    d = jnp.where(ignored[:, None], 0, (powers / norm - wanted) * weight[:, None])
    return jnp.sum(jnp.where(ignored, 0, losses * weight)), d


def _kinds(how: _How, labels: Array, vocabulary: int) -> tuple[Array, Array]:
    """Return which tokens do not count, and which of all have a label that there is."""
    ignored = labels == how.ignore_index
    return ignored, ignored | ((labels >= 0) & (labels < vocabulary))


def _dot(one: Array, two: Array, contracted: tuple[int, int]) -> Array:
    (first, second), wide = contracted, accumulation_dtype(one.dtype)
    numbers = (((first,), (second,)), ((), ()))
    return lax.dot_general(one, two, numbers, preferred_element_type=wide)


def _misfits(hidden: Any, head: Any, labels: Any, transposed: bool) -> list[str]:
    problems = []
    if hidden.ndim < 1 or head.ndim != 2:
        return [
            f"hidden has shape {hidden.shape} and head {head.shape}, wanted (…, width) and "
            f"{'(vocabulary, width)' if transposed else '(width, vocabulary)'}"
        ]
    width = head.shape[1 if transposed else 0]
    if hidden.shape[-1] != width:
        other = (
            ""
            if head.shape[0 if transposed else 1] != hidden.shape[-1]
            else (f"; with transposed={not transposed} it would fit")
        )
        problems.append(
            f"head of shape {head.shape} takes a width of {width}, hidden of shape "
            f"{hidden.shape} has {hidden.shape[-1]}{other}"
        )
    if labels.shape != hidden.shape[:-1]:
        problems.append(f"labels: got shape {labels.shape}, wanted {hidden.shape[:-1]}")
    if hidden.dtype != head.dtype:
        problems.append(f"head is {head.dtype} and hidden {hidden.dtype}: cast one to the other's")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        problems.append(f"labels: got {labels.dtype}, wanted integers")
    if not jnp.issubdtype(hidden.dtype, jnp.floating):
        problems.append(f"hidden: got {hidden.dtype}, wanted a floating dtype")
    return problems
