"""A model directory of safetensors files, one or in shards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from ..core.errors import AssetError, raise_all
from ..core.io import lfs_pointers
from ..core.io.intake import is_inside, problem_of, reason, require_regular
from ..core.io.journal import PREFIX, settle
from ..core.shown_text import listed
from ..peft.download import read_index

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


@dataclass(frozen=True)
class LeftOut:
    """What is not copied from a model's directory.

    Args:
        old: the same weights in other formats.
        elsewhere: links that lead out of the directory or nowhere, pipes and devices.
    """

    old: tuple[str, ...]
    elsewhere: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return what is said of them."""
        said = {
            "not copied, as they hold the old weights": self.old,
            "not copied, as they are no regular files of the model's directory": self.elsewhere,
        }
        return [f"{why}: {', '.join(listed(names))}" for why, names in said.items() if names]


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


def copy_others(checkpoint: Checkpoint, to: Path) -> LeftOut:
    """Copy all regular files but the weights; return the names of what is left out."""
    old, elsewhere = [], []
    for path in sorted(checkpoint.directory.rglob("*")):
        name = path.relative_to(checkpoint.directory)
        ours = name.parts[0].startswith(PREFIX)  # of a run that writes there
        is_folder = path.is_dir() and not path.is_symlink()
        if str(name) in checkpoint.files or is_folder or ours:
            continue
        if path.name.endswith(OTHER_WEIGHTS) and str(name) != INDEX:
            old.append(str(name))
        elif not is_inside(path, checkpoint.directory):
            elsewhere.append(str(name))
        else:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path.resolve(), to / name)
    return LeftOut(tuple(old), tuple(elsewhere))


def _index(path: Path) -> dict[str, str] | None:
    return None if problem_of(path) == "missing" else read_index(path, AssetError)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if problem_of(path) == "missing":
        raise AssetError(
            f"{path} is missing. A model is a directory with {WEIGHTS}, or {INDEX} and its shards."
        )
    lfs_pointers.refuse(path, AssetError)
    try:
        require_regular(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise AssetError(f"{path} is not a whole safetensors file: {reason(error)}") from error
