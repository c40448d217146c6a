"""What LoRA would do to a model directory, whichever library wrote the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.config.lora_config import LoraConfig
from ..core.errors import AssetError, LoraError
from ..core.io.hub_endpoint import one_line
from ..rewrite import Plan, plan
from . import config_fits_file
from .assets import resolve_model
from .bert import read_json
from .huggingface import from_pretrained

TOKENS = 8

INSTALL = 'pip install "lora_jax[torch]" "transformers==4.57.6"'


def plan_model(
    name: str | Path,
    config: LoraConfig,
    *,
    cache: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> Plan:
    """Return the plan for the model of this name.

    A BERT without a head is planned as ``lora_jax.models`` has it; any other model of
    ``transformers`` is read through PyTorch, under its state-dict names.

    Args:
        name: a directory, an alias or a hub id, see ``lora_jax.models.assets.resolve_model``.
        config: what to adapt.
        cache: where downloads are kept.
        note: called with a line at every step of a download.

    Raises:
        AssetError: the model cannot be had, or it takes libraries that are not installed.
        PlanError: a pattern matches nothing, or a target's use has no rule.
    """
    directory = resolve_model(name, cache=cache, progress=note)
    kind = read_json(directory / "config.json").get("model_type")
    if not isinstance(kind, str | None):
        raise AssetError(f"{directory / 'config.json'}: model_type: got {kind!r}, wanted a name")
    if kind == "bert":
        model, params = from_pretrained(directory)
        ids = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
        return plan(lambda p, *args: model.apply({"params": p}, *args), params, config, ids, ids)
    try:
        fn, params, inputs = _through_torch(directory)
        return plan(fn, params, config, **inputs)
    except LoraError:
        raise
    # The library runs whatever config.json says, and its failures share no base class.
    except Exception as error:
        raise AssetError(
            f"{directory} cannot be planned through transformers: {type(error).__name__}: "
            f"{one_line(str(error))}"
        ) from error


def _through_torch(directory: Path) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
    try:
        import transformers

        from ..torch.from_torch import from_torch
    except ImportError as error:
        raise AssetError(
            f"{directory} holds no BERT; planning it takes PyTorch: {INSTALL} ({error})"
        ) from error
    path = directory / "config.json"
    values, shapes = read_json(path), config_fits_file.stored_shapes(directory)
    names = values.get("architectures") or ["AutoModel"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise AssetError(f"{path}: architectures: got {names!r}")
    kind = getattr(transformers, names[0], transformers.AutoModel)
    config_fits_file.refuse_other_counts(path, values, shapes)
    config_fits_file.refuse_other_size(path, _parameters(kind, directory), shapes)
    # A fused attention asks for the values of masks.
    model = kind.from_pretrained(directory, attn_implementation="eager")
    model.config.use_cache = False
    fn, params = from_torch(model)
    return fn, params, {model.main_input_name: _example(model)}


def _parameters(kind: Any, directory: Path) -> int:
    """Return how many elements the model's parameters would have; none is allocated."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        build = kind.from_config if hasattr(kind, "from_config") else kind
        try:
            return sum(value.numel() for value in build(config).parameters())
        # Some read values while they are built; what is wrong with others the library says.
        except Exception:
            return 0


def _example(model: Any) -> np.ndarray:
    """Return an input of the kind that the model takes, of the smallest sensible size."""
    config = model.config
    if model.main_input_name == "pixel_values":
        side = config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        return np.zeros((1, config.num_channels, height, width), np.float32)
    if model.main_input_name == "input_ids":
        return np.ones((1, TOKENS), np.int32)
    raise AssetError(
        f"{type(model).__name__} takes {model.main_input_name}; plan it in Python, with an input "
        "of your own: lora_jax.plan(fn, params, config, inputs)"
    )
