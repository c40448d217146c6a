"""A model directory of safetensors files, one or in shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from ..errors import AssetError, raise_all
from ..journal import PREFIX, settle

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The same weights in other formats, which a change to the safetensors files does not reach.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf")
OTHER_WEIGHTS += (".safetensors", ".bin.index.json", ".safetensors.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model directory, by their headers.

    Args:
        directory: where it is.
        files: the names of the tensors by file.
        shapes: by tensor.
        dtypes: by tensor, as safetensors names them: ``"BF16"``.
    """

    directory: Path
    files: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]


def read_checkpoint(directory: Path) -> Checkpoint:
    """Return what the safetensors files of a model directory hold; no tensor is read.

    Raises:
        AssetError: there are none, one is broken, or they and the index disagree.
    """
    where = _index(settle(directory, AssetError) / INDEX)
    names = [WEIGHTS] if where is None else sorted(set(where.values()))
    files, shapes, dtypes, problems = {}, {}, {}, []
    for name in names:
        with _opened(directory / name) as file:
            files[name] = tuple(file.keys())
            for key in files[name]:
                part = file.get_slice(key)
                if where is not None and where.get(key) != name:
                    problems.append(f"{key}: in {name}, the index says {where.get(key)}")
                shapes[key], dtypes[key] = tuple(part.get_shape()), part.get_dtype()
    problems += [f"{key}: in the index, in no shard" for key in (where or {}) if key not in shapes]
    raise_all(AssetError, f"{directory} is not a whole model", problems)
    return Checkpoint(directory, files, shapes, dtypes)


def read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str] | None]:
    """Return the tensors of one file and its metadata."""
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


def copy_others(checkpoint: Checkpoint, to: Path) -> list[str]:
    """Copy all files but the weights; return the names of the weights in other formats."""
    left_out = []
    for path in sorted(checkpoint.directory.rglob("*")):
        name = path.relative_to(checkpoint.directory)
        ours = name.parts[0].startswith(PREFIX)  # of a run that writes there
        if str(name) in checkpoint.files or path.is_dir() or ours:
            continue
        if path.name.endswith(OTHER_WEIGHTS) and str(name) != INDEX:
            left_out.append(str(name))
            continue
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to / name)
    return left_out


def _index(path: Path) -> dict[str, str] | None:
    if not path.is_file():
        return None
    try:
        where = {
            str(key): str(name) for key, name in json.loads(path.read_bytes())["weight_map"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(f"{path} is not an index of shards: {error!r}") from error
    if odd := sorted({name for name in where.values() if Path(name).name != name}):
        raise AssetError(f"{path} names files elsewhere: {', '.join(odd)}")
    if not where:
        raise AssetError(f"{path} names no tensors")
    return where


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise AssetError(
            f"{path} is missing. A model is a directory with {WEIGHTS}, or {INDEX} and its shards."
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise AssetError(f"{path} is not a whole safetensors file: {error}") from error
