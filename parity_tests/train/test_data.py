"""Tables, splits, tokens and batches, and what is said when a file cannot be used."""

import json

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from lora_jax.core.errors import AssetError, DataError
from lora_jax.train.data import (
    TextData,
    Tokens,
    balance,
    batches,
    contradictions,
    drop_duplicates,
    encode,
    load_tokenizer,
    split,
)
from lora_jax.train.reading import read_sms, read_table, read_texts

ROWS = (("spam", 'win "cash", now'), ("ham", "see you\nlater"), ("ham", "naïve\u2028text"))


def content_of(suffix):
    if suffix == ".jsonl":
        return "\n".join(json.dumps({"label": a, "text": b, "id": 1}) for a, b in ROWS) + "\n\n"
    quoted = ((label, '"' + text.replace('"', '""') + '"', "1") for label, text in ROWS)
    separator = {".csv": ",", ".tsv": "\t"}[suffix]
    return "\r\n".join(map(separator.join, (("label", "text", "id"), *quoted))) + "\r\n"


def rows_of(data):
    return tuple((data.classes[i], text) for i, text in zip(data.labels, data.texts, strict=True))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".JSONL"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_every_format_gives_the_same_rows(suffix, encoding, tmp_path):
    path = tmp_path / f"table{suffix}"
    path.write_bytes(content_of(suffix.lower()).encode(encoding))
    data = read_table(path)
    assert rows_of(data) == ROWS
    assert data.classes == ("ham", "spam") and data.labels.dtype == np.int32
    assert read_texts(path) == data.texts


def test_columns_and_keys_are_named(tmp_path):
    table, lines = tmp_path / "t.csv", tmp_path / "t.jsonl"
    table.write_text("\nbody,class\nhello, b \n\nbye,a\n")
    lines.write_text('{"body": "hello", "class": 7}\n{"body": "bye", "class": true}\n')
    assert rows_of(read_table(table, "body", "class")) == (("b", "hello"), ("a", "bye"))
    assert rows_of(read_table(lines, "body", "class")) == (("7", "hello"), ("true", "bye"))


