"""Tensors of older adapter files under PEFT's names; pure functions.

=================== ============================================================ ==============
layout              names                                                        alpha
=================== ============================================================ ==============
PEFT, no prefix     ``x.lora_A.weight``, ``x.lora_embedding_A``                   not in tensors
loralib             ``x.lora_A``, ``x.lora_B``                                    not in tensors
kohya               ``lora_unet_x_y.lora_down.weight``, ``….lora_up.weight``      ``….alpha``
diffusers           ``unet.x.lora.down.weight``, ``x.processor.to_q_lora.up.…``   ``….alpha``
=================== ============================================================ ==============

DoRA's magnitudes and the biases of B go along under PEFT's names, where the file has them so.

All keep A as ``[r, in]`` and B as ``[out, r]``, as PEFT does. Kohya writes a module's name with "_"
for ".", which only the model's list of modules undoes. An adapter of one expert, as older files for
Mixtral have, is that of a module as any other.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from ...core.config import lora_config
from ...core.config.lora_config import LoraConfig
from ...core.errors import AdapterError, raise_all
from ..checks import refuse_hanging
from ..config_names import exact
from ..keys import BIAS, MAGNITUDE, PREFIX
from ..names.naming import EMBEDDING

A, B, ALPHA = "A", "B", "alpha"

# What a module may have beside the two, by the field that says so and the end of PEFT's name.
_BESIDE = {"use_dora": MAGNITUDE, "lora_bias": BIAS}

# What remains of a name once these endings are gone is the module.
_ENDINGS = {
    A: re.compile(r"\.lora_A((\.default)?\.weight)?$|[._]lora[._](linear_layer\.)?down\.weight$"),
    B: re.compile(r"\.lora_B((\.default)?\.weight)?$|[._]lora[._](linear_layer\.)?up\.weight$"),
    "embedding A": re.compile(r"\.lora_embedding_A(\.default)?$"),
    "embedding B": re.compile(r"\.lora_embedding_B(\.default)?$"),
    ALPHA: re.compile(r"\.alpha$"),
    MAGNITUDE: re.compile(rf"\.{MAGNITUDE}$"),
    BIAS: re.compile(rf"\.{re.escape(BIAS)}$"),
}
_PROCESSOR = re.compile(r"\.processor\.(to_[a-z]+)$")

# One file of diffusers' or kohya's may hold adapters of several models.
PARTS = re.compile(r"(lora_(unet|te\d?)_|(unet|text_encoder(_\d)?)\.)")


# The tensors by their kind, by what owns them in the file.
Halves = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Converted:
    """An adapter in PEFT's layout.

    Args:
        config: with the ranks and alphas of the tensors, and these modules alone.
        tensors: by PEFT's names.
        ranks: r and alpha of every module.
    """

    config: LoraConfig
    tensors: dict[str, np.ndarray]
    ranks: dict[str, tuple[int, float]]


def converted(
    tensors: Mapping[str, np.ndarray],
    *,
    part: str | None = None,
    modules: Collection[str] | None = None,
    lora_alpha: int | float | None = None,
    config: LoraConfig | None = None,
) -> Converted:
    """Return an adapter of any of this module's layouts in PEFT's.

    Args:
        tensors: the file.
        part: the beginning of the names to convert, such as ``"lora_unet_"``; it is cut off.
        modules: of the model, which kohya's names need; others are looked up among them.
        lora_alpha: for layouts that do not store it, or in the place of the configuration's.
            Beside "down" and "up" its default is r.
        config: of a directory whose tensors lack PEFT's prefix; it has every module's alpha.
            Its other fields are kept.

    Raises:
        AdapterError: lists every tensor that is unexpected, misshapen, not finite or without
            its other half; every module that is unknown, ambiguous or has no alpha.

    >>> old = {"x.q.lora_A": np.ones((2, 5)), "x.q.lora_B": np.ones((3, 2))}
    >>> new = converted(old, lora_alpha=4)
    >>> sorted(new.tensors)[0], new.config.target_modules, new.config.r, new.config.lora_alpha
    ('base_model.model.x.q.lora_A.weight', ('x.q',), 2, 4.0)
    """
    chosen = _part(tensors, part)
    found, problems = _halves(chosen, tensors)
    names = {owner: _module(owner, modules, key) for owner, key in _flat(found)}
    problems += [f"{owner}: {name}" for owner, (name, good) in names.items() if not good]
    problems += _twice({owner: name for owner, (name, good) in names.items() if good})
    ranks = {}
    if config is not None:
        refuse_hanging(config, (name for name, _ in names.values()))
    for owner, halves in found.items():
        own = _rank_problems(owner, halves, tensors)
        if not own:
            module, r = names[owner][0], int(tensors[halves[A]].shape[0])
            alpha = _alpha(halves, tensors, lora_alpha)
            if config is not None and lora_alpha is None:
                wanted, given = lora_config.rank_and_alpha(config, module)
                alpha = lora_config.scale(config, wanted, given) * r
                own = [] if wanted == r else [f"{owner}: got r={r}, the configuration's {wanted}"]
            elif alpha is None:
                own = [f"{owner}: its alpha is not in the file, give --lora-alpha"]
            ranks[module] = (r, alpha)
        problems += own
    beside = _beside(found, config)
    problems += _beside_problems(found, beside, tensors)
    if not found:
        problems.append("no tensor of an adapter")
    problems += [] if config is None else _unmet(config, found)
    raise_all(AdapterError, "this file cannot be converted", sorted(problems))
    new = _renamed(found, {owner: name for owner, (name, _) in names.items()}, tensors)
    r, alpha = (
        Counter(values).most_common(1)[0][0] for values in zip(*ranks.values(), strict=True)
    )
    # What the configuration says beside ranks, scales and targets is said of the copy, too.
    base = replace(config or LoraConfig(), r=r, lora_alpha=alpha, use_rslora=False, **beside)
    saved = base.modules_to_save or ()
    return Converted(exact(base, ranks, saved, modules or ranks), new, ranks)


def _unmet(config: LoraConfig, found: Halves) -> list[str]:
    """Return the fields that need tensors which the file has not, or none of these layouts."""
    missing = [name for name, ending in _BESIDE.items() if not _has(found, ending)]
    return [
        f"{name}: the configuration has {value!r}, and the file no tensors for it"
        for name in (*missing, "trainable_token_indices", "target_parameters")
        if (value := getattr(config, name))
    ]


def _has(found: Halves, kind: str) -> bool:
    return any(kind in halves for halves in found.values())


def _beside(found: Halves, config: LoraConfig | None) -> dict[str, bool]:
    """Return the fields of what modules have beside A and B: as said, or as the tensors have it."""
    return {
        field: _has(found, ending) if config is None else getattr(config, field)
        for field, ending in _BESIDE.items()
    }


def _beside_problems(
    found: Halves, beside: Mapping[str, bool], tensors: Mapping[str, np.ndarray]
) -> list[str]:
    """Return which modules have not what the fields say, have more, or have it in other shapes."""
    problems = []
    for owner, halves in found.items():
        for field, ending in _BESIDE.items():
            if (ending in halves) != beside[field] and _has(found, ending):
                got = "has" if ending in halves else "has no"
                problems.append(f"{owner}: {got} {ending}, where {field}={beside[field]}")
            elif ending in halves and B in halves:
                shape, b = tensors[halves[ending]].shape, tensors[halves[B]].shape
                wanted = (b[0],) if ending == BIAS or len(b) == 2 else (1, b[0], *b[2:])
                if shape != wanted:
                    problems.append(f"{halves[ending]}: got {shape}, wanted {wanted}")
    return problems


def _part(tensors: Iterable[str], part: str | None) -> dict[str, str]:
    """Return the names without PEFT's prefix and the part's, by key: of this part alone."""
    names = {key: key.removeprefix(PREFIX) for key in tensors}
    parts = {found[0] if (found := PARTS.match(name)) else "" for name in names.values()}
    if part is None and len(parts) > 1:
        listed = sorted(repr(one) if one else "names without any of them" for one in parts)
        raise_all(AdapterError, "this file holds several adapters, choose one by --part", listed)
    part = part if part is not None else next(iter(parts), "")
    return {key: name[len(part) :] for key, name in names.items() if name.startswith(part)}


def _halves(
    chosen: Mapping[str, str], tensors: Mapping[str, np.ndarray]
) -> tuple[Halves, list[str]]:
    """Return the keys of A, B and alpha by what owns them in the file, and what is wrong."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    problems: list[str] = []
    for key, name in chosen.items():
        kind = next((kind for kind, ending in _ENDINGS.items() if ending.search(name)), None)
        if kind is None:
            problems.append(f"{key}: unexpected")
            continue
        owner, half = _ENDINGS[kind].sub("", name), kind.removeprefix("embedding ")
        if half in found[owner]:
            problems.append(f"{key}: the module has {found[owner][half]}, too")
        found[owner][half] = key
        problems += _value_problems(key, tensors[key])
    return found, problems


