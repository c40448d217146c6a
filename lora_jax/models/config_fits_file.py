"""Whether ``config.json`` describes what ``model.safetensors`` holds, asked before it is built.

A library builds whatever the configuration says. With three thousand layers for a file of two it
takes an hour, and with a width of a million all memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import AssetError, raise_all
from .huggingface import open_weights

# So many are built whatever the file holds: what is missing is then named tensor by tensor.
MOST = 64

# Elements: a model may have so many that are not in its file, such as a head that is drawn.
SPARE = 1 << 26

# What transformers' configurations call the numbers of modules that stand in a list.
_LAYERS = re.compile(
    r"(num_|n_)?(hidden_|encoder_|decoder_|vision_|text_)?(layers?|blocks?|depths?|stages?)"
    r"|num_(hidden|encoder|decoder)_(layers|blocks)"
)
_EXPERTS = re.compile(r"(num|n)_(local_|routed_|shared_)?experts|moe_num_experts")
_INDEX = re.compile(r"(?<=\.)\d{1,9}(?=\.)")

Shapes = Mapping[str, tuple[int, ...]]


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model directory's file; none is read.

    Raises:
        AssetError: the file is broken.
    """
    with open_weights(directory / "model.safetensors") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def refuse_other_counts(path: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise where a configuration has more layers or experts than the names in the file.

    Experts may be stored in one tensor: there an axis counts as well.

    Raises:
        AssetError: lists the fields.
    """
    indices = (int(index) for name in shapes for index in _INDEX.findall(name))
    listed = 1 + max(indices, default=-1)
    longest = max((size for shape in shapes.values() for size in shape), default=0)
    problems = []
    for name, value in _integers(config):
        field = name.rpartition(".")[2]
        experts = _EXPERTS.fullmatch(field)
        there = max(listed, longest) if experts else listed
        if (experts or _LAYERS.fullmatch(field)) and value > max(MOST, there):
            problems.append(f"{name}: got {value:,}, the file has {there:,} at most")
    raise_all(AssetError, f"{path} does not fit the weights beside it", problems)


def refuse_other_size(path: Path, described: int, shapes: Shapes) -> None:
    """Raise where a configuration describes far more parameters than there are in the file.

    Args:
        path: the configuration.
        described: elements of all parameters of its model.
        shapes: of the file.

    Raises:
        AssetError: says both numbers.
    """
    stored = sum(math.prod(shape) for shape in shapes.values())
    if described > 2 * stored + SPARE:
        raise AssetError(
            f"{path} does not fit the weights beside it: it describes a model of {described:,} "
            f"parameters, the file has {stored:,}"
        )


def _integers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield the integers of a configuration by their names, those of lists and tables inside it.

    >>> list(_integers({"num_layers": 3, "text_config": {"depths": [1, 2]}, "tie": True}))
    [('num_layers', 3), ('text_config.depths', 1), ('text_config.depths', 2)]
    """
    # A stack, as what is nested deeply would exceed Python's.
    stack = [(name, value)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, Mapping):
            inside = [(f"{name}.{key}".lstrip("."), one) for key, one in value.items()]
        elif isinstance(value, list):
            inside = [(name, one) for one in value]
        else:
            inside = []
            if isinstance(value, int) and not isinstance(value, bool):
                yield name, value
        stack += reversed(inside)
