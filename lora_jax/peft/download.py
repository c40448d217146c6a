"""Where an adapter is: a directory, or a repository of the hub that is downloaded."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from ..core.errors import AdapterError, AssetError, LoraError
from ..core.io import hub_endpoint, lfs_pointers
from ..core.io.intake import parse_json, read_bytes, reason
from ..core.io.journal import settle
from ..core.io.network import bytes_in, failure, within

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"

MISSING_HUB = 'huggingface_hub is not installed: pip install "lora_jax[hub]"'

_log = logging.getLogger(__name__)

_NAME = r"\w[\w.-]*"
_REPO = re.compile(rf"({_NAME}/{_NAME})((?:/{_NAME})*)(?:@(.*))?", re.ASCII | re.DOTALL)
_FOLDER = re.compile(rf"{_NAME}(?:/{_NAME})*", re.ASCII)

# The hub's client makes a path of it: no part may be "..", and none empty.
_REVISION = _FOLDER


def located(name: str | Path, *files: str, subfolder: str | None = None) -> Path:
    """Return the directory of an adapter, downloading it where the name is a hub id.

    All files are of one commit. They are kept in the cache of ``huggingface_hub``, which asks
    the hub for newer ones each time; with ``HF_HUB_OFFLINE=1`` or ``LORA_JAX_OFFLINE=1`` it
    gives what it has.

    Args:
        name: a directory, or a string ``user/repo``, ``user/repo/folder`` or either with
            ``@revision`` that names none.
        files: what is needed of a repository; by default the configuration and the weights,
            which may be in shards.
        subfolder: where in the directory or repository the adapter is.

    Raises:
        AdapterError: the hub cannot be reached or lacks a file, its client is not installed, or
            ``subfolder`` leads elsewhere; or the directory was left in the middle of a change
            that cannot be finished here.
    """
    if subfolder and not _FOLDER.fullmatch(subfolder):
        raise AdapterError(f"subfolder: got {subfolder!r}, wanted names joined by '/'")
    found = _REPO.fullmatch(name) if isinstance(name, str) else None
    if found is None or os.path.exists(name):
        return settle(Path(name) / (subfolder or ""), AdapterError)
    repo, inner, revision = found.groups()
    if revision is not None and not (_REVISION.fullmatch(revision) and len(revision) < 200):
        raise AdapterError(
            f"revision: got {revision!r} for {repo}, wanted a branch, a tag or a commit"
        )
    folder = "/".join(filter(None, [inner.lstrip("/"), subfolder]))
    where = f"{hub_endpoint.endpoint()}/{repo}"
    heading = f"no directory {name!r} was found, and {where} gave no adapter"
    offline = any(map(hub_endpoint.is_set, hub_endpoint.OFFLINE))
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise AdapterError(f"{heading}: {MISSING_HUB}") from error
    directory, commit = None, revision
    kept = f"models--{repo.replace('/', '--')}"

    def download(file: str) -> Path:
        nonlocal commit
        path = within(
            lambda: hf_hub_download(
                repo,
                f"{folder}/{file}" if folder else file,
                # Further files are of the first one's commit, also when a push comes between.
                revision=commit,
                endpoint=hub_endpoint.endpoint(),
                local_files_only=offline,
            ),
            f"{hub_endpoint.endpoint()}/{repo}",
            arrived=lambda: bytes_in(Path(constants.HF_HUB_CACHE) / kept),
            say=_log.warning,
        )
        commit = Path(path).parents[len(folder.split("/")) if folder else 0].name
        return Path(path).parent

    try:
        if not offline:
            hub_endpoint.probe(hub_endpoint.endpoint())
        for file in files or (CONFIG_NAME, WEIGHTS_NAME):
            try:
                directory = download(file)
            except EntryNotFoundError as missing:
                if file != WEIGHTS_NAME:
                    raise
                directory = _download_shards(download, missing)
    except AssetError as error:
        raise AdapterError(f"{heading}: {error}. HF_HUB_OFFLINE=1 reads the cache.") from error
    except AdapterError:
        raise
    # Its failures share no base class, and each means the same here.
    except Exception as error:
        raise AdapterError(
            f"{heading}: {hub_endpoint.one_line(failure(error))}. An adapter has {CONFIG_NAME} and "
            f"{WEIGHTS_NAME}; pickles are never read."
        ) from error
    assert directory is not None
    return directory


def _download_shards(download: Callable[[str], Path], missing: Exception) -> Path:
    """Download the index and all of its shards; raise what was missing before without it."""
    try:
        directory = download(INDEX_NAME)
    except Exception:
        raise missing from None
    for name in sorted(set(read_index(directory / INDEX_NAME).values())):
        download(name)
    return directory


def read_index(path: Path, error: type[LoraError] = AdapterError) -> dict[str, str]:
    """Return the shard of every tensor.

    Args:
        path: the index.
        error: what is raised.

    Raises:
        LoraError: of the kind ``error``: it is no index, is empty or names files elsewhere.
    """
    lfs_pointers.refuse(path, error)
    try:
        given = parse_json(read_bytes(path))["weight_map"]
        where = {str(key): str(name) for key, name in given.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise error(f"{path} is not an index of shards: {reason(problem)}") from problem
    if odd := sorted({name for name in where.values() if Path(name).name != name}):
        raise error(f"{path} names files elsewhere: {', '.join(odd)}")
    if not where:
        raise error(f"{path} names no tensors")
    return where