def _renamed(
    found: Halves, names: Mapping[str, str], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return A, B and what is beside them of every owner under PEFT's names."""
    new = {}
    for owner, halves in found.items():
        module = names[owner]
        looked_up = "lora_embedding" in halves[A] or (
            halves[A].endswith(".lora_A") and EMBEDDING.search(module)
        )
        for half in (A, B):
            ending = f"lora_embedding_{half}" if looked_up else f"lora_{half}.weight"
            new[f"{PREFIX}{module}.{ending}"] = np.ascontiguousarray(tensors[halves[half]])
        for ending in _BESIDE.values():
            if ending in halves:
                new[f"{PREFIX}{module}.{ending}"] = np.ascontiguousarray(tensors[halves[ending]])
    return new


def _flat(found: Halves) -> Iterable[tuple[str, bool]]:
    """Yield every owner and whether kohya wrote its name, with "_" for "."."""
    for owner, halves in found.items():
        yield owner, any(re.search(r"(^|\.)lora_(unet|te\d?)_", key) for key in halves.values())


def _module(owner: str, modules: Collection[str] | None, flat: bool) -> tuple[str, bool]:
    """Return the module's name and True, or what is wrong and False."""
    if flat:
        if modules is None:
            return 'its "_" may stand for ".": give the model\'s modules by --modules', False
        fitting = sorted(name for name in modules if name.replace(".", "_") == owner)
        if len(fitting) == 1:
            return fitting[0], True
        return f"fits {', '.join(fitting) or 'none'} of the modules", False
    # Attention processors of diffusers held what belongs to the attention's own layers.
    name = _PROCESSOR.sub(lambda found: f".{found[1].replace('to_out', 'to_out.0')}", owner)
    if modules is not None and name not in modules:
        return "not among the modules", False
    return name, True


def _twice(names: Mapping[str, str]) -> list[str]:
    counts = Counter(names.values())
    return [f"{owner}: {n} is named twice" for owner, n in names.items() if counts[n] > 1]


def _value_problems(key: str, tensor: np.ndarray) -> list[str]:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        # An alpha may be a whole number.
        return [] if tensor.ndim == 0 else [f"{key}: got {tensor.dtype}, wanted floating point"]
    wide = tensor if tensor.dtype == np.float64 else tensor.astype(np.float32)
    return [] if np.isfinite(wide).all() else [f"{key}: holds NaN or infinite values"]


def _rank_problems(
    owner: str, halves: Mapping[str, str], tensors: Mapping[str, np.ndarray]
) -> list[str]:
    if missing := [half for half in (A, B) if half not in halves]:
        return [f"{owner}: has no {half}" for half in missing]
    a, b = (tuple(tensors[halves[half]].shape) for half in (A, B))
    if len(a) < 2 or len(a) != len(b) or 0 in a + b or a[0] != b[1] or set(b[2:]) - {1}:
        return [f"{owner}: got A {a} and B {b}, wanted (r, in) and (out, r)"]
    return []


def _alpha(
    halves: Mapping[str, str], tensors: Mapping[str, np.ndarray], default: int | float | None
) -> float | None:
    if ALPHA in halves:
        value = tensors[halves[ALPHA]]
        return float(value.reshape(())) if value.size == 1 else None
    if default is None and "down" in halves[A].rpartition("lora")[2]:
        return float(tensors[halves[A]].shape[0])
    return None if default is None else float(default)
