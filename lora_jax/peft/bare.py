"""An adapter directory without its model: read by the names in the file, and written again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import config as configs
from .. import paths
from ..adapter import Adapter, Adapters, Full, rank
from ..config import LoraConfig
from ..errors import AdapterError, raise_all
from ..naming import EMBEDDING
from .config_json import AdapterFile
from .download import located
from .files import load_adapter_file, read_weights, write_directory
from .strict import target_problems
from .tensors import PREFIX, is_finite

T = TypeVar("T")

LINEAR, LOOKED_UP = "oi", "io"

# The axes of the weight in PyTorch, and what PEFT calls its A and B.
_KEYS = {
    LINEAR: (".lora_A.weight", ".lora_B.weight"),
    LOOKED_UP: (".lora_embedding_A", ".lora_embedding_B"),
}
_WRAPPED = ".base_layer"


def open_adapter(directory: str | Path) -> tuple[AdapterFile, dict[str, Adapter | Full]]:
    """Read a PEFT directory by itself: no model, no plan; all of it or nothing.

    Args:
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``; or a hub id.

    Returns:
        What the configuration says, and the adapters by PyTorch module name, A ``(in, r)`` and
        B ``(r, out)``, with the axes that the weight has in PyTorch: ``"oi"``, or ``"io"`` for
        a weight whose rows are looked up. A module stored as ``Conv1D`` is ``"oi"``, too: the
        file does not tell. Leaves trained in full have their parameter's name.

    Raises:
        AdapterError: a file is missing or unreadable; or lists every tensor without its other
            half, unexpected, misshapen, of a rank that is not the configuration's, of a dtype
            that is not floating point, or not finite, and every name where targets and
            tensors disagree.

    Source: the file format of PEFT 0.21.2.
    """
    directory = located(directory)
    file = load_adapter_file(directory)
    if file.config.use_dora:
        raise AdapterError(
            f"{directory} is DoRA's, which scales the base model's weights: plan the model with "
            "load_config(directory) and read it with load_pretrained"
        )
    tensors = read_weights(directory)
    origin = f"{directory} is not a whole adapter"
    halves, full, problems = _sorted(tensors, file)
    problems += [p for module, found in halves.items() for p in _pair_problems(module, found, file)]
    problems += target_problems(file.config, halves)
    raise_all(AdapterError, origin, sorted(problems))
    adapters: dict[str, Adapter | Full] = {}
    for module, found in halves.items():
        axes, a, b = found["axes"], found["a"], found["b"]
        r, alpha = configs.rank_and_alpha(file.config, module)
        adapters[module] = Adapter(
            jnp.asarray(np.ascontiguousarray(a.T)),
            jnp.asarray(np.ascontiguousarray(b.T)),
            configs.scale(file.config, r, alpha),
            axes,
            file.config.lora_dropout,
        )
    return file, adapters | {name: Full(jnp.asarray(value)) for name, value in full.items()}


def write_adapter(
    directory: str | Path,
    file: AdapterFile,
    adapters: Adapters,
    *,
    embeddings: Collection[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what ``open_adapter`` returns; equal inputs give equal bytes.

    Args:
        directory: where; created, must be empty unless ``overwrite``.
        file: the configuration. Its ranks and scales must be those of the adapters:
            ``fitted(file, adapters)`` makes them so.
        adapters: by PyTorch module name, with axes ``"oi"``, or ``"io"`` for embeddings;
            leaves trained in full by parameter name.
        embeddings: the modules whose rows are looked up. If not given, those with axes ``"io"``,
            which need a name that embeddings have: a kernel is ``"io"``, too, in JAX.
        overwrite: replace the files of an earlier adapter; nothing else is touched.

    Raises:
        AdapterError: lists every name, axis, rank, scale and value that the file cannot hold.
        OutputError: the directory holds something or cannot be written.
    """
    pairs = {name: one for name, one in adapters.items() if isinstance(one, Adapter)}
    problems = [p for module, one in pairs.items() for p in _unwritable(module, one, file.config)]
    if embeddings is None:
        embeddings = [name for name in pairs if EMBEDDING.search(name)]
    problems += [
        f"{name}: got axes 'io', those of an embedding; name it in embeddings=…, or give it the "
        "axes 'oi' of a linear layer's weight in PyTorch"
        for name, one in pairs.items()
        if one.axes == LOOKED_UP and name not in embeddings
    ]
    problems += target_problems(file.config, pairs)
    raise_all(AdapterError, "these adapters do not fit their configuration", sorted(problems))
    tensors = {}
    for name, one in adapters.items():
        if isinstance(one, Adapter):
            for key, half in zip(_KEYS[one.axes], (one.a, one.b), strict=True):
                tensors[f"{PREFIX}{name}{key}"] = np.ascontiguousarray(np.asarray(half).T)
        else:
            owner, _, leaf = name.rpartition(paths.SEPARATOR)
            wrapped = _WRAPPED if owner in pairs else ""
            key = f"{PREFIX}{owner}{wrapped}.{leaf}"
            tensors[key] = np.ascontiguousarray(np.asarray(one.value))
    broken = [f"{key}: NaN or infinite" for key, t in tensors.items() if not is_finite(t)]
    raise_all(AdapterError, "these adapters hold values that are not finite", broken)
    return write_directory(directory, file, tensors, overwrite=overwrite)