BAD_TABLES = {
    "empty file": (".csv", b"", "got an empty file"),
    "blank file": (".jsonl", b"\n \n", "got an empty file"),
    "header only": (".csv", b"label,text\n", "no rows below the header"),
    "wrong column": (
        ".csv",
        b"label,body\nham,hi\n",
        r"(?s)its first line holds \['label', 'body'\].*column 'text': got 0 of it, wanted one",
    ),
    "column twice": (".tsv", b"text\ttext\tlabel\na\tb\tham\n", "column 'text': got 2"),
    "wrong key": (
        ".jsonl",
        b'{"label": "ham", "body": "hi"}\n',
        r"line 1: got the keys \['label', 'body'\], wanted text",
    ),
    "one class": (".csv", b"label,text\nham,a\nham,b\n", "one class 'ham' in all 2 rows"),
    "not utf-8": (
        ".csv",
        b"label,text\nham,caf\xe9\n",
        "line 2: got the byte 0xe9 at offset 18, wanted UTF-8; save",
    ),
    "utf-16": (".csv", "label,text\n".encode("utf-16-le"), "first line holds"),
    "ragged row": (
        ".csv",
        b'label,text\nham,"a\nb"\nspam,a,b\nspam\nham,a\n',
        "(?s)line 4: got 3 fields, wanted 2.*line 5: got 1 fields, wanted 2",
    ),
    "open quote": (
        ".csv",
        b'label,text\nham,a\nham,"b\nspam,c\n',
        "line 3: unexpected end of data",
    ),
    "empty label": (
        ".csv",
        b"label,text\nham,a\n  ,b\n,c\n",
        "(?s)line 3: got '  ' as label, wanted a name.*line 4: got '' as label",
    ),
    "null label": (".jsonl", b'{"label": null, "text": "a"}\n', "line 1: got None as label"),
    "float label": (".jsonl", b'{"label": 1.5, "text": "a"}\n', "line 1: got 1.5 as label"),
    "number as text": (".jsonl", b'{"label": "a", "text": 3}\n', "line 1: got 3 as text"),
    "half a surrogate": (
        ".jsonl",
        rb'{"label": "a", "text": "\ud800"}',
        "line 1: got .* as text, wanted Unicode text",
    ),
    "broken json": (
        ".jsonl",
        b'{"label": "a", "text": "b"}\n\n{"label": \n["a"]\n',
        "(?s)line 3: got '{\"label\": ', wanted a JSON object.*line 4: got a JSON list",
    ),
    "other format": (".parquet", b"PAR1", "got the suffix '.parquet', wanted one of .csv"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_table_that_cannot_be_used_says_where_and_why(case, tmp_path):
    suffix, content, said = BAD_TABLES[case]
    path = tmp_path / f"table{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("read", [read_table, read_texts, read_sms])
def test_paths_that_are_no_files(read, tmp_path):
    with pytest.raises(DataError, match="No such file.*check the path"):
        read(tmp_path / "missing.csv")
    (tmp_path / "directory.csv").mkdir()
    with pytest.raises(DataError, match="Is a directory"):
        read(tmp_path / "directory.csv")


def test_long_lists_of_problems_are_cut_short(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("{\n" * 50)
    with pytest.raises(DataError, match="line 20: (?s:.*)… and 30 more") as caught:
        read_texts(path)
    assert "line 21" not in str(caught.value)


def test_sms_lines_are_neither_quoted_nor_split_at_rare_separators(tmp_path):
    path = tmp_path / "sms"
    path.write_bytes('ham\t"open\tquote\r\nspam\ta\u2028b\x85c\n'.encode())
    assert rows_of(read_sms(path)) == (("ham", '"open\tquote'), ("spam", "a\u2028b\x85c"))
    path.write_text("ham\ta\nno tab\n\tno label\nspam\t\n")
    with pytest.raises(DataError, match="(?s)line 2: got 'no tab'.*line 3: .*line 4: ") as caught:
        read_sms(path)
    assert "line 1" not in str(caught.value)
    path.write_text("ham\ta\nham\tb\n")
    with pytest.raises(DataError, match="one class 'ham'"):
        read_sms(path)


def test_the_sms_corpus_gives_the_reference_split(sms_path):
    data = read_sms(sms_path)
    unique = drop_duplicates(data)
    even = balance(unique, 123)
    assert (len(data.texts), len(unique.texts)) == (4862, 4534)
    assert data.classes == ("ham", "spam") and np.bincount(even.labels).tolist() == [561, 561]
    parts = split(even)
    assert [len(part.texts) for part in parts] == [785, 112, 225]
    assert sorted(text for part in parts for text in part.texts) == sorted(even.texts)
    assert all(len(set(part.labels.tolist())) == 2 for part in parts)
    assert np.any(np.diff(parts[0].labels) < 0)


@given(st.integers(2, 4), st.lists(st.integers(0, 3), max_size=30), st.integers(0, 3))
def test_preparing_rows_is_pure_and_keeps_texts_with_their_labels(classes, more, seed):
    labels = [*range(classes), *(label % classes for label in more)]
    texts = tuple(f"{i % 9} of {label}" for i, label in enumerate(labels))
    data = TextData(texts, np.array(labels, np.int32), tuple("abcd"[:classes]))
    before, known = rows_of(data), set(rows_of(data))
    unique, even = drop_duplicates(data), balance(data, seed)
    assert len(set(unique.texts)) == len(unique.texts) and set(unique.texts) == set(data.texts)
    assert set(np.bincount(even.labels)) == {np.bincount(data.labels).min()}
    assert rows_of(even) == rows_of(balance(data, seed))
    assert set(rows_of(unique)) <= known and set(rows_of(even)) <= known
    if len(data.texts) >= 10:
        parts = split(data, seed=seed)
        assert sorted(sum(map(rows_of, parts), ())) == sorted(before)
        assert [rows_of(p) for p in parts] == [rows_of(p) for p in split(data, seed=seed)]
    assert rows_of(data) == before


def numbered(n):
    return TextData(tuple(map(str, range(n))), np.arange(n, dtype=np.int32) % 2, ("a", "b"))


@pytest.mark.parametrize(
    ("n", "fractions", "said"),
    [
        (9, (0.7, 0.1, 0.2), r"rows: got 9, which .* splits into \(6, 0, 3\)"),
        (10, (0.7, 0.2, 0.2), "wanted positive numbers that sum to 1"),
        (10, (0.8, 0.0, 0.2), "wanted positive numbers that sum to 1"),
    ],
)
def test_splits_that_are_refused(n, fractions, said):
    with pytest.raises(DataError, match=said):
        split(numbered(n), fractions)


def test_whole_products_stay_whole_and_seeds_differ():
    parts = split(numbered(100), (0.29, 0.58, 0.13))
    assert [len(part.texts) for part in parts] == [29, 58, 13]
    assert split(numbered(100), seed=1)[0].texts != split(numbered(100), seed=2)[0].texts


def test_a_text_with_several_labels_counts_once_however_often_it_stands_there():
    data = TextData(tuple("abaaba"), np.array([0, 0, 1, 2, 0, 1], np.int32), tuple("xyz"))
    assert contradictions(data) == 1


def test_a_class_without_rows_cannot_be_balanced():
    data = TextData(("x", "y"), np.array([0, 0], np.int32), ("a", "b"))
    with pytest.raises(DataError, match="class 'b': got no rows"):
        balance(data, 0)


def test_encoding_equals_transformers(minilm_dir):
    texts = ["", "Hello, wörld!", "free entry " * 40, "日本語 \u200b mixed"]
    tokenizer = load_tokenizer(minilm_dir)
    assert tokenizer.padding is None and tokenizer.truncation is None
    before = tokenizer.to_str()
    tokens = encode(tokenizer, texts, 16)
    assert tokenizer.to_str() == before
    reference = transformers.BertTokenizerFast(tokenizer_file=str(minilm_dir / "tokenizer.json"))
    expected = reference(
        texts, padding="max_length", truncation=True, max_length=16, return_tensors="np"
    )
    np.testing.assert_array_equal(tokens.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(tokens.attention_mask, expected["attention_mask"])
    assert tokens.input_ids.dtype == tokens.attention_mask.dtype == np.int32
    assert encode(tokenizer, [], 16).input_ids.shape == (0, 16)
    with pytest.raises(DataError, match="max_length: got 2, wanted more than the 2 special"):
        encode(tokenizer, texts, 2)


def test_the_padding_id_is_that_of_the_model():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert encode(words, ["a b", "b"], 3, pad_id=9).input_ids.tolist() == [[0, 1, 9], [1, 9, 9]]
    with pytest.raises(DataError, match=r"no \[PAD\] token; pass the pad_token_id of config.json"):
        encode(words, ["a"], 3)
    words.add_special_tokens(["[PAD]"])
    assert encode(words, ["a"], 2).input_ids.tolist() == [[0, 3]]


def test_a_tokenizer_that_cannot_be_read(tmp_path):
    with pytest.raises(AssetError, match="cannot read .*tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(AssetError, match="tokenizer.json is not a tokenizer file"):
        load_tokenizer(tmp_path)


def numbered_tokens(n):
    ids = np.arange(n, dtype=np.int32)[:, None] * np.ones((1, 3), np.int32)
    return Tokens(ids, np.ones_like(ids)), np.arange(n, dtype=np.int32)


@given(st.integers(0, 40), st.integers(1, 9), st.booleans(), st.integers(0, 2))
def test_batches_hold_every_row_once_in_one_shape(n, size, shuffle, epoch):
    tokens, labels = numbered_tokens(n)
    found = list(batches(tokens, labels, size, seed=3, epoch=epoch, shuffle=shuffle))
    again = list(batches(tokens, labels, size, seed=3, epoch=epoch, shuffle=shuffle))
    assert len(found) == -(-n // size)
    seen = []
    for batch, same in zip(found, again, strict=True):
        assert batch.input_ids.shape == batch.attention_mask.shape == (size, 3)
        assert batch.labels.shape == batch.weights.shape == (size,)
        assert batch.weights.dtype == np.float32 and set(batch.weights) <= {0.0, 1.0}
        np.testing.assert_array_equal(batch.input_ids[:, 0], batch.labels)
        assert batch.attention_mask.all()
        np.testing.assert_array_equal(batch.labels, same.labels)
        seen += batch.labels[batch.weights > 0].tolist()
    assert sorted(seen) == list(range(n)) and (shuffle or seen == sorted(seen))


def test_seed_and_epoch_decide_the_order():
    tokens, labels = numbered_tokens(50)
    orders = {
        tuple(next(batches(tokens, labels, 50, seed=s, epoch=e, shuffle=True)).labels)
        for s in (0, 1)
        for e in (0, 1)
    }
    assert len(orders) == 4


def test_batches_without_labels_and_refusals():
    tokens, labels = numbered_tokens(3)
    assert next(batches(tokens, None, 2)).labels.tolist() == [0, 0]
    for bad in ((tokens, labels[:2], 2), (tokens, labels, 0)):
        with pytest.raises(DataError, match="wanted as many labels as rows and a batch_size"):
            batches(*bad)
