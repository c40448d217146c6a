"""Labelled texts from files: tables, and the SMS Spam Collection as it is published."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import pointers
from ..errors import DataError, raise_all
from ..intake import read_bytes
from .data import TextData

_SHOWN = 20
_LARGEST = 1 << 40
_SURROGATE = re.compile("[\ud800-\udfff]")


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
    rows = _read_rows(path, (text_column, label_column))
    labels = [_label(row.values[label_column]) for row in rows]
    problems = [
        f"line {row.line}: got {row.values[label_column]!r} as {label_column}, wanted a name or a "
        "whole number"
        for row, label in zip(rows, labels, strict=True)
        if not label
    ]
    _raise(path, problems, "give each row a label or remove it")
    return _labelled(path, [row.values[text_column] for row in rows], labels)


def read_texts(path: str | Path, text_column: str = "text") -> tuple[str, ...]:
    """Read the texts of a table as ``read_table`` does, needing no labels.

    Raises:
        DataError: the file cannot be read as such a table.
    """
    return tuple(row.values[text_column] for row in _read_rows(path, (text_column,)))


def read_sms(path: str | Path) -> TextData:
    """Read the SMS Spam Collection: ``label<TAB>text`` lines, no header and no quoting.

    Almeida, Gómez Hidalgo and Yamakami, 2011, https://doi.org/10.1145/2034691.2034742.

    Raises:
        DataError: the file cannot be read, or a line is not of this form; all are listed.
    """
    lines = [(i, line) for i, line in _lines(_read_text(path)) if line]
    parts = [line.partition("\t") for _, line in lines]
    problems = [
        f"line {i}: got {line[:60]!r}, wanted a label, a tab and a text"
        for (i, line), (label, _, text) in zip(lines, parts, strict=True)
        if not (label.strip() and text)
    ]
    _raise(path, problems, "correct or remove these lines")
    return _labelled(path, [text for _, _, text in parts], [label.strip() for label, _, _ in parts])


class _Row(NamedTuple):
    line: int
    values: Mapping[str, Any]


def _label(value: Any) -> str:
    if isinstance(value, bool | int):
        return json.dumps(value)
    return value.strip() if isinstance(value, str) else ""


def _labelled(path: str | Path, texts: Sequence[str], labels: Sequence[str]) -> TextData:
    classes = tuple(sorted(set(labels)))
    if not texts:
        raise DataError(f"{path}: got no rows, wanted at least two with a label and a text each")
    if len(classes) < 2:
        raise DataError(
            f"{path}: got the one class {labels[0]!r} in all {len(labels)} rows, wanted at least "
            "two; add rows of another class or name another label column"
        )
    index = {name: i for i, name in enumerate(classes)}
    return TextData(tuple(texts), np.array([index[name] for name in labels], np.int32), classes)


def _read_rows(path: str | Path, columns: tuple[str, ...]) -> list[_Row]:
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise DataError(
            f"{path}: got the suffix {suffix!r}, wanted one of {', '.join(_READERS)}; "
            "save the table in one of these formats"
        )
    rows = _READERS[suffix](path, _read_text(path), columns)
    if not rows:
        raise DataError(f"{path}: got no rows below the header, wanted at least one; add rows")
    problems = [
        f"line {line}: got {values[columns[0]]!r} as {columns[0]}, wanted Unicode text"
        for line, values in rows
        if not isinstance(values[columns[0]], str) or _SURROGATE.search(values[columns[0]])
    ]
    _raise(path, problems, "correct or remove these rows")
    return rows


def _read_delimited(
    path: str | Path, text: str, columns: tuple[str, ...], delimiter: str
) -> list[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, problems, line = [], [], 1
    header: list[str] = []
    try:
        for record in reader:
            if record and not header:
                header = record
                _check_columns(path, header, columns)
            elif record and len(record) != len(header):
                problems.append(f"line {line}: got {len(record)} fields, wanted {len(header)}")
            elif record:
                rows.append(_Row(line, dict(zip(header, record, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        problems.append(f"line {line}: {error}")
    _raise(path, problems, "put fields that hold the separator or a newline in double quotes")
    return rows


def _read_jsonl(path: str | Path, text: str, columns: tuple[str, ...]) -> list[_Row]:
    rows, problems = [], []
    for i, line in _lines(text):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            problems.append(f"line {i}: got {line[:60]!r}, wanted a JSON object ({error})")
            continue
        if not isinstance(values, dict):
            problems.append(f"line {i}: got a JSON {type(values).__name__}, wanted an object")
        elif missing := [name for name in columns if name not in values]:
            problems.append(f"line {i}: got the keys {list(values)}, wanted {', '.join(missing)}")
        else:
            rows.append(_Row(i, values))
    _raise(path, problems, "correct these lines, or name the keys with text_column, label_column")
    return rows


_READERS: Mapping[str, Callable[[str | Path, str, tuple[str, ...]], list[_Row]]] = {
    ".csv": lambda path, text, columns: _read_delimited(path, text, columns, ","),
    ".tsv": lambda path, text, columns: _read_delimited(path, text, columns, "\t"),
    ".jsonl": _read_jsonl,
}


def _check_columns(path: str | Path, header: Sequence[str], columns: Sequence[str]) -> None:
    problems = [
        f"column {name!r}: got {header.count(name)} of it, wanted one"
        for name in columns
        if header.count(name) != 1
    ]
    _raise(path, problems, f"name the columns of the file; its first line holds {list(header)}")


def _read_text(path: str | Path) -> str:
    pointers.refuse(Path(path), DataError)
    try:
        data = read_bytes(path, _LARGEST)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    if not data.strip():
        raise DataError(f"{path}: got an empty file, wanted rows of text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line}: got the byte 0x{data[error.start]:02x} at offset "
            f"{error.start}, wanted UTF-8; save the file as UTF-8"
        ) from error


def _lines(text: str) -> list[tuple[int, str]]:
    # not splitlines, which would also break texts at U+2028 and other rare separators
    return [(i, line.removesuffix("\r")) for i, line in enumerate(text.split("\n"), start=1)]


def _raise(path: str | Path, problems: Sequence[str], remedy: str) -> None:
    more = [f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    raise_all(DataError, f"{path} cannot be used; {remedy}", [*problems[:_SHOWN], *more])
