"""What users name on the command line: objects as ``pkg.mod:name``, and files of arrays."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ..core.errors import ParityError, raise_all
from ..core.io import lfs_pointers
from ..core.io.intake import reason, require_regular


def load(name: str, option: str, *, call: bool = False) -> Any:
    """Return the object that ``pkg.mod:name`` names, looked for from the current directory.

    Args:
        name: module and attribute, which may be dotted.
        option: whose value it is, for the message.
        call: whether it must be callable.

    Raises:
        ParityError: says which part of it leads nowhere.

    >>> load("math:sqrt", "--jax", call=True)(4.0)
    2.0
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ParityError(f"{option}: got {name!r}, wanted pkg.mod:name")
    with _here():
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ParityError(
                f"{option}: module not found: {error.name}, looked for in {Path.cwd()} and in "
                "what is installed"
            ) from error
        except Exception as error:  # a module runs whatever it likes
            raise ParityError(
                f"{option}: importing {module_name} failed: {_where(error)}"
            ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found))
            hint = f"; close names: {', '.join(close)}" if close else ""
            raise ParityError(f"{option}: {module_name} has no {attribute}{hint}")
        found = getattr(found, part)
    if call and not callable(found):
        raise ParityError(f"{option}: {name} is not callable but {type(found).__name__}")
    return found


def load_inputs(name: str) -> Mapping[str, Any]:
    """Return the inputs of a pair by keyword; dots in a file's names nest them.

    Raises:
        ParityError: no such file, not one that can be read, no array in it, or a function that
            gives something else than a mapping.
    """
    path = Path(name)
    if path.suffix in (".npz", ".safetensors"):
        return nested(_read_arrays(path))
    if ":" not in name:
        raise ParityError(f"--inputs: got {name!r}, wanted .npz, .safetensors or pkg.mod:make")
    made = load(name, "--inputs", call=True)
    with said_where():
        found = made()
    if not isinstance(found, Mapping) or not found:
        raise ParityError(f"--inputs: {name} gave {type(found).__name__}, wanted a dict of arrays")
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted names as nested dicts.

    Raises:
        ParityError: lists every name that is an array and holds others.

    >>> nested({"params.w": 1, "params.b": 2, "x": 3})
    {'params': {'w': 1, 'b': 2}, 'x': 3}
    """
    parents = {name[:at] for name in flat for at in range(len(name)) if name[at] == "."}
    raise_all(
        ParityError,
        "--inputs: these names are an array and hold others",
        sorted(parents & set(flat)),
    )
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parts, last = name.split(".")
        inner = tree
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return tree


@contextmanager
def said_where() -> Iterator[None]:
    """Turn what the user's code raises into one message with its place."""
    try:
        with _here():
            yield
    except ParityError:
        raise
    except Exception as error:
        raise ParityError(f"the comparison could not be made: {_where(error)}") from error


def _read_arrays(path: Path) -> dict[str, Any]:
    lfs_pointers.refuse(path, ParityError)
    try:
        require_regular(path)
        if path.suffix == ".safetensors":
            found = dict(safetensors.numpy.load_file(path))
        else:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, numpy and safetensors have errors of their own
        raise ParityError(f"--inputs: cannot read {path}: {reason(error)}") from error
    if not found:
        raise ParityError(f"--inputs: {path} holds no array")
    return found


@contextmanager
def _here() -> Iterator[None]:
    """Look for modules in the current directory too, as ``python -m`` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # their code may have changed the list
            sys.path.remove(here)


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
