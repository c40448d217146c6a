"""Labelled texts to batches of one shape; every step a pure function."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from ..core.errors import AssetError, DataError, raise_all
from ..core.io import lfs_pointers
from ..core.io.intake import read_bytes
from ..models.packing import token_places
from .texts import first_rows, taken

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_ENCODED = 1024


@dataclass(frozen=True, eq=False)
class TextData:
    """Labelled texts: row i has ``texts[i]`` and the class ``classes[labels[i]]``."""

    texts: Sequence[str]
    labels: Int32[np.ndarray, "n"]
    classes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids of n texts, padded to one length, and 1 where there is a token."""

    input_ids: Int32[np.ndarray, "n t"]
    attention_mask: Int32[np.ndarray, "n t"]


class Batch(NamedTuple):
    """Rows of one training step; ``weights`` is 0 for the rows that only fill the batch.

    ``places`` says where the tokens are, see ``lora_jax.models.packing``; None computes padding
    too. A tuple, because ``jax.tree.map`` puts other things than arrays where the arrays are.
    """

    input_ids: Int32[Array | np.ndarray, "b t"]
    attention_mask: Int32[Array | np.ndarray, "b t"]
    labels: Int32[Array | np.ndarray, "b"]
    weights: Float32[Array | np.ndarray, "b"]
    places: Int32[Array | np.ndarray, "n"] | None = None

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What the model is called with."""
        places = () if self.places is None else (self.places,)
        return (self.input_ids, self.attention_mask, *places)


def drop_duplicates(data: TextData) -> TextData:
    """Keep the first row of every text.

    >>> data = TextData(("a", "b", "a"), np.array([0, 1, 1], np.int32), ("no", "yes"))
    >>> drop_duplicates(data).texts
    ('a', 'b')
    """
    return take(data, np.unique(first_rows(data.texts)))


def contradictions(data: TextData) -> int:
    """Return how many different texts are there with more than one label.

    >>> contradictions(TextData(("a", "b", "a"), np.array([0, 1, 1], np.int32), ("no", "yes")))
    1
    """
    first = first_rows(data.texts)
    return len(np.unique(first[data.labels != data.labels[first]]))


def take(data: TextData, rows: Int[np.ndarray, "m"]) -> TextData:
    """Return these rows, in this order."""
    return TextData(taken(data.texts, rows), data.labels[rows], data.classes)


def balance(data: TextData, seed: int) -> TextData:
    """Cut every class to the size of the smallest, at random; the order of rows stays.

    Raises:
        DataError: a class has no row at all.
    """
    counts = np.bincount(data.labels, minlength=len(data.classes))
    empty = [f"class {data.classes[i]!r}: got no rows" for i in np.flatnonzero(counts == 0)]
    raise_all(DataError, "the data cannot be balanced; drop the class or add rows", empty)
    rng = np.random.default_rng(seed)
    kept = [
        rng.choice(np.flatnonzero(data.labels == i), counts.min(), replace=False)
        for i in range(len(data.classes))
    ]
    return take(data, np.sort(np.concatenate(kept)))


def split(
    data: TextData, fractions: tuple[float, float, float] = (0.7, 0.1, 0.2), seed: int = 123
) -> tuple[TextData, TextData, TextData]:
    """Shuffle and cut into training, validation and test rows; the test part takes the rest.

    >>> data = TextData(tuple("abcdefghij"), np.arange(10, dtype=np.int32) % 2, ("no", "yes"))
    >>> [len(part.texts) for part in split(data)]
    [7, 1, 2]

    Raises:
        DataError: the fractions are not positive or do not sum to 1, or a part would be empty.
    """
    if min(fractions) <= 0 or not math.isclose(sum(fractions), 1):
        raise DataError(f"fractions: got {fractions}, wanted positive numbers that sum to 1")
    n = len(data.texts)
    # 0.29 * 100 is 28.999…: the half-millionth keeps whole products whole
    train, validation = math.floor(fractions[0] * n + 5e-7), math.floor(fractions[1] * n + 5e-7)
    sizes = (train, validation, n - train - validation)
    if min(sizes) < 1:
        raise DataError(
            f"rows: got {n}, which {fractions} splits into {sizes}, wanted at least one row in "
            "every part; add rows or choose other fractions"
        )
    order = np.random.default_rng(seed).permutation(n)
    first, second, third = np.split(order, [train, train + validation])
    return take(data, first), take(data, second), take(data, third)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Load ``tokenizer.json`` without the padding and truncation that the file may ship.

    Raises:
        AssetError: tokenizers is not installed, or the file is missing or broken.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise AssetError('tokenizers is not installed: pip install "lora_jax[train]"') from error
    path = Path(directory) / "tokenizer.json"
    lfs_pointers.refuse(path, AssetError)
    try:
        tokenizer = Tokenizer.from_str(read_bytes(path).decode("utf-8"))
    except OSError as error:
        raise AssetError(f"cannot read {path}: {error.strerror or error}") from error
    # The library raises bare Exception for a file that it cannot parse.
    except Exception as error:
        raise AssetError(f"{path} is not a tokenizer file: {error}. Download it again.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_length: int,
    *,
    pad_id: int | None = None,
    vocabulary: int | None = None,
) -> Tokens:
    """Turn texts into ids of ``max_length`` tokens each, special tokens included.

    Args:
        tokenizer: left as it is.
        texts: n texts; longer ones are truncated, shorter ones padded on the right.
        max_length: t, the width of the arrays.
        pad_id: the padding's id; that of the token ``[PAD]`` when not given.
        vocabulary: how many tokens the model knows; no id is too large when not given.

    Raises:
        DataError: ``max_length`` leaves no room for a text, there is no padding id, or the
            tokenizer cannot read a text.
        AssetError: lists every token beyond the vocabulary.
    """
    special = tokenizer.num_special_tokens_to_add(False)
    if max_length <= special:
        raise DataError(
            f"max_length: got {max_length}, wanted more than the {special} special tokens"
        )
    pad_id = tokenizer.token_to_id("[PAD]") if pad_id is None else pad_id
    if pad_id is None:
        raise DataError(
            "pad_id: the tokenizer has no [PAD] token; pass the pad_token_id of config.json"
        )
    own = type(tokenizer).from_str(tokenizer.to_str())
    own.enable_truncation(max_length)
    own.enable_padding(length=max_length, pad_id=pad_id)
    ids, mask = (np.empty((len(texts), max_length), np.int32) for _ in range(2))
    # The library's own objects take a hundred times as much: a part of them at a time.
    for start in range(0, len(texts), _ENCODED):
        encodings = _encoded(own, list(texts[start : start + _ENCODED]))
        rows = slice(start, start + len(encodings))
        ids[rows] = [one.ids for one in encodings]
        mask[rows] = [one.attention_mask for one in encodings]
    if vocabulary is not None:
        _refuse_strangers(own, ids, vocabulary)
    return Tokens(ids, mask)


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> list[Any]:
    try:
        return tokenizer.encode_batch(texts)
    # The library raises bare Exception, such as for a word where there is no [UNK].
    except Exception as error:
        raise DataError(f"the tokenizer cannot read these texts: {error}") from error


def _refuse_strangers(tokenizer: Tokenizer, ids: np.ndarray, vocabulary: int) -> None:
    """Raise where tokens have no row in the model's embedding: XLA would give NaN for them."""
    strange = np.unique(ids[(ids < 0) | (ids >= vocabulary)])
    raise_all(
        AssetError,
        f"the tokenizer does not belong to the model, whose vocabulary has {vocabulary} tokens",
        [f"{tokenizer.id_to_token(int(one))!r}: has the id {one}" for one in strange],
    )


