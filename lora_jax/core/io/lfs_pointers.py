"""Git LFS pointers, which stand where a file should be after a clone without ``git lfs``."""

from __future__ import annotations

from pathlib import Path

from ..errors import LoraError

_BEGINNINGS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/")

_PROBLEM = (
    "it is a Git LFS pointer, the file itself was not downloaded: run `git lfs pull` in its "
    "repository"
)


def is_pointer(path: Path) -> bool:
    """Tell whether a file is a Git LFS pointer; False for what cannot be read.

    >>> is_pointer(Path("/nowhere"))
    False
    """
    try:
        # A special file is never opened: reading from it may wait for ever.
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return stream.read(64).startswith(_BEGINNINGS)
    except (OSError, ValueError):
        return False


def refuse(path: Path, error: type[LoraError]) -> None:
    """Raise where a file is a pointer.

    Args:
        path: of the file.
        error: what is raised.

    Raises:
        LoraError: of the kind ``error``.
    """
    if is_pointer(path):
        raise error(f"cannot read {path}: {_PROBLEM}")
