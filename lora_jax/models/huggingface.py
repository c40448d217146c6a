"""Hugging Face model directories to parameter trees and back; safetensors only, never pickle."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..core import paths
from ..core.errors import AssetError, ConfigError, raise_all
from ..core.io import lfs_pointers
from ..core.io.atomic_files import claimed
from ..core.io.intake import is_inside, read_bytes, require_regular
from .assets import check_model, refuse_other_layout, resolve_model
from .bert import BertConfig, BertForSequenceClassification, BertModel, read_json

Params = Mapping[str, Any]

TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
"""What PyTorch calls a Flax leaf; only a ``kernel`` is also transposed."""

PREFIX = "bert."
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)

_OLD_LEAVES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# Constants, and the heads of BERT's own pretraining, which neither of our models has.
_IGNORED = ("embeddings.position_ids", "cls.")
_LAYER = re.compile(r"encoder\.layer\.(\d{1,9})\.")

# What is traced before it is compared, so that each tensor that is missing is named.
_MOST_LAYERS = 64

_FLOATS = ("F64", "F32", "F16", "BF16")


def from_pretrained(
    name_or_directory: str | Path,
    num_labels: int | None = None,
    *,
    seed: int = 0,
    cache: str | Path | None = None,
) -> tuple[BertModel | BertForSequenceClassification, Params]:
    """Return a BERT and its float32 parameters: ``model.apply({"params": params}, ids, mask)``.

    Args:
        name_or_directory: a model directory, ``minilm`` or a hub id, see ``resolve_model``.
        num_labels: classes of the classifier; none gives the bare ``BertModel``. A classifier
            in the file is used; otherwise its kernel is drawn from a normal distribution with
            deviation ``initializer_range`` and its bias is zero.
        seed: what the classifier is drawn from.
        cache: where downloads are kept, see ``cache_directory``.

    Raises:
        AssetError: the files cannot be had, are broken or do not fit ``config.json``, or the
            file's classifier has another number of labels.
        ConfigError: ``config.json`` asks for something that is not supported.
    """
    directory = resolve_model(name_or_directory, cache=cache)
    config = BertConfig.from_file(directory / "config.json")
    params = load_params(directory)
    if num_labels is None:
        return BertModel(config), params.get("bert", params)
    model = BertForSequenceClassification(config, num_labels)
    if "classifier" not in params:
        params = {"bert": params, "classifier": _draw_classifier(config, num_labels, seed)}
    stored = params["classifier"]["bias"].shape[0]
    if stored != num_labels:
        raise AssetError(
            f"classifier of {directory}: got {stored} labels, wanted {num_labels}; pass "
            f"num_labels={stored}, or start from a model without a classifier"
        )
    return model, params


def load_params(directory: str | Path) -> Params:
    """Read ``model.safetensors`` as the parameters of the module that ``config.json`` describes.

    Every tensor becomes float32. The tree is that of ``BertForSequenceClassification`` when
    the file holds a classifier, else that of ``BertModel``; a ``bert.`` prefix in the file
    makes no difference, and pretraining heads (``cls.``) are left out.

    Raises:
        AssetError: a file is missing or broken, or tensors are missing, unexpected or of the
            wrong shape or type, or not finite; all are listed.
    """
    directory = check_model(directory)
    config = BertConfig.from_file(directory / "config.json")
    path = directory / "model.safetensors"
    with open_weights(path) as file:
        keys, problems = _stored_names(file.keys())
        shapes = {name: tuple(file.get_slice(key).get_shape()) for name, key in keys.items()}
        heads = (shapes.get("classifier.weight"), shapes.get("classifier.bias"))
        _refuse_other_depth(path, config, keys)
        template = _template(config, next((shape[0] for shape in heads if shape), None))
        wanted = {_name_in_file(p): _torch_shape(p, s) for p, s in paths.flatten(template).items()}
        problems += _misfits(shapes, wanted)
        for name, key in keys.items():
            if (dtype := file.get_slice(key).get_dtype()) not in _FLOATS:
                problems.append(f"{name}: got type {dtype}, wanted one of {', '.join(_FLOATS)}")
        raise_all(AssetError, f"{path} does not fit its config.json", problems)
        leaves = {
            p: _flax_array(p, file.get_tensor(keys[_name_in_file(p)]))
            for p in paths.flatten(template)
        }
    broken = [f"{_name_in_file(p)}: {said}" for p, x in leaves.items() if (said := not_finite(x))]
    raise_all(AssetError, f"{path} holds values that are not finite; download it again", broken)
    return paths.replace(template, leaves)


def to_state_dict(params: Params) -> dict[str, np.ndarray]:
    """Return transformers' state dict: the same parameters, torch's names, C-contiguous.

    >>> state = to_state_dict({"pooler.dense": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}})
    >>> {name: array.shape for name, array in state.items()}
    {'pooler.dense.bias': (3,), 'pooler.dense.weight': (3, 2)}
    """
    return {
        torch_name(path): np.ascontiguousarray(_transposed(path, np.asarray(leaf)))
        for path, leaf in paths.flatten(params).items()
    }


def torch_name(path: str) -> str:
    """Return the state-dict name of a parameter's path.

    >>> torch_name("bert.encoder.layer.0.output.LayerNorm.scale")
    'bert.encoder.layer.0.output.LayerNorm.weight'
    """
    return f"{paths.module_of(path)}.{TORCH_LEAVES[paths.leaf_name(path)]}"


def save_model(
    directory: str | Path,
    params: Params,
    source_directory: str | Path,
    *,
    classes: tuple[str, ...] | None = None,
    overwrite: bool = False,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Write a full model that ``transformers`` loads: weights, ``config.json``, tokenizer files.

    Args:
        directory: where to write; created, and empty unless ``overwrite``.
        params: a tree as ``from_pretrained`` returns it; with a classifier the model is
            saved as ``BertForSequenceClassification``, else as the source's bare BERT, with
            the source's prefix.
        source_directory: the model that the parameters came from.
        classes: the label names, in order; ``LABEL_0``, … when not given.
        overwrite: replace files of the same name.
        note: called with a line where a tokenizer's file is a link out of the source.

    Returns:
        The directory.

    Raises:
        AssetError: the parameters do not fit the source's ``config.json``, or are not finite.
        ConfigError: there are not as many ``classes`` as labels.
        OutputError: the directory is occupied or cannot be written.
    """
    contents = model_files(params, source_directory, classes=classes, note=note)
    with claimed(directory, overwrite=overwrite) as output:
        refuse_other_layout(output.directory, contents)
        output.write(contents)
    return output.directory


