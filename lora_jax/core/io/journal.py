"""Below ``atomic_files``: a draft, one deciding rename, and recovery by the next reader.

A writer has a working directory inside the one that it writes to, with a lock that ends with it::

    .lora-jax-4f0c…/lock          held while its owner lives
    .lora-jax-4f0c…/draft/new/    what is being written
    .lora-jax-4f0c…/draft/gone/   the names of files that go with the old set
    .lora-jax-4f0c…/commit/       the draft, renamed: from then on the set is the new one
    .lora-jax-4f0c…/old/          what was there, until all is in its place

After the one rename that decides, the old files are moved away, weights first, and the new ones
put in their places, weights last. In between the weights are missing, so that readers who know
nothing of this, PEFT or transformers, fail instead of reading a mixture. Ours put the rest in its
place first, if nobody lives who would (``settle``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoraError, OutputError
from . import signals
from .locks import is_at, try_lock

PREFIX = ".lora-jax-"

# Taking a directory whose last owner is just leaving needs another go.
_TRIES = 100
# How long a reader waits for a living writer, which is in the middle of a few renames.
_PATIENCE_SECONDS = 10.0
_WEIGHTS = (".safetensors", ".index.json")


@dataclass(frozen=True)
class Work:
    """A working directory, locked by this process.

    Args:
        directory: what is written to.
        path: the working directory in it.
    """

    directory: Path
    path: Path

    @property
    def new(self) -> Path:
        """Where the files of the next commit are written; made if need be."""
        path = self.path / "draft" / "new"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, gone: Iterable[str] = (), *, aside: bool = True) -> None:
        """Put what is in ``new`` in its place, all of it or nothing.

        Args:
            gone: names that go with the old set; those that are not there do not matter.
            aside: move the old files away first, so that no reader meets a mixture, and a
                failure puts them back. Without it each is replaced in one step, for
                files that belong together by their content.

        Raises:
            OSError: something failed; what was there is there.
            OutputError: something failed, and so did putting things back: the new set stands.
        """
        new, target = self.new, self.path / "commit"
        names = _names(new)
        going = [one for one in gone if one not in names and os.path.lexists(self.directory / one)]
        _refuse_directories(self.directory, [*names, *going])
        for name in names:
            _sync(new / name)
        with signals.waiting():
            if len(names) == 1 and not going:
                os.replace(new / names[0], self.directory / names[0])
                return
            marks = new.parent / "gone"
            for name in going:
                (marks / name).parent.mkdir(parents=True, exist_ok=True)
                (marks / name).touch()
            os.replace(new.parent, target)
            _sync_directory(self.path)
            try:
                _forward(self.directory, self.path, self._aside if aside else None)
            except OSError as error:
                if aside:
                    self._back(names, error)
                raise
            _sync_directory(self.directory)
            with contextlib.suppress(OSError):
                _recover(self.directory, self.path)

    def _aside(self, name: str) -> None:
        old = self.path / "old" / name
        old.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.directory / name, old)

    def _back(self, names: list[str], error: OSError) -> None:
        """Undo what ``_forward`` did; the rename of ``commit`` is the last, as it was the first."""
        new, old = self.path / "commit" / "new", self.path / "old"
        try:
            for name in names:
                if not os.path.lexists(new / name):
                    os.replace(self.directory / name, new / name)
            for name in _names(old):
                os.replace(old / name, self.directory / name)
            os.replace(self.path / "commit", self.path / "draft")
        except OSError as second:
            raise OutputError(
                f"cannot put {', '.join(names)} in their places: {error.strerror or error}; nor "
                f"what was there back: {second.strerror or second}. The new files are whole, and "
                f"the next command on {self.directory} puts them in their places."
            ) from error


@contextmanager
def working(directory: Path) -> Iterator[Work]:
    """Make and lock a working directory in ``directory``, and remove it at the end.

    Raises:
        OSError: it cannot be made.
    """
    while (handle := _take(path := directory / f"{PREFIX}{uuid.uuid4().hex[:12]}")) is None:
        pass  # somebody has just removed it as a dead one's
    try:
        yield Work(directory, path)
    finally:
        _leave(directory, path, handle)


def settle(directory: Path, error: type[LoraError] = OutputError) -> Path:
    """Return ``directory``; finish what a killed writer has decided and not put in its place.

    Raises:
        LoraError: of the class ``error``: it cannot be finished here, so the files are a mixture.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while undone := [path for path in works(directory) if _is_committed(path)]:
        try:
            for path in undone:
                _finish(directory, path)
        except OSError as failure:
            raise error(
                f"{directory} holds a part of an old set of files and a part of a new one, as a "
                f"run was killed while it put them there; finishing that failed: "
                f"{failure.strerror or failure}. Make the directory writable, or copy it where "
                "it is."
            ) from failure
        if time.monotonic() > deadline:
            raise error(f"another run is writing to {directory}; try again when it has ended")
        time.sleep(0.01)
    return directory


