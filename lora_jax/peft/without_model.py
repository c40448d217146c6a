"""An adapter directory without its model: read by the names in the file, and written again."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..core import paths
from ..core.adapter import Adapter, Adapters, Entry, Full, Rows, rank
from ..core.config import lora_config
from ..core.config.lora_config import LoraConfig
from ..core.errors import AdapterError, raise_all
from .base_weights import is_vocabulary
from .checks import idle, refuse_hanging, row_problems, rows_of, target_problems
from .config_json import AdapterFile
from .download import located
from .files import load_adapter_file, read_weights, write_directory
from .keys import PREFIX, ROWS
from .module_tensors import LINEAR, LOOKED_UP, in_file, is_written, part_of
from .module_tensors import problems as part_problems
from .module_tensors import read as read_parts
from .names.naming import EMBEDDING
from .task_heads import with_heads
from .tensors import changed_base, is_finite

T = TypeVar("T")

_WRAPPED = ".base_layer"


def open_adapter(directory: str | Path) -> tuple[AdapterFile, dict[str, Entry]]:
    """Read a PEFT directory by itself: no model, no plan; all of it or nothing.

    Args:
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``; or a hub id.

    Returns:
        What the configuration says, and the adapters by PyTorch module name, A
        ``(in, *window, r)`` and B ``(r, out)``, with the axes that the weight has in PyTorch:
        ``"oi"``, ``"oiii"`` for a convolution's kernel with a window of two axes, or ``"io"`` for
        a weight whose rows are looked up. A module stored as ``Conv1D`` is ``"oi"``, too: the
        file does not tell. Rows have their module's name,
        too, and leaves trained in full their parameter's. So have base weights of an embedding or
        an output head, which PEFT writes beside its pair or where the vocabulary was resized: the
        pair is of that weight.

    A warning lists the targets that name no module of the file.

    Raises:
        AdapterError: a file is missing or unreadable, or is for a base that its initialisation
            changed; or lists every tensor without its other half, unexpected, misshapen, of a rank
            that is not the configuration's, of a dtype that is not floating point, or not finite,
            and every module with a tensor that the targets leave out.

    Source: the file format of PEFT 0.21.2.
    """
    file, adapters, unmet = look(directory)
    if problem := changed_base(file.config):
        raise AdapterError(f"{directory}: {problem}")
    if unmet:
        warnings.warn(f"in {directory}: {', '.join(unmet)}", stacklevel=2)
    return file, adapters


def look(directory: str | Path) -> tuple[AdapterFile, dict[str, Entry], list[str]]:
    """Read as ``open_adapter`` does, for the eye: also adapters of a changed base.

    Returns:
        What ``open_adapter`` returns, and a line for every listed target without an adapter.

    Raises:
        AdapterError: as ``open_adapter``, but for an initialisation that changed the base.
    """
    directory = located(directory)
    file = load_adapter_file(directory)
    if file.config.target_parameters:
        raise AdapterError(
            f"{directory} has target_parameters={file.config.target_parameters!r}, whose tensors "
            "hold experts that only the model can tell apart: plan the model with "
            "load_config(directory) and read it with load_pretrained"
        )
    tensors = read_weights(directory)
    file = with_heads(file, tensors)
    origin = f"{directory} is not a whole adapter"
    tokens = rows_of(file.config, tensors)
    own = {name: tensors[f"{PREFIX}{name}.{ROWS}"] for name in tokens}
    halves, full, problems = _sorted(
        {key: t for key, t in tensors.items() if not key.endswith(f".{ROWS}")}, file
    )
    refuse_hanging(file.config, halves)
    problems += row_problems(file.config, tokens)
    problems += [p for name, tokens in tokens.items() for p in _row_problems(name, tokens, own)]
    dora, biased = file.config.use_dora, file.config.lora_bias
    masked = bool(file.config.alora_invocation_tokens)
    scales = {}
    for module, (kind, parts) in halves.items():
        r, alpha = lora_config.rank_and_alpha(file.config, module)
        scales[module] = lora_config.scale(file.config, r, alpha)
        problems += part_problems(module, kind, parts, r, dora=dora, biased=biased)
    problems += target_problems(file.config, halves)
    raise_all(AdapterError, origin, sorted(problems))
    adapters: dict[str, Entry] = {
        module: read_parts(kind, parts, scales[module], file.config.lora_dropout, masked=masked)
        for module, (kind, parts) in halves.items()
    }
    adapters |= {
        name: Rows(
            jnp.asarray(value), tokens[name], LOOKED_UP if EMBEDDING.search(name) else LINEAR
        )
        for name, value in own.items()
    }
    adapters |= {name: Full(jnp.asarray(value)) for name, value in full.items()}
    return file, adapters, idle(file.config, halves)


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
        adapters: by PyTorch module name, with axes ``"oi"``, ``"oii"`` and so on for kernels of
            convolutions, or ``"io"`` for embeddings, and rows likewise; leaves trained in full by
            parameter name.
        embeddings: the modules whose rows are looked up. If not given, those with axes ``"io"``,
            which need a name that embeddings have: a kernel is ``"io"``, too, in JAX.
        overwrite: replace the files of an earlier adapter; nothing else is touched.

    Raises:
        AdapterError: lists every name, axis, rank, scale and value that the file cannot hold.
        OutputError: the directory holds something or cannot be written.
    """
    pairs = {name: one for name, one in adapters.items() if isinstance(one, Adapter)}
    refuse_hanging(file.config, pairs)
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
    rows = {name: one.indices for name, one in adapters.items() if isinstance(one, Rows)}
    problems += row_problems(file.config, rows)
    raise_all(AdapterError, "these adapters do not fit their configuration", sorted(problems))
    tensors = {}
    for name, one in adapters.items():
        if isinstance(one, Adapter):
            tensors |= {f"{PREFIX}{name}{key}": half for key, half in in_file(one).items()}
        elif isinstance(one, Rows):
            tensors[f"{PREFIX}{name}.{ROWS}"] = np.ascontiguousarray(np.asarray(one.values))
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
    refuse_hanging(config, pairs)
    if target_problems(config, pairs) or idle(config, pairs):
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
) -> tuple[dict[str, tuple[str, dict[str, Any]]], dict[str, np.ndarray], list[str]]:
    """Return kind and parts by module, what is trained in full by name, and what is wrong."""
    halves: dict[str, tuple[str, dict[str, Any]]] = {}
    full, problems = {}, []
    for key in sorted(key for key in tensors if not _said_twice(key, tensors)):
        problems += _tensor_problems(key, tensors[key])
        name = key.removeprefix(PREFIX)
        if name == key:
            problems.append(f"{key}: unexpected, wanted a name that begins with {PREFIX}")
            continue
        if not (own := part_of(name)):
            full[name] = tensors[key]
            continue
        module, part, kind = own
        known, parts = halves.get(module, ("", {}))
        if known and kind and known != kind:
            problems.append(f"{key}: the module has an adapter of another kind, too")
        halves[module] = (known or kind, parts | {part: tensors[key]})
    named = {}
    for name, value in full.items():
        owner, _, leaf = name.rpartition(paths.SEPARATOR)
        module = owner.removesuffix(_WRAPPED)
        wrapped, known = module != owner, module in halves
        trained = wrapped == known and _is_trained(file.config, module, leaf, halves)
        own = is_vocabulary(module) and leaf in ("weight", "bias") and (known or not wrapped)
        if not (trained or own):
            why = "base weights inside the file" if wrapped else "unexpected"
            problems.append(f"{PREFIX}{name}: {why}")
        elif f"{module}.{leaf}" in named:
            problems.append(f"{PREFIX}{name}: the file has the same one under another name, too")
        named[f"{module}.{leaf}"] = value
    return halves, named, problems


