"""``adapter_model.safetensors`` without a plan: the tensors of one module, for the commands.

A linear layer has A ``[r, in]`` and B ``[out, r]``, an embedding alike under names of its own, a
convolution A ``[r, in, *window]`` and B ``[out, r, 1, …]``; DoRA adds a magnitude for each output.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from ..core.adapter import IN, OUT, Adapter, rank
from .keys import BIAS, MAGNITUDE, PREFIX

# The axes that a weight has in PyTorch; a convolution's kernel has further ``i`` for its window.
LINEAR, LOOKED_UP = OUT + IN, IN + OUT

_PAIRS = {
    LINEAR: (".lora_A.weight", ".lora_B.weight"),
    LOOKED_UP: (".lora_embedding_A", ".lora_embedding_B"),
}
_MAGNITUDE, _BIAS = f".{MAGNITUDE}", f".{BIAS}"

# Windows of one, two and three axes.
_MOST_AXES = 5

Parts = Mapping[str, np.ndarray]


def part_of(name: str) -> tuple[str, str, str] | None:
    """Return the module, the part and the kind of a tensor; None where it is no adapter's.

    >>> part_of("0.q.lora_B.weight"), part_of("wte.lora_embedding_A")
    (('0.q', 'b', 'oi'), ('wte', 'a', 'io'))
    """
    for kind, suffixes in _PAIRS.items():
        for part, suffix in zip("ab", suffixes, strict=True):
            if name.endswith(suffix):
                return name.removesuffix(suffix), part, kind
    for part, suffix in (("magnitude", _MAGNITUDE), ("bias", _BIAS)):
        if name.endswith(suffix):
            return name.removesuffix(suffix), part, ""
    return None


def is_written(axes: str) -> bool:
    """Tell whether a file has a place for an adapter of a weight with these axes."""
    window = axes.removeprefix(LINEAR)
    kernel = axes.startswith(LINEAR) and not window.strip(IN) and len(axes) <= _MOST_AXES
    return kernel or axes == LOOKED_UP


def problems(
    module: str, kind: str, parts: Parts, r: int, *, dora: bool, biased: bool = False
) -> list[str]:
    """Return what is wrong with the tensors of one module.

    Args:
        module: its name.
        kind: ``"oi"`` or ``"io"``, as ``part_of`` has it; empty where neither A nor B is there.
        parts: what the file has of ``a``, ``b``, ``magnitude`` and ``bias``.
        r: the configuration's rank.
        dora: whether the configuration is DoRA's.
        biased: whether it has ``lora_bias``.
    """
    names = dict(zip("ab", _PAIRS[kind or LINEAR], strict=True))
    names |= {"magnitude": _MAGNITUDE, "bias": _BIAS}
    keys = {part: f"{PREFIX}{module}{name}" for part, name in names.items()}
    wanted = ["a", "b", *(["magnitude"] if dora else []), *(["bias"] if biased else [])]
    if missing := [f"{keys[part]}: missing" for part in wanted if part not in parts]:
        return missing
    found = []
    if "magnitude" in parts and not dora:
        found.append(f"{keys['magnitude']}: unexpected, as use_dora is false")
    if "bias" in parts and not biased:
        found.append(f"{keys['bias']}: unexpected, as lora_bias is false")
    a, b = (tuple(parts[part].shape) for part in "ab")
    window, most = a[2:], 2 if kind == LOOKED_UP else _MOST_AXES
    for part, shape, axis in (("a", a, 0), ("b", b, 1)):
        if not 2 <= len(shape) <= most or len(shape) != len(a) or 0 in shape:
            a_kernel = " or a kernel as of the other half" if kind == LINEAR else ""
            found.append(f"{keys[part]}: got {shape}, wanted a matrix{a_kernel}")
        elif part == "b" and window and b[1] < r and r % b[1] == 0:
            found.append(f"{keys[part]}: got {shape}, a grouped convolution's, which has no rule")
        elif shape[axis] != r:
            found.append(f"{keys[part]}: got {shape}, wanted rank {r} on axis {axis}")
        elif part == "b" and set(b[2:]) - {1}:
            found.append(f"{keys[part]}: got {shape}, wanted sizes of 1 behind the rank")
    if "magnitude" in parts and dora and not found:
        shape = (1, b[0], *b[2:]) if window else (b[0],)
        if (got := tuple(parts["magnitude"].shape)) != shape:
            found.append(f"{keys['magnitude']}: got {got}, wanted {shape}")
    if "bias" in parts and biased and not found and parts["bias"].shape != b[:1]:
        found.append(f"{keys['bias']}: got {parts['bias'].shape}, wanted {b[:1]}")
    return found


def read(kind: str, parts: Parts, scale: float, dropout: int | float, *, masked: bool) -> Adapter:
    """Return the adapter that the tensors of one module are, for which there are no problems."""
    a, b = parts["a"], parts["b"]
    magnitude, bias = (parts.get(part) for part in ("magnitude", "bias"))
    return Adapter(
        jnp.asarray(np.ascontiguousarray(np.moveaxis(a, 0, -1))),
        jnp.asarray(np.ascontiguousarray(b.reshape(b.shape[:2]).T)),
        scale,
        kind + IN * (a.ndim - 2),
        dropout,
        magnitude=None if magnitude is None else jnp.asarray(magnitude.ravel()),
        bias=None if bias is None else jnp.asarray(bias),
        masked=masked,
    )


def in_file(adapter: Adapter) -> dict[str, np.ndarray]:
    """Return the tensors of an adapter by the end of their names: ``read``, undone.

    >>> pair = Adapter(jnp.ones((3, 5, 5, 2)), jnp.ones((2, 4)), 1.0, "oiii")
    >>> {name: tensor.shape for name, tensor in in_file(pair).items()}
    {'.lora_A.weight': (2, 3, 5, 5), '.lora_B.weight': (4, 2, 1, 1)}
    """
    a, b = np.asarray(adapter.a), np.asarray(adapter.b)
    ones, out = (1,) * (a.ndim - 2), b.shape[1]
    names = _PAIRS[LOOKED_UP if adapter.axes == LOOKED_UP else LINEAR]
    arrays = [np.moveaxis(a, -1, 0), b.T.reshape(out, rank(adapter), *ones)]
    found = dict(zip(names, arrays, strict=True))
    if adapter.magnitude is not None:
        shape = (1, out, *ones) if ones else (out,)
        found[_MAGNITUDE] = np.asarray(adapter.magnitude).reshape(shape)
    if adapter.bias is not None:
        found[_BIAS] = np.asarray(adapter.bias)
    return {name: np.ascontiguousarray(array) for name, array in found.items()}
