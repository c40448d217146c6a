"""Adapters of MLX-LM as PEFT's: A and B transposed, and alpha from the scale.

MLX-LM computes ``x·W + scale·(x·lora_a)·lora_b``, so that ``A = lora_aᵀ``, ``B = lora_bᵀ`` and
``alpha = scale·r``. DoRA's ``m`` of a linear layer is PEFT's magnitude; that of an embedding has
a value for each token, where PEFT has one for each output.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...core.config.lora_config import LoraConfig
from ...core.errors import AdapterError, raise_all
from ..config_names import exact
from ..keys import MAGNITUDE, PREFIX
from ..names.naming import EMBEDDING
from ..tensors import is_finite
from .older_layouts import Converted

WEIGHTS_NAME = "adapters.safetensors"

_PART = re.compile(r"^(.+)\.(lora_a|lora_b|m)$")

# Written since MLX-LM no longer multiplies its scale by alpha / r.
_SINCE = ("num_layers", "fine_tune_type")


def is_mlx(tensors: Mapping[str, Any]) -> bool:
    """Tell whether these are the names of an MLX-LM adapter's tensors."""
    return any(key.endswith((".lora_a", ".lora_b")) for key in tensors)


def converted(
    tensors: Mapping[str, np.ndarray],
    fields: Mapping[str, Any],
    lora_alpha: int | float | None = None,
    modules: Collection[str] | None = None,
) -> Converted:
    """Return an MLX-LM adapter in PEFT's layout.

    Args:
        tensors: the file.
        fields: of its ``adapter_config.json``; empty where there is none.
        lora_alpha: numerator of the scale alpha / r, instead of what the fields say.
        modules: of the model; None where they are not known.

    Raises:
        AdapterError: lists every tensor that has no place in PEFT's file or does not fit, and
            the fields that do not say the scale.

    >>> old = {"x.q.lora_a": np.ones((5, 2)), "x.q.lora_b": np.ones((2, 3))}
    >>> new = converted(old, {"lora_parameters": {"rank": 2, "scale": 10.0}})
    >>> {name: tensor.shape for name, tensor in new.tensors.items()}, new.ranks
    ({'base_model.model.x.q.lora_A.weight': (2, 5), ...}, {'x.q': (2, 20.0)})
    """
    found: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    problems = []
    for key, tensor in tensors.items():
        if (name := _PART.match(key)) is None:
            problems.append(f"{key}: unexpected")
            continue
        found[name[1]][name[2]] = tensor
        problems += _value_problems(key, tensor)
    for module, parts in found.items():
        problems += _problems(module, parts)
        if modules is not None and module not in modules:
            problems.append(f"{module}: not among the modules")
    scale = _scale(fields) if lora_alpha is None else 0.0
    if isinstance(scale, str):
        problems.append(scale)
    if len({"m" in parts for parts in found.values()}) == 2:
        problems.append("DoRA's m: some modules have one and some have none")
    raise_all(AdapterError, "this MLX-LM adapter cannot be converted", sorted(problems))
    ranks = {
        module: (r, float(scale) * r if lora_alpha is None else lora_alpha)
        for module, parts in found.items()
        for r in (int(parts["lora_b"].shape[0]),)
    }
    r, alpha = (Counter(each).most_common(1)[0][0] for each in zip(*ranks.values(), strict=True))
    dora = any("m" in parts for parts in found.values())
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=_dropout(fields), use_dora=dora)
    new = {
        f"{PREFIX}{module}.{name}": np.ascontiguousarray(tensor)
        for module, parts in found.items()
        for name, tensor in _in_peft(module, parts)
    }
    return Converted(exact(config, ranks, (), ranks), new, ranks)


def _in_peft(module: str, parts: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    looked_up = EMBEDDING.search(module)
    for half in "AB":
        name = f"lora_embedding_{half}" if looked_up else f"lora_{half}.weight"
        yield name, parts[f"lora_{half.lower()}"].T
    if "m" in parts:
        yield MAGNITUDE, parts["m"]


def _problems(module: str, parts: Mapping[str, np.ndarray]) -> list[str]:
    if missing := [name for name in ("lora_a", "lora_b") if name not in parts]:
        return [f"{module}: has no {name}" for name in missing]
    a, b = (tuple(parts[name].shape) for name in ("lora_a", "lora_b"))
    if len(a) != 2 or len(b) != 2:
        return [f"{module}: got lora_a {a} and lora_b {b}, experts that PEFT's file has otherwise"]
    if a[1] != b[0] or 0 in a + b:
        return [f"{module}: got lora_a {a} and lora_b {b}, wanted (in, r) and (r, out)"]
    if "m" not in parts:
        return []
    if EMBEDDING.search(module):
        return [f"{module}.m: DoRA's magnitude of an embedding is for each token, PEFT's is not"]
    shape = tuple(parts["m"].shape)
    return [] if shape == (b[1],) else [f"{module}.m: got {shape}, wanted {(b[1],)}"]


def _value_problems(key: str, tensor: np.ndarray) -> list[str]:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return [f"{key}: got {tensor.dtype}, wanted floating point"]
    return [] if is_finite(tensor) else [f"{key}: holds NaN or infinite values"]


def _scale(fields: Mapping[str, Any]) -> float | str:
    """Return the scale, or what is wrong with the fields."""
    given = fields.get("lora_parameters")
    given = given if isinstance(given, Mapping) else {}
    scale, rank, alpha = (given.get(name) for name in ("scale", "rank", "alpha"))
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        return f"lora_parameters.scale: got {scale!r}, wanted a number; or give --lora-alpha"
    if alpha not in (None, rank) and not any(name in fields for name in _SINCE):
        return (
            f"lora_parameters: MLX-LM before 0.15 scales by scale·alpha/rank = {scale}·{alpha}/"
            f"{rank}, later ones by the scale alone; say which by --lora-alpha"
        )
    return float(scale)


def _dropout(fields: Mapping[str, Any]) -> float:
    given = fields.get("lora_parameters")
    dropout = given.get("dropout", 0.0) if isinstance(given, Mapping) else 0.0
    return dropout if isinstance(dropout, int | float) else 0.0
