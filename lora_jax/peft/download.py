"""Where an adapter is: a directory, or a repository of the hub that is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from .. import assets
from ..errors import AdapterError, AssetError
from ..journal import settle

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

MISSING_HUB = 'huggingface_hub is not installed: pip install "lora_jax[hub]"'

_REPO = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)


def located(name: str | Path, *files: str) -> Path:
    """Return the directory of an adapter, downloading it where the name is a hub id.

    Both files are of one commit. They are kept in the cache of ``huggingface_hub``, which asks
    the hub for newer ones each time; with ``HF_HUB_OFFLINE=1`` or ``LORA_JAX_OFFLINE=1`` it
    gives what it has.

    Args:
        name: a directory, or a string ``user/repo`` or ``user/repo@revision`` that names none.
        files: what is needed of a repository; by default the configuration and the weights.

    Raises:
        AdapterError: the hub cannot be reached or lacks a file, or its client is not installed;
            or the directory was left in the middle of a change that cannot be finished here.
    """
    found = _REPO.fullmatch(name) if isinstance(name, str) else None
    if found is None or Path(name).exists():
        return settle(Path(name), AdapterError)
    repo, revision = found.groups()
    heading = f"no directory {name!r} was found, and {assets.endpoint()}/{repo} gave no adapter"
    offline = any(map(assets.is_set, assets.OFFLINE))
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise AdapterError(f"{heading}: {MISSING_HUB}") from error
    try:
        if not offline:
            assets.probe(assets.endpoint())
        directory = None
        for file in files or (CONFIG_NAME, WEIGHTS_NAME):
            path = hf_hub_download(
                repo,
                file,
                # The second file is of the first one's commit, also when a push comes between.
                revision=directory.name if directory else revision,
                endpoint=assets.endpoint(),
                local_files_only=offline,
            )
            directory = Path(path).parent
    except AssetError as error:
        raise AdapterError(f"{heading}: {error}. HF_HUB_OFFLINE=1 reads the cache.") from error
    # Its failures share no base class, and each means the same here.
    except Exception as error:
        raise AdapterError(
            f"{heading}: {assets.one_line(str(error))}. An adapter has {CONFIG_NAME} and "
            f"{WEIGHTS_NAME}; pickles are never read."
        ) from error
    assert directory is not None
    return directory