def sweep(directory: Path) -> None:
    """Finish or remove what writers left that live no more; nothing else is touched."""
    for path in works(directory):
        with contextlib.suppress(OSError):
            _finish(directory, path, blindly=_is_committed(path))


def works(directory: Path) -> list[Path]:
    """Return the working directories in a directory; none where there is no such directory."""
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(PREFIX)]
    except OSError:
        return []
    found = [directory / name for name in sorted(names)]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _finish(directory: Path, path: Path, *, blindly: bool = True) -> None:
    """Finish and remove a working directory, unless its owner lives; ``blindly``: or may live."""
    handle = _take(path, make=False, blindly=blindly)
    if handle is None:
        return
    try:
        _recover(directory, path)
    finally:
        _leave(directory, path, handle)


def _take(path: Path, *, make: bool = True, blindly: bool = True) -> int | None:
    """Return the lock of a working directory; None if somebody has it, or it is not there."""
    for _ in range(_TRIES):
        if make:
            path.mkdir(exist_ok=True)
        try:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            handle = os.open(path / "lock", flags, 0o666)
        except FileNotFoundError:
            if not make:
                return None
            continue
        got = try_lock(handle)
        if not got and not (got is None and blindly):
            os.close(handle)
            return None
        if is_at(handle, path / "lock"):
            return handle
        os.close(handle)
    return None


def _leave(directory: Path, path: Path, handle: int) -> None:
    """Remove a working directory and give its lock back; what is committed is finished first."""
    try:
        with contextlib.suppress(OSError):
            _recover(directory, path)
            # Whoever has opened the lock by now sees that it is not the one at this name.
            (path / "lock").unlink()
            path.rmdir()
    finally:
        os.close(handle)


def _recover(directory: Path, path: Path) -> None:
    """Finish what is committed, and remove everything but the lock."""
    if _is_committed(path):
        _forward(directory, path, lambda name: (directory / name).unlink())
    for entry in sorted(path.iterdir(), reverse=True):  # ``old`` before ``commit``
        if entry.name == "lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _is_committed(path: Path) -> bool:
    # Nobody's links are followed: a directory may have come from anywhere.
    parts = [path / "commit", path / "commit" / "new"]
    return all(part.is_dir() and not part.is_symlink() for part in parts)


def _forward(directory: Path, path: Path, away: Callable[[str], None] | None) -> None:
    """Take old files away and put new ones in; beginning again where it was broken off is right."""
    commit = path / "commit"
    new, gone = _names(commit / "new"), _names(commit / "gone")
    _refuse_directories(directory, [*new, *gone])
    for name in [*new, *gone] if away else []:
        if away and os.path.lexists(directory / name):
            away(name)
    for name in reversed(new):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(commit / "new" / name, directory / name)


def _names(root: Path) -> list[str]:
    """Return the files below a directory by their relative names, weights first."""
    found = [path for path in root.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = [path.relative_to(root).as_posix() for path in found]
    return sorted(names, key=lambda name: (not name.endswith(_WEIGHTS), name))


def _refuse_directories(directory: Path, names: Iterable[str]) -> None:
    """Raise where a file cannot be put, before anything is."""
    for name in names:
        if (directory / name).is_dir():
            raise IsADirectoryError(21, "Is a directory", str(directory / name))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_directory(path: Path) -> None:
    """Have the renames in a directory reach the disk, where a system can say so."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