def model_files(
    params: Params,
    source_directory: str | Path,
    *,
    classes: tuple[str, ...] | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, bytes]:
    """Return the files that ``save_model`` writes, by name; see there."""
    source = check_model(source_directory)
    labels = params["classifier"]["bias"].shape[0] if "classifier" in params else None
    template = _template(BertConfig.from_file(source / "config.json"), labels)
    wanted = {torch_name(p): _torch_shape(p, s) for p, s in paths.flatten(template).items()}
    tensors = to_state_dict(params)
    problems = _misfits({name: array.shape for name, array in tensors.items()}, wanted)
    raise_all(AssetError, f"these parameters do not fit {source / 'config.json'}", problems)
    broken = [f"{name}: {said}" for name, x in tensors.items() if (said := not_finite(x))]
    heading = "these parameters are not finite, so that nothing is written; is the scale too large?"
    raise_all(AssetError, heading, broken)
    if labels is None and _has_prefix(source / "model.safetensors"):
        tensors = {PREFIX + name: array for name, array in tensors.items()}
    config = _saved_config(read_json(source / "config.json"), tensors, labels, classes)
    contents = {
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
        "config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    there = [name for name in TOKENIZER_FILES if os.path.lexists(source / name)]
    own = [name for name in there if is_inside(source / name, source)]
    contents |= {name: read_bytes(source / name) for name in own}
    if note is not None and len(own) < len(there):
        others = ", ".join(name for name in there if name not in own)
        note(f"not copied, as they are no regular files of the model's directory: {others}")
    return contents


def not_finite(array: jax.Array | np.ndarray) -> str | None:
    """Return how many values of an array are NaN or infinite; None for none.

    >>> not_finite(np.array([1.0, np.nan])), not_finite(np.ones(2))
    ('1 of 2 values', None)
    """
    bad = array.size - int(np.isfinite(np.asarray(array, np.float32)).sum())
    return f"{bad:,} of {array.size:,} values" if bad else None


def _saved_config(
    config: dict[str, Any],
    tensors: Mapping[str, np.ndarray],
    labels: int | None,
    classes: tuple[str, ...] | None,
) -> dict[str, Any]:
    dtype = str(next(iter(tensors.values())).dtype)
    saved = config | {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    if labels is None:
        return saved | {"architectures": ["BertModel"]}
    classes = tuple(f"LABEL_{i}" for i in range(labels)) if classes is None else classes
    if len(classes) != labels or len(set(classes)) != labels:
        raise ConfigError(f"classes: got {classes}, wanted {labels} different names")
    return saved | {
        "architectures": ["BertForSequenceClassification"],
        "num_labels": labels,
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
    }


def _draw_classifier(config: BertConfig, num_labels: int, seed: int) -> Params:
    kernel = jax.random.normal(jax.random.key(seed), (config.hidden_size, num_labels), jnp.float32)
    return {
        "kernel": kernel * config.initializer_range,
        "bias": jnp.zeros(num_labels, jnp.float32),
    }


def _template(config: BertConfig, num_labels: int | None) -> Params:
    bare = num_labels is None
    model = BertModel(config) if bare else BertForSequenceClassification(config, num_labels)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids, ids)["params"]


def _refuse_other_depth(path: Path, config: BertConfig, names: Mapping[str, str]) -> None:
    """Raise before anything is traced where ``config.json`` has other layers than the file."""
    found = {int(one[1]) for name in names if (one := _LAYER.match(name))}
    there = 1 + max(found, default=-1)
    if there < config.num_hidden_layers and config.num_hidden_layers > _MOST_LAYERS:
        raise AssetError(
            f"{path} does not fit its config.json: num_hidden_layers: got "
            f"{config.num_hidden_layers:,}, the file has {there}"
        )


def _stored_names(keys: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the file's keys by their name without prefix, and the names that occur twice."""
    stored: dict[str, str] = {}
    problems = []
    for key in keys:
        name = key.removeprefix(PREFIX)
        for old, new in _OLD_LEAVES.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        if name in stored:
            problems.append(f"{name}: got two, {stored[name]} and {key}, wanted one")
        elif not name.startswith(_IGNORED):
            stored[name] = key
    return stored, problems


def _misfits(
    got: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> list[str]:
    return [
        f"{name}: got {got.get(name, 'nothing')}, wanted {wanted.get(name, 'no such tensor')}"
        for name in sorted(got.keys() | wanted.keys())
        if got.get(name) != wanted.get(name)
    ]


def _name_in_file(path: str) -> str:
    return torch_name(path).removeprefix(PREFIX)


def _torch_shape(path: str, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return leaf.shape[::-1] if paths.leaf_name(path) == "kernel" else leaf.shape


def _transposed(path: str, array: np.ndarray) -> np.ndarray:
    return array.T if paths.leaf_name(path) == "kernel" else array


def _flax_array(path: str, array: np.ndarray) -> jax.Array:
    return jnp.asarray(_transposed(path, array), jnp.float32)


def _has_prefix(path: Path) -> bool:
    with open_weights(path) as file:
        return any(key.startswith(PREFIX) for key in file.keys())


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Give an open safetensors file.

    Raises:
        AssetError: it is no regular file, a pointer to one, or not complete.
    """
    lfs_pointers.refuse(path, AssetError)
    try:
        require_regular(path)
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise AssetError(
            f"{path} is not a complete safetensors file: {error}. Download it again."
        ) from error
    except OSError as error:
        raise AssetError(f"cannot read {path}: {error.strerror or error}") from error
