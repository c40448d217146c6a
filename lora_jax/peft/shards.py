"""Reading the tensors of an adapter directory: one safetensors file, or shards and their index."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import safetensors

from ..core.errors import AdapterError, raise_all
from ..core.io import lfs_pointers
from ..core.io.intake import problem_of, reason
from .checks import header_problem
from .download import INDEX_NAME, WEIGHTS_NAME, read_index


def read(directory: Path) -> dict[str, np.ndarray]:
    """Return the tensors by their names in the file or the shards.

    Raises:
        AdapterError: a file is missing, broken or a pickle, or lists where the index and the
            shards disagree.
    """
    path, index = directory / WEIGHTS_NAME, directory / INDEX_NAME
    if path.is_file() or not index.is_file():
        return read_file(path)
    where = read_index(index)
    found: dict[str, np.ndarray] = {}
    problems = []
    for name in sorted(set(where.values())):
        for key, tensor in read_file(directory / name).items():
            if where.get(key) != name:
                problems.append(f"{key}: in {name}, the index says {where.get(key)}")
            found[key] = tensor
    problems += [f"{key}: in the index, in no shard" for key in where if key not in found]
    raise_all(AdapterError, f"{directory} is not a whole adapter", problems)
    return found


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of one file by their names in it.

    Raises:
        AdapterError: the file is missing, broken, or a pickle.
    """
    if (problem := problem_of(path)) == "missing":
        pickled = os.path.exists(path.parent / "adapter_model.bin")
        hint = " adapter_model.bin is a pickle, which is never read: save it again as safetensors."
        raise AdapterError(f"{path} is missing.{hint if pickled else ''}")
    lfs_pointers.refuse(path, AdapterError)
    try:
        if problem := problem or header_problem(path):
            raise ValueError(problem)
        with safetensors.safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, TypeError, ValueError, OverflowError) as error:
        raise AdapterError(
            f"{path} is not a whole safetensors file: {reason(error)}. Copy or save it again."
        ) from error
