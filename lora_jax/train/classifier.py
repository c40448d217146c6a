"""A base model as a text classifier to adapt, and the record that finds it again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .. import __version__
from ..core.config.lora_config import LoraConfig
from ..core.errors import AdapterError
from ..core.io import lfs_pointers
from ..core.io.intake import parse_json, read_bytes, reason
from ..core.io.journal import settle
from ..core.shown_text import shortened
from ..models import from_pretrained
from ..models.assets import resolve_model
from ..models.bert import BertConfig
from ..rewrite import Plan, plan
from .data import Tokens, encode, load_tokenizer
from .option_limits import TOKENS, check_length

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RECORD_NAME = "run.json"

# An alias means nothing to PEFT, which looks the recorded name up on the hub.
_HUB_NAMES = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}


@dataclass(frozen=True, eq=False)
class Classifier:
    """A BERT with a head for these classes, and what turns texts into its inputs.

    Args:
        directory: the model's files.
        base_model: the name that finds them again.
        model: the Flax module.
        params: its parameters.
        tokenizer: without padding and truncation.
        classes: the classes, in the order of the logits.
        max_length: tokens of a text.
    """

    directory: Path
    base_model: str
    model: Any
    params: Any
    tokenizer: Tokenizer
    classes: tuple[str, ...]
    max_length: int

    def apply(self, params: Any, input_ids: Any, attention_mask: Any, places: Any = None) -> Any:
        """Return the logits; with ``places``, computing no padding."""
        return self.model.apply({"params": params}, input_ids, attention_mask, places=places)

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Return the texts as tokens."""
        pad_id, known = self.model.config.pad_token_id, self.model.config.vocab_size
        return encode(self.tokenizer, texts, self.max_length, pad_id=pad_id, vocabulary=known)

    def plan(self, config: LoraConfig, batch_size: int) -> Plan:
        """Return what ``config`` does to this model."""
        ids = jax.ShapeDtypeStruct((batch_size, self.max_length), jnp.int32)
        return plan(self.apply, self.params, config, ids, ids)


def load_classifier(
    name: str | Path,
    classes: tuple[str, ...],
    max_length: int,
    *,
    seed: int = 0,
    cache: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> Classifier:
    """Return the model of this name with a head for ``classes``.

    Args:
        name: see ``resolve_model``.
        classes: see ``Classifier``.
        max_length: see ``Classifier``.
        seed: what the head is drawn from.
        cache: where downloads are kept.
        note: called with a line at every step of a download.

    Raises:
        AssetError: the files cannot be had or are broken.
        ConfigError: the model is not a BERT of the supported kind, or reads only shorter texts.
    """
    directory = resolve_model(name, cache=cache, progress=note)
    positions = BertConfig.from_file(directory / "config.json").max_position_embeddings
    check_length(max_length, positions)
    model, params = from_pretrained(directory, len(classes), seed=seed)
    local = os.path.isdir(name)
    base_model = os.path.realpath(name) if local else _HUB_NAMES.get(str(name), str(name))
    tokenizer = load_tokenizer(directory)
    return Classifier(directory, base_model, model, params, tokenizer, classes, max_length)


@dataclass(frozen=True)
class Record:
    """What using an adapter takes beside PEFT's two files.

    Args:
        base_model: the model that the adapter belongs to.
        classes: the classes, in the order of the logits.
        max_length: tokens of a text.
    """

    base_model: str
    classes: tuple[str, ...]
    max_length: int


def encode_record(record: Record, more: Mapping[str, Any]) -> bytes:
    """Return ``run.json`` with the record, and with ``more`` for people to read."""
    fields = {"lora_jax": __version__} | vars(record) | dict(more)
    return (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()


def _record(base_model: Any, classes: Any, max_length: Any) -> Record:
    if not isinstance(base_model, str):
        raise TypeError(f"base_model: got {base_model!r}, wanted a name")
    if not isinstance(classes, list) or not classes or not _are_names(classes):
        raise TypeError(f"classes: got {classes!r}, wanted a list of different names")
    if type(max_length) is not int or not 1 <= max_length <= TOKENS:
        raise ValueError(f"max_length: got {max_length!r}, wanted a whole number of at least 1")
    return Record(base_model, tuple(classes), max_length)


def _are_names(classes: list[Any]) -> bool:
    return all(isinstance(one, str) for one in classes) and len(set(classes)) == len(classes)


def read_record(directory: str | Path) -> Record:
    """Read the ``run.json`` of an output directory.

    Raises:
        AdapterError: it is missing, unreadable or lacks a field.
    """
    path = settle(Path(directory), AdapterError) / RECORD_NAME
    lfs_pointers.refuse(path, AdapterError)
    try:
        fields = parse_json(read_bytes(path))
        return _record(fields["base_model"], fields["classes"], fields["max_length"])
    except OSError as error:
        raise AdapterError(
            f"cannot read {path}: {error.strerror or error}. Name a directory that "
            "`lora-jax finetune` has written."
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"{path} is not what `lora-jax finetune` writes ({shortened(reason(error))}). "
            "Copy it again, or train again."
        ) from error
