"""Labelled texts from files: tables, and the SMS Spam Collection as it is published."""

from __future__ import annotations

import csv
import io
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import DataError, raise_all
from ..core.io import lfs_pointers
from ..core.io.intake import MIB, open_regular, parse_json, reason
from ..core.shown_text import SHOWN, shortened
from .data import TextData
from .texts import Texts, encoded

LONGEST_LINE = 16 * MIB
"""Bytes of a line: more of them are no table's."""

SURROGATE = re.compile("[\ud800-\udfff]")


def read_table(
    path: str | Path, text_column: str = "text", label_column: str = "label"
) -> TextData:
    """Read labelled texts from a ``.csv``, ``.tsv`` (with a header line) or ``.jsonl`` file.

    Args:
        path: a UTF-8 file.
        text_column: the column, or JSON key, of the texts.
        label_column: the column, or JSON key, of the labels; space around a label is dropped
            and the classes are sorted.

    Raises:
        DataError: the file cannot be read as such a table, a label is empty, or there are
            fewer than two classes.
    """
    rows, problems = _Rows(), _Problems()
    for line, (text, *_, value) in _read_rows(path, (text_column, label_column)):
        label = _label(value)
        if not label or SURROGATE.search(label):
            wanted = "wanted a name of Unicode text or a whole number"
            problems.add(f"line {line}: got {value!r} as {label_column}, {wanted}")
        rows.add(text if isinstance(text, str) else "", label)
    problems.raise_all(path, "give each row a label or remove it")
    return _labelled(path, rows)


def read_texts(path: str | Path, text_column: str = "text") -> tuple[str, ...]:
    """Read the texts of a table as ``read_table`` does, needing no labels.

    Raises:
        DataError: the file cannot be read as such a table.
    """
    return tuple(text for _, (text, *_) in _read_rows(path, (text_column,)))


def read_sms(path: str | Path) -> TextData:
    """Read the SMS Spam Collection: ``label<TAB>text`` lines, no header and no quoting.

    Almeida, Gómez Hidalgo and Yamakami, 2011, https://doi.org/10.1145/2034691.2034742.

    Raises:
        DataError: the file cannot be read, or a line is not of this form; all are listed.
    """
    rows, problems = _Rows(), _Problems()
    with _opened(path) as lines:
        for i, line in enumerate(map(_bare, lines), start=1):
            label, _, text = line.partition("\t")
            if line and not (label.strip() and text):
                problems.add(f"line {i}: got {line[:60]!r}, wanted a label, a tab and a text")
            elif line:
                rows.add(text, label.strip())
    problems.raise_all(path, "correct or remove these lines")
    return _labelled(path, rows)


