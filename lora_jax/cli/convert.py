"""``lora-jax convert``: adapter files of older layouts as a PEFT directory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors

from ..core.errors import AdapterError
from ..core.io import lfs_pointers
from ..core.io.intake import parse_json, read_bytes, reason, require_regular
from ..core.shown_text import escaped
from ..core.text_tables import table
from ..peft import AdapterFile, renamed_families
from ..peft.config_names import exact
from ..peft.files import write_directory
from ..peft.foreign import diffusers, mlx
from ..peft.foreign.older_layouts import Converted, converted
from ..peft.foreign.sources import read_source
from ..peft.keys import PREFIX


@dataclass(frozen=True)
class ConvertOptions:
    """Write an adapter of an older layout as a PEFT directory.

    Reads loralib's bare lora_A and lora_B, kohya's and diffusers' lora_down and lora_up, PEFT's
    names without their prefix (DoRA's magnitudes and biases of B included), MLX-LM's lora_a and
    lora_b, and adapters of single experts.

    Args:
        source: a .safetensors file, or a directory with adapter_model.safetensors (or its shards)
            and maybe adapter_config.json, or with MLX-LM's adapters.safetensors.
        out: where the adapter goes; a new or empty directory.
        modules: the model's modules, which kohya's names need: a .json list of their names, or a
            .safetensors file of the model. Names that a family of models had before or has now
            become the model's.
        part: of a file for several models, the beginning of the names to convert, such as
            lora_unet_ or text_encoder. (with its dot).
        lora_alpha: numerator of the scale alpha / r, where the file does not say it.
        base_model: the base model's name, recorded for users of the adapter.
        overwrite: replace files of the same name; others stay.
    """

    source: Path
    out: Path
    modules: Path | None = None
    part: str | None = None
    lora_alpha: float | None = None
    base_model: str | None = None
    overwrite: bool = False


def convert_files(options: ConvertOptions) -> str:
    """Write the directory and return a line for each kind of module.

    Raises:
        AdapterError: the source cannot be read, or lists everything that cannot be converted.
        OutputError: ``out`` cannot be written.
    """
    if options.lora_alpha is not None and not math.isfinite(options.lora_alpha):
        raise AdapterError(f"lora_alpha: got {options.lora_alpha}, wanted a finite number")
    source = read_source(options.source)
    modules = None if options.modules is None else _modules(options.modules)
    family = None if modules is None else renamed_families.find(source.modules, modules)
    own = modules if family is None or modules is None else set(map(family.to_file, modules))
    if mlx.is_mlx(source.tensors):
        new = mlx.converted(source.tensors, source.fields, options.lora_alpha, own)
    else:
        part, said = diffusers.recorded(source.metadata, options.part, options.source)
        new = converted(
            source.tensors,
            part=part,
            modules=own,
            lora_alpha=options.lora_alpha,
            config=source.file.config if source.file else said,
        )
    new = new if family is None else _in_names_of(new, family, modules)
    file = replace(source.file or AdapterFile(new.config), config=new.config)
    if options.base_model is not None:
        file = replace(file, base_model=options.base_model)
    write_directory(options.out, file, new.tensors, overwrite=options.overwrite)
    kinds = Counter((module.rpartition(".")[2], *own) for module, own in new.ranks.items())
    rows = [(name, str(n), str(r), f"{alpha:g}") for (name, r, alpha), n in sorted(kinds.items())]
    return "\n".join(
        [
            *([] if family is None else [f"note: {escaped(family.told(source.modules))}"]),
            table(("name", "modules", "r", "alpha"), rows),
            f"{len(new.ranks)} modules; the adapter is in {escaped(options.out)}",
        ]
    )


def _in_names_of(
    new: Converted, family: renamed_families.Rename, modules: Collection[str] | None
) -> Converted:
    """Return an adapter in the model's names, where the file has others of its family."""
    ranks = {family.to_model(name): own for name, own in new.ranks.items()}
    saved = [family.to_model(name) for name in new.config.modules_to_save or ()]
    tensors = {
        PREFIX + family.to_model(key.removeprefix(PREFIX)): tensor
        for key, tensor in new.tensors.items()
    }
    return Converted(exact(new.config, ranks, saved, modules), tensors, ranks)


def _modules(path: Path) -> frozenset[str]:
    """Return the names in a JSON list, or the owners of a safetensors file's tensors."""
    lfs_pointers.refuse(path, AdapterError)
    if path.suffix == ".safetensors":
        try:
            require_regular(path)
            with safetensors.safe_open(path, framework="numpy") as file:
                return frozenset(key.rpartition(".")[0] for key in file.keys())  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise AdapterError(
                f"{path} is not a whole safetensors file: {reason(error)}"
            ) from error
    try:
        names = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot read {path} as JSON: {reason(error)}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"{path}: wanted a JSON list of the names of modules")
    return frozenset(names)
