"""Names of PEFT's tensors as others write them; pure functions on names.

======================================== =====================================================
written                                  by
======================================== =====================================================
``x.lora_A.default.weight``              PEFT's ``state_dict``, with the adapter's name
``x.lora_magnitude_vector.weight``       PEFT's ``state_dict``, and older files
``x.modules_to_save.default.weight``     the same
``base_model.model.base_model.model.x``  a PEFT model wrapped twice
``module.base_model.model.x``            ``DistributedDataParallel``
``base_model.model._orig_mod.x``         ``torch.compile``
``x._fsdp_wrapped_module.y``             FSDP; likewise ``_checkpoint_wrapped_module``
======================================== =====================================================
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeVar

from ..core.errors import AdapterError, raise_all
from .keys import MAGNITUDE, PREFIX, ROWS

T = TypeVar("T")

# What wraps a module under a name that no module of an author's has.
_WRAPPERS = re.compile(
    r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
)

_PAIR = re.compile(r"\.(lora_[AB])\.([^.]+)\.(weight|bias)$")
_PLAIN = re.compile(
    rf"\.(lora_embedding_[AB]|{MAGNITUDE}|{re.escape(ROWS)})(?:\.([^.]+?))??(?:\.weight)?$"
)
_SAVED = re.compile(r"\.modules_to_save\.([^.]+)\.")

_ENDING = re.compile(rf"(\.base_layer)?\.(lora_\w+(\.\w+)?|{re.escape(ROWS)}|[^.]+)$")

_DATA_PARALLEL = "module."
_DEFAULT = "default"


def plain(tensors: Mapping[str, T], origin: object = "this file") -> dict[str, T]:
    """Return tensors by the names that PEFT's own file gives them; others keep theirs.

    Args:
        tensors: by the names in the file.
        origin: what the file is called in messages.

    Raises:
        AdapterError: lists all tensors that mean the same, as those of two adapters in one file.

    >>> sorted(plain({"module.base_model.model.q.lora_A.default.weight": 1, "q.bias": 2}))
    ['base_model.model.q.lora_A.weight', 'q.bias']
    """
    names = plain_names(tensors)
    given = defaultdict(list)
    for key, name in names.items():
        given[name].append(key)
    raise_all(
        AdapterError,
        f"{origin} says the same more than once",
        (
            f"{' and '.join(sorted(keys))} mean {name}"
            for name, keys in sorted(given.items())
            if len(keys) > 1
        ),
    )
    return {names[key]: value for key, value in tensors.items()}


def plain_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the name that PEFT's file gives each of these tensors."""
    keys = list(keys)
    adapters = {_DEFAULT} | {found[2] for key in keys if (found := _PAIR.search(key))}
    return {key: _plain(key, adapters) for key in keys}


def owner(key: str) -> str:
    """Return the module that owns a tensor of PEFT's file.

    >>> owner("base_model.model.a.q.lora_A.weight"), owner("base_model.model.head.weight")
    ('a.q', 'head')
    """
    return _ENDING.sub("", key.removeprefix(PREFIX)).replace(".base_layer", "")


def _plain(key: str, adapters: set[str]) -> str:
    name = _WRAPPERS.sub(r"\1", key)
    while name.startswith(_DATA_PARALLEL) and PREFIX in name:
        name = name.removeprefix(_DATA_PARALLEL)
    while name.startswith(PREFIX + PREFIX):
        name = name.removeprefix(PREFIX)
    name = _PLAIN.sub(r".\1", _PAIR.sub(r".\1.\3", name))
    # A saved module may have children, whose names stand where an adapter's would.
    if (found := _SAVED.search(name)) and found[1] in adapters:
        name = f"{name[: found.start()]}.{name[found.end() :]}"
    return name