def fitted(file: AdapterFile, adapters: Adapters) -> AdapterFile:
    """Return the configuration whose ranks, scales and targets are those of these adapters.

    The commonest rank and scale become ``r`` and ``lora_alpha``, the others go into
    ``rank_pattern`` and ``alpha_pattern``. The targets stay where they mean these modules and
    no listed name is idle; otherwise every module is named in full.

    >>> pair = Adapter(jnp.ones((3, 4)), jnp.ones((4, 2)), scale=0.5, axes="oi")
    >>> file = AdapterFile(LoraConfig(r=2, target_modules=["q"]))
    >>> config = fitted(file, {"0.v": pair, "1.v": pair}).config
    >>> config.r, config.lora_alpha, config.target_modules
    (4, 2.0, ('0.v', '1.v'))
    """
    pairs = {name: one for name, one in adapters.items() if isinstance(one, Adapter)}
    if not pairs:
        return file
    ranks = {name: rank(one) for name, one in pairs.items()}
    alphas = {name: float(np.asarray(one.scale)) * ranks[name] for name, one in pairs.items()}
    r, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    config = replace(
        file.config,
        r=r,
        lora_alpha=alpha,
        use_rslora=False,
        rank_pattern={name: n for name, n in ranks.items() if n != r},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
    )
    if target_problems(config, pairs):
        config = replace(
            config,
            target_modules=tuple(sorted(pairs)),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
    return replace(file, config=config)


def _sorted(
    tensors: Mapping[str, np.ndarray], file: AdapterFile
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray], list[str]]:
    """Return both halves by module, what is trained in full by name, and what is wrong."""
    halves: dict[str, dict[str, Any]] = {}
    full, problems = {}, []
    for key in sorted(key for key in tensors if not _said_twice(key, tensors)):
        problems += _tensor_problems(key, tensors[key])
        name = key.removeprefix(PREFIX)
        if name == key:
            problems.append(f"{key}: unexpected, wanted a name that begins with {PREFIX}")
            continue
        for axes, half, suffix in _SUFFIXES:
            if name.endswith(suffix):
                found = halves.setdefault(name.removesuffix(suffix), {"axes": axes})
                if found["axes"] != axes:
                    problems.append(f"{key}: the module has an adapter of another kind, too")
                found[half] = tensors[key]
                break
        else:
            full[name] = tensors[key]
    named = {}
    for name, value in full.items():
        owner, _, leaf = name.rpartition(paths.SEPARATOR)
        module = owner.removesuffix(_WRAPPED)
        wrapped = module != owner
        if wrapped != (module in halves) or not _is_trained(file.config, module, leaf, halves):
            why = "base weights inside the file" if wrapped else "unexpected"
            problems.append(f"{PREFIX}{name}: {why}")
        named[f"{module}.{leaf}"] = value
    return halves, named, problems


def _said_twice(key: str, tensors: Mapping[str, np.ndarray]) -> bool:
    """Tell what PEFT's ``bias="all"`` adds for a saved module: its bias again, and the base's."""
    again = key.replace(".modules_to_save.", ".")
    if again != key and again in tensors:
        return np.array_equal(tensors[key], tensors[again])
    plain = key.replace(".original_module.", ".")
    return plain != key and plain in tensors


_SUFFIXES = [
    (axes, half, suffix) for axes in _KEYS for half, suffix in zip("ab", _KEYS[axes], strict=True)
]


def _is_trained(config: LoraConfig, module: str, leaf: str, halves: Mapping[str, Any]) -> bool:
    if configs.is_saved(config, module):
        return True
    if leaf not in paths.BIAS_NAMES:
        return False
    return config.bias == "all" or (config.bias == "lora_only" and module in halves)


def _tensor_problems(key: str, tensor: np.ndarray) -> list[str]:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return [f"{key}: got {tensor.dtype}, wanted floating point"]
    if jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
        return [f"{key}: got {tensor.dtype}, which JAX holds only with jax_enable_x64"]
    return [] if is_finite(tensor) else [f"{key}: holds NaN or infinite values"]


def _pair_problems(module: str, found: Mapping[str, Any], file: AdapterFile) -> list[str]:
    names = dict(zip("ab", _KEYS[found["axes"]], strict=True))
    if missing := [f"{PREFIX}{module}{names[half]}: missing" for half in "ab" if half not in found]:
        return missing
    r, _ = configs.rank_and_alpha(file.config, module)
    problems = []
    for half, axis in (("a", 0), ("b", 1)):
        key, shape = f"{PREFIX}{module}{names[half]}", tuple(found[half].shape)
        if len(shape) != 2 or 0 in shape:
            problems.append(f"{key}: got {shape}, wanted a matrix")
        elif shape[axis] != r:
            problems.append(f"{key}: got {shape}, wanted rank {r} on axis {axis}")
    return problems


def _unwritable(module: str, adapter: Adapter, config: LoraConfig) -> list[str]:
    found = []
    if adapter.axes not in _KEYS or adapter.columns is not None or adapter.a.ndim != 2:
        found.append(f"{module}: got axes {adapter.axes!r}, wanted 'oi' or 'io', and all columns")
    if adapter.magnitude is not None:
        found.append(f"{module}: DoRA's magnitude has no place without its model")
    if paths.module_of(module) != module:
        found.append(f"{module}: a parameter's path, wanted the module's name; see `rename`")
    r, alpha = configs.rank_and_alpha(config, module)
    scale = configs.scale(config, r, alpha)
    if rank(adapter) != r:
        found.append(f"{module}: rank got {rank(adapter)}, wanted the configuration's {r}")
    elif adapter.scale is None or not np.isclose(adapter.scale, scale, rtol=1e-6, atol=0).all():
        found.append(f"{module}: scale got {adapter.scale}, wanted the configuration's {scale}")
    return found


def _commonest(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]