def _said_twice(key: str, tensors: Mapping[str, np.ndarray]) -> bool:
    """Tell what PEFT's ``bias="all"`` adds for a saved module: its bias again, and the base's."""
    again = key.replace(".modules_to_save.", ".")
    if again != key and again in tensors:
        return np.array_equal(tensors[key], tensors[again])
    plain = key.replace(".original_module.", ".")
    return plain != key and plain in tensors


def _is_trained(config: LoraConfig, module: str, leaf: str, halves: Mapping[str, Any]) -> bool:
    if lora_config.is_saved(config, module):
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


def _row_problems(
    module: str, tokens: tuple[int, ...], tensors: Mapping[str, np.ndarray]
) -> list[str]:
    key, tensor = f"{PREFIX}{module}.{ROWS}", tensors[module]
    if tensor.ndim != 2 or len(tensor) != len(tokens) or not tensor.size:
        return [f"{key}: got {tensor.shape}, wanted a row for each of {len(tokens)} tokens"]
    return _tensor_problems(key, tensor)


def _unwritable(module: str, adapter: Adapter, config: LoraConfig) -> list[str]:
    found = []
    if not is_written(adapter.axes) or adapter.columns is not None:
        wanted = "wanted 'oi' (with 'i' for a window) or 'io', and all columns"
        found.append(f"{module}: got axes {adapter.axes!r}, {wanted}")
    elif adapter.a.ndim != len(adapter.axes) or adapter.b.ndim != 2:
        shapes = f"{tuple(adapter.a.shape)} and {tuple(adapter.b.shape)}"
        found.append(f"{module}: got {shapes} for axes {adapter.axes!r}")
    if (adapter.magnitude is not None) != config.use_dora:
        got = "no magnitude" if adapter.magnitude is None else "DoRA's magnitude"
        found.append(f"{module}: got {got}, the configuration has use_dora={config.use_dora}")
    if (adapter.bias is not None) != config.lora_bias:
        got = "no bias" if adapter.bias is None else "a bias"
        found.append(f"{module}: got {got}, the configuration has lora_bias={config.lora_bias}")
    if adapter.masked != bool(config.alora_invocation_tokens):
        found.append(f"{module}: masked={adapter.masked}, which alora_invocation_tokens deny")
    if paths.module_of(module) != module:
        found.append(f"{module}: a parameter's path, wanted the module's name; see `rename`")
    r, alpha = lora_config.rank_and_alpha(config, module)
    scale = lora_config.scale(config, r, alpha)
    if rank(adapter) != r:
        found.append(f"{module}: rank got {rank(adapter)}, wanted the configuration's {r}")
    elif adapter.scale is None or not np.isclose(adapter.scale, scale, rtol=1e-6, atol=0).all():
        found.append(f"{module}: scale got {adapter.scale}, wanted the configuration's {scale}")
    return found


def _commonest(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]