def batches(
    tokens: Tokens,
    labels: Int32[np.ndarray, "n"] | None,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
) -> Iterator[Batch]:
    """Yield every row once, in batches of one shape but for their ``places``.

    The last batch is filled with repetitions of a real row that weigh 0, so that a compiled
    step fits every batch and nothing divides by an empty mask.

    Args:
        tokens: n rows.
        labels: the rows' classes; zeros when not given, as for prediction.
        batch_size: b, rows in a batch.
        seed: with ``epoch``, decides the order.
        epoch: see ``seed``.
        shuffle: whether the order is random.

    Raises:
        DataError: there are not as many labels as rows, or ``batch_size`` is below 1.
    """
    n = len(tokens.input_ids)
    labels = np.zeros(n, np.int32) if labels is None else labels
    if batch_size < 1 or len(labels) != n:
        raise DataError(
            f"batches: got {n} rows, {len(labels)} labels and batch_size {batch_size}, wanted as "
            "many labels as rows and a batch_size of at least 1"
        )
    order = np.random.default_rng((seed, epoch)).permutation(n) if shuffle else np.arange(n)
    return _batches(tokens, labels, order, batch_size)


def _batches(
    tokens: Tokens, labels: np.ndarray, order: np.ndarray, batch_size: int
) -> Iterator[Batch]:
    for start in range(0, len(order), batch_size):
        real = order[start : start + batch_size]
        rows = np.resize(real, batch_size) if len(real) < batch_size else real
        weights = (np.arange(batch_size) < len(real)).astype(np.float32)
        mask = tokens.attention_mask[rows]
        yield Batch(tokens.input_ids[rows], mask, labels[rows], weights, token_places(mask))
