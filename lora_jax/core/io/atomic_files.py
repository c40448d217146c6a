"""What writes files: claims a directory, and changes several files together, by ``journal``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError
from . import journal
from .journal import working
from .locks import claim


@dataclass(frozen=True)
class Output:
    """A directory that results go to, and that nobody else claims meanwhile.

    Args:
        directory: where.
    """

    directory: Path

    def write(self, files: Mapping[str, bytes], *, gone: Iterable[str] = ()) -> None:
        """Replace these files together: all of them or, on any failure, none.

        Args:
            files: contents by name in the directory.
            gone: names of old files that do not go with the new ones.

        Raises:
            OutputError: they could not be written; what was there is there.
        """
        with _told(self.directory, files), working(self.directory) as work:
            for name, content in files.items():
                path = work.new / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            work.commit(gone)

    @contextmanager
    def filling(self) -> Iterator[Path]:
        """Give a place for files; at the end they replace the old ones together, as by ``write``.

        Raises:
            OutputError: as ``write``.
        """
        with _told(self.directory, ()), working(self.directory) as work:
            yield work.new
            work.commit()


@contextmanager
def claimed(
    directory: str | Path, *, overwrite: bool = False, remove_empty: bool = False
) -> Iterator[Output]:
    """Create ``directory`` (or accept an empty one), prove that it can be written, and claim it.

    What killed runs left in it is finished or removed first, and does not count.

    Args:
        directory: where results go.
        overwrite: allow a directory that holds files; those of the same name are replaced
            together and all others are left alone.
        remove_empty: remove it at the end, if it was made and nothing was put into it.

    Raises:
        OutputError: it holds something and ``overwrite`` is false, is a file, cannot be
            written, or another run has claimed it.
    """
    directory = Path(directory)
    made = _missing(directory) if remove_empty else []
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)
        try:
            occupied = _prepared(directory, stack)
        except OSError as error:
            raise OutputError(
                f"cannot write to {directory}: {error.strerror or error}. Choose another directory."
            ) from error
        if occupied and not overwrite:
            raise OutputError(
                f"{directory} already holds files. Choose another directory, or pass --overwrite "
                "(overwrite=True) to replace files of the same name; others are never removed."
            )
        yield Output(directory)


def output_directory(directory: str | Path, *, overwrite: bool = False) -> Path:
    """Create ``directory`` as ``claimed`` does, without keeping others from it.

    Raises:
        OutputError: as ``claimed``.
    """
    with claimed(directory, overwrite=overwrite) as output:
        return output.directory


def write_atomic(files: Mapping[Path, bytes]) -> None:
    """Write every file whole or leave the old ones as they were.

    All contents are written beside their targets first and synced; only then do they take
    their places, so a full disk is met before any old file is touched.

    Args:
        files: contents by target path, all in one directory, which must exist.

    Raises:
        OutputError: the contents could not be written; no target was changed by the failure.
    """
    if not files:
        return
    [directory] = {path.parent for path in files}
    with _told(directory, [path.name for path in files]):
        journal.sweep(directory)
        with working(directory) as work:
            for path, content in files.items():
                (work.new / path.name).write_bytes(content)
            work.commit()


def _missing(directory: Path) -> list[Path]:
    """Return the directories that have to be made, from the inside out."""
    missing = []
    for path in (directory, *directory.parents):
        try:
            if path.exists():
                break
        except OSError:
            break
        missing.append(path)
    return missing


def _remove_empty(directories: list[Path]) -> None:
    for path in directories:
        with contextlib.suppress(OSError):
            os.rmdir(path)


def _prepared(directory: Path, stack: contextlib.ExitStack) -> bool:
    """Make, claim and tidy a directory; return whether it holds files that are not ours."""
    directory.mkdir(parents=True, exist_ok=True)
    if not claim(directory, stack):
        raise OutputError(
            f"another run is writing to {directory}. Wait until it has ended, or choose another "
            "directory."
        )
    journal.sweep(directory)
    with working(directory):
        pass
    return bool(set(directory.iterdir()) - set(journal.works(directory)))


@contextmanager
def _told(directory: Path, names: Iterable[str]) -> Iterator[None]:
    """Turn what the system says into an error that is true of what was there."""
    try:
        yield
    except OSError as error:
        what = ", ".join(str(directory / name) for name in names)
        known = error.filename and journal.PREFIX not in str(error.filename)
        at = f" ({error.filename})" if known else ""
        raise OutputError(
            f"cannot write {what or f'to {directory}'}: {error.strerror or error}{at}. "
            "Free some space or choose another place; nothing that was there has changed."
        ) from error
