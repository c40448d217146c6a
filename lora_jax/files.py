"""Writing files so that a crash, a full disk or a second run loses nothing."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .errors import OutputError


def write_atomic(files: Mapping[Path, bytes]) -> None:
    """Write every file whole or leave the old ones as they were.

    All contents go to temporary files beside their targets first and are synced; only then
    is each renamed into place, so a full disk is met before any old file is touched.

    Args:
        files: contents by target path; the parent directories must exist.

    Raises:
        OutputError: the contents could not be written; no target was changed by the failure.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for target, content in files.items():
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            staged.append((Path(name), target))
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o666 & ~_umask())
        for temporary, target in staged:
            os.replace(temporary, target)
    except OSError as error:
        names = ", ".join(str(path) for path in files)
        raise OutputError(
            f"cannot write {names}: {error.strerror or error}. "
            "Free some space or choose another place; nothing that was there has changed."
        ) from error
    finally:
        for temporary, _ in staged:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def output_directory(directory: str | Path, *, overwrite: bool = False) -> Path:
    """Create ``directory`` (or accept an empty one) and prove that it can be written.

    Args:
        directory: where results go.
        overwrite: allow a directory that holds files; those of the same name are replaced
            one by one and all others are left alone.

    Raises:
        OutputError: it holds something and ``overwrite`` is false, is a file, or cannot be
            written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        occupied = any(directory.iterdir())
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {directory}: {error.strerror or error}. Choose another directory."
        ) from error
    if occupied and not overwrite:
        raise OutputError(
            f"{directory} already holds files. Choose another directory, or pass --overwrite "
            "(overwrite=True) to replace files of the same name; others are never removed."
        )
    return directory


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
