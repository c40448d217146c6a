"""Heads that a file's ``task_type`` trains though ``modules_to_save`` does not say so.

PEFT's classes for these tasks train the head in full and save it, whatever ``modules_to_save``
says; older versions left the field as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..core import paths
from ..core.config import lora_config
from .config_json import AdapterFile
from .keys import PREFIX

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def heads(file: AdapterFile) -> tuple[str, ...]:
    """Return the heads that the task type means and ``modules_to_save`` does not name.

    >>> from lora_jax import LoraConfig
    >>> heads(AdapterFile(LoraConfig(modules_to_save=["score"]), task_type="SEQ_CLS"))
    ('classifier',)
    """
    named = file.config.modules_to_save or ()
    return tuple(head for head in _HEADS.get(file.task_type or "", ()) if head not in named)


def with_heads(file: AdapterFile, keys: Iterable[str]) -> AdapterFile:
    """Return the file with those of its implied heads of which there are tensors saved in full.

    Args:
        file: the configuration.
        keys: the names of the tensors.
    """
    modules = [
        key.removeprefix(PREFIX).rpartition(paths.SEPARATOR)[0]
        for key in keys
        # A bias alone may be that of bias="all".
        if ".lora_" not in key and not key.endswith(".bias")
    ]
    held = [
        head
        for head in heads(file)
        if any(
            lora_config.is_saved(replace(file.config, modules_to_save=(head,)), module)
            for module in modules
        )
    ]
    if not held:
        return file
    saved = (*(file.config.modules_to_save or ()), *held)
    return replace(file, config=replace(file.config, modules_to_save=saved))