class _Problems:
    """The first of what is wrong with the rows of a table, and how many more there are."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.more = 0

    def add(self, problem: str) -> None:
        if len(self.first) < SHOWN:
            self.first.append(problem)
        else:
            self.more += 1

    def raise_all(self, path: str | Path, remedy: str) -> None:
        heading = f"{path} cannot be used; {remedy}"
        raise_all(DataError, heading, self.first, more=self.more)


class _Rows:
    """Texts in one array of bytes, and their labels, each name kept once."""

    def __init__(self) -> None:
        self.content, self.ends = bytearray(), array("q", [0])
        self.index: dict[str, int] = {}
        self.labels = array("i")

    def add(self, text: str, label: str) -> None:
        self.content += encoded(text)
        self.ends.append(len(self.content))
        self.labels.append(self.index.setdefault(label, len(self.index)))

    @property
    def texts(self) -> Texts:
        return Texts.of_parts(self.content, self.ends)


def _label(value: Any) -> str:
    if isinstance(value, bool | int):
        return json.dumps(value)
    return value.strip() if isinstance(value, str) else ""


def _labelled(path: str | Path, rows: _Rows) -> TextData:
    classes = tuple(sorted(rows.index))
    if not rows.labels:
        raise DataError(f"{path}: got no rows, wanted at least two with a label and a text each")
    if len(classes) < 2:
        raise DataError(
            f"{path}: got the one class {next(iter(classes))!r} in all {len(rows.labels)} rows, "
            "wanted at least two; add rows of another class or name another label column"
        )
    place = np.empty(len(classes), np.int32)
    place[[rows.index[name] for name in classes]] = np.arange(len(classes))
    return TextData(rows.texts, place[np.frombuffer(rows.labels, np.int32)], classes)


# A row of a table: the number of its line, and its values of the columns asked for.
_Row = tuple[int, tuple[Any, ...]]


def _read_rows(path: str | Path, columns: tuple[str, ...]) -> Iterator[_Row]:
    """Yield the rows, one at a time in memory; raise at the end what is wrong with any."""
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise DataError(
            f"{path}: got the suffix {suffix!r}, wanted one of {', '.join(_READERS)}; "
            "save the table in one of these formats"
        )
    empty, problems = True, _Problems()
    with _opened(path) as lines:
        for line, values in _READERS[suffix](path, lines, columns):
            empty, text = False, values[0]
            if not isinstance(text, str) or SURROGATE.search(text):
                problems.add(f"line {line}: got {text!r} as {columns[0]}, wanted Unicode text")
            yield line, values
    if empty:
        raise DataError(f"{path}: got no rows below the header, wanted at least one; add rows")
    problems.raise_all(path, "correct or remove these rows")


def _read_delimited(
    path: str | Path, lines: Iterator[str], columns: tuple[str, ...], delimiter: str
) -> Iterator[_Row]:
    # A line may end in the middle of what was read, as in files of old Macs.
    pieces = (
        piece
        for line in lines
        for piece in ([line] if "\r" not in line else io.StringIO(line, newline=""))
    )
    reader = csv.reader(pieces, delimiter=delimiter, strict=True)
    problems, line = _Problems(), 1
    header: list[str] = []
    places: list[int] = []
    try:
        for record in reader:
            if record and not header:
                header = record
                _check_columns(path, header, columns)
                places = [header.index(name) for name in columns]
            elif record and len(record) != len(header):
                problems.add(f"line {line}: got {len(record)} fields, wanted {len(header)}")
            elif record:
                yield line, tuple(record[place] for place in places)
            line = reader.line_num + 1
    except csv.Error as error:
        if "field limit" in str(error):
            raise DataError(
                f"{path}: line {line}: got a field of more than {csv.field_size_limit():,} "
                "characters; shorten it, save the table as .jsonl, or close the quotes if that is "
                "where they are open"
            ) from error
        problems.add(f"line {line}: {error}")
    problems.raise_all(path, "put fields that hold the separator or a newline in double quotes")


def _read_jsonl(path: str | Path, lines: Iterator[str], columns: tuple[str, ...]) -> Iterator[_Row]:
    problems = _Problems()
    for i, line in enumerate(map(_bare, lines), start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except ValueError as error:
            problems.add(f"line {i}: got {line[:60]!r}, wanted a JSON object ({error})")
            continue
        if not isinstance(values, dict):
            problems.add(f"line {i}: got a JSON {type(values).__name__}, wanted an object")
        elif missing := [name for name in columns if name not in values]:
            problems.add(f"line {i}: got the keys {list(values)}, wanted {', '.join(missing)}")
        else:
            yield i, tuple(values[name] for name in columns)
    remedy = "correct these lines, or name the keys with text_column, label_column"
    problems.raise_all(path, remedy)


_READERS: Mapping[str, Callable[[str | Path, Iterator[str], tuple[str, ...]], Iterator[_Row]]] = {
    ".csv": partial(_read_delimited, delimiter=","),
    ".tsv": partial(_read_delimited, delimiter="\t"),
    ".jsonl": _read_jsonl,
}


def _check_columns(path: str | Path, header: Sequence[str], columns: Sequence[str]) -> None:
    problems = _Problems()
    for name in columns:
        if header.count(name) != 1:
            problems.add(f"column {name!r}: got {header.count(name)} of it, wanted one")
    held = shortened(str(list(header)), 400)
    problems.raise_all(path, f"name the columns of the file; its first line holds {held}")


@contextmanager
def _opened(path: str | Path) -> Iterator[Iterator[str]]:
    """Give the lines of a file, each with what ends it."""
    lfs_pointers.refuse(Path(path), DataError)
    try:
        with open_regular(path) as stream:
            yield _lines(path, stream)
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason(error)}; check the path") from error


def _lines(path: str | Path, stream: io.BufferedReader) -> Iterator[str]:
    # not splitlines, which would also break texts at U+2028 and other rare separators
    line, offset, blank, encoding = 0, 0, True, "utf-8-sig"
    while content := stream.readline(LONGEST_LINE + 1):
        line += 1
        if len(content) > LONGEST_LINE:
            raise DataError(
                f"{path}: line {line}: got more than {LONGEST_LINE:,} bytes, wanted a row of a "
                "table; shorten it"
            )
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError as error:
            # Of the first line's bytes, the mark before them is left out.
            start = error.start + len(content) - len(error.object)
            raise DataError(
                f"{path}: line {line}: got the byte 0x{content[start]:02x} at offset "
                f"{offset + start}, wanted UTF-8; save the file as UTF-8"
            ) from error
        blank = blank and not content.strip()
        offset, encoding = offset + len(content), "utf-8"
        yield text
    if blank:
        raise DataError(f"{path}: got an empty file, wanted rows of text")


def _bare(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")
