"""Many texts as one array of bytes: of a table's rows, no Python object each."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from jaxtyping import Int

_ENCODING = ("utf-8", "surrogatepass")
_DIGEST = 16
_AT_A_TIME = 4096


class Texts(Sequence[str]):
    """A sequence of texts, made anew whenever it is asked for one.

    >>> texts = Texts.of(["one", "", "three"])
    >>> texts[2], len(texts), texts == ("one", "", "three"), texts.take(np.array([2, 0]))
    ('three', 3, True, Texts('three', 'one'))
    """

    def __init__(
        self, content: bytearray, starts: Int[np.ndarray, "n"], ends: Int[np.ndarray, "n"]
    ) -> None:
        self.content, self.starts, self.ends = content, starts, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Return these texts."""
        content, ends = bytearray(), array("q", [0])
        for text in texts:
            content += encoded(text)
            ends.append(len(content))
        return cls.of_parts(content, ends)

    @classmethod
    def of_parts(cls, content: bytearray, ends: array[int]) -> Texts:
        """Return the texts that end at these places, the first of which is 0."""
        places = np.frombuffer(ends, np.int64)
        return cls(content, places[:-1], places[1:])

    def take(self, rows: Int[np.ndarray, "m"]) -> Texts:
        """Return those of these rows; the bytes are shared."""
        return Texts(self.content, self.starts[rows], self.ends[rows])

    def encoded(self) -> Iterator[bytes]:
        """Yield the bytes of each text."""
        for first in range(0, len(self), _AT_A_TIME):
            part = slice(first, first + _AT_A_TIME)
            for start, end in zip(
                self.starts[part].tolist(), self.ends[part].tolist(), strict=True
            ):
                yield bytes(self.content[start:end])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: int | slice) -> str | Texts:
        if isinstance(index, slice):
            return Texts(self.content, self.starts[index], self.ends[index])
        return self.content[self.starts[index] : self.ends[index]].decode(*_ENCODING)

    def __iter__(self) -> Iterator[str]:
        return (text.decode(*_ENCODING) for text in self.encoded())

    def __len__(self) -> int:
        return len(self.starts)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # pyright: ignore

    def __repr__(self) -> str:
        more = ", …" if len(self) > 3 else ""
        return f"Texts({', '.join(map(repr, self[:3]))}{more})"


def encoded(text: str) -> bytes:
    """Return a text's bytes, those of half a character too."""
    return text.encode(*_ENCODING)


def taken(texts: Sequence[str], rows: Int[np.ndarray, "m"]) -> Sequence[str]:
    """Return the texts of these rows, of the kind that they are."""
    if isinstance(texts, Texts):
        return texts.take(rows)
    return tuple([texts[int(i)] for i in rows])


def first_rows(texts: Sequence[str]) -> Int[np.ndarray, "n"]:
    """Return for each row the first one with the same text.

    Texts are compared by digests, of which no two are known to be of different texts.

    >>> first_rows(["a", "b", "a", "a"])
    array([0, 1, 0, 0])
    """
    n, digests = len(texts), bytearray()
    for content in texts.encoded() if isinstance(texts, Texts) else map(encoded, texts):
        digests += hashlib.blake2b(content, digest_size=_DIGEST).digest()
    columns = np.frombuffer(digests, np.uint64).reshape(n, 2).T
    # Stable, so that of equal ones the first row comes first.
    order = np.lexsort(columns)
    new = np.arange(n) == 0
    for column in columns:
        there = column[order]
        new[1:] |= there[1:] != there[:-1]
    begin = np.flatnonzero(new)
    first = np.empty(n, np.intp)
    first[order] = np.repeat(order[begin], np.diff(begin, append=n))
    return first
