"""What the laws of the layers are tested on: every layer and kernel layout of both front ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax import linen
from lora_jax import nnx as lora_nnx
from lora_jax.linen import LoRADense, LoRADenseGeneral
from lora_jax.nnx import BaseParam, LoRALinear, LoRALinearGeneral, LoRAParam

Leaves = dict[str, jax.Array]


@dataclass(frozen=True)
class Subject:
    """One layer with one layout, and the plain layer that it stands in for.

    ``params`` and ``lora`` are leaves by name in both front ends, so that a law is written once.
    """

    name: str
    front: Any
    layout: Mapping[str, Any]
    x: tuple[int, ...]
    axes: str
    low_rank: Mapping[str, Any] = field(default_factory=lambda: {"r": 6, "lora_alpha": 16})

    def __str__(self) -> str:
        return self.name

    def init(self, **more: Any) -> tuple[Leaves, Leaves]:
        """Return params and lora of the LoRA layer."""
        return self.front.init(self, {**self.low_rank, **more})

    def apply(self, params: Leaves, lora: Leaves, x: jax.Array, **more: Any) -> jax.Array:
        call = {k: more.pop(k) for k in ("deterministic", "key") if k in more}
        return self.front.apply(self, {**self.low_rank, **more}, params, lora, x, **call)

    def adapters(self, params: Leaves, lora: Leaves, **more: Any) -> dict[str, Any]:
        return self.front.adapters(self, {**self.low_rank, **more}, params, lora)

    def plain_init(self) -> Leaves:
        return self.front.plain_init(self)

    def plain(self, params: Leaves, x: jax.Array) -> jax.Array:
        return self.front.plain(self, params, x)

    def draw(self, dtype: Any = np.float32) -> tuple[Leaves, Leaves, jax.Array]:
        """Return params, lora and x; A and B away from zero, so that no error can hide."""
        rng = np.random.default_rng(0)

        def normal(leaf: Any) -> jax.Array:
            return jnp.asarray(rng.normal(size=leaf.shape) / 2, dtype)

        params, lora = jax.tree.map(normal, jax.eval_shape(self.init))
        return params, lora, jnp.asarray(rng.normal(size=self.x), dtype)


class Linen:
    """Linen's side of a subject."""

    def __init__(self, general: bool) -> None:
        self.layer = LoRADenseGeneral if general else LoRADense
        self.base = nn.DenseGeneral if general else nn.Dense

    def init(self, subject, low_rank):
        layer = self.layer(**subject.layout, **low_rank)
        variables = layer.init(jax.random.key(0), jnp.ones(subject.x, jnp.float32))
        assert set(variables) == {"params", "lora"}
        return variables["params"], variables["lora"]

    def apply(self, subject, low_rank, params, lora, x, deterministic=None, key=None):
        layer, rngs = (
            self.layer(**subject.layout, **low_rank),
            {} if key is None else {"dropout": key},
        )
        return layer.apply({"params": params, "lora": lora}, x, deterministic, rngs=rngs)

    def adapters(self, subject, low_rank, params, lora):
        layer, x = self.layer(**subject.layout, **low_rank), jnp.ones(subject.x, jnp.float32)
        return linen.adapters_of(layer, {"params": params, "lora": lora}, x, deterministic=True)

    def plain_init(self, subject):
        x = jnp.ones(subject.x, jnp.float32)
        return self.base(**subject.layout).init(jax.random.key(0), x)["params"]

    def plain(self, subject, params, x):
        return self.base(**subject.layout).apply({"params": params}, x)


class NNX:
    """NNX's side of a subject."""

    def __init__(self, general: bool) -> None:
        self.layer = LoRALinearGeneral if general else LoRALinear
        self.base = nnx.LinearGeneral if general else nnx.Linear

    def _make(self, cls, subject, leaves=None, **low_rank):
        layout = dict(subject.layout)
        axis = layout.pop("axis", -1)
        axis = sorted(n % len(subject.x) for n in (axis if isinstance(axis, tuple) else (axis,)))
        sizes = tuple(subject.x[n] for n in axis)
        if self.base is nnx.LinearGeneral:
            batch = {n: subject.x[n] for n in layout.pop("batch_dims", ())}
            layout |= {"axis": axis, "batch_axis": batch}
        else:
            (sizes,) = sizes
        make = partial(cls, sizes, layout.pop("features"), **layout, **low_rank)
        # Leaves that are given take the place of abstract ones, so that nothing is drawn.
        layer = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))) if leaves else make(rngs=nnx.Rngs(0))
        for name, value in (leaves or {}).items():
            kind = LoRAParam if name.startswith("lora") else nnx.Param
            setattr(layer, name, kind(value))
        return layer

    def init(self, subject, low_rank):
        layer = self._make(self.layer, subject, **low_rank)
        params, pair = nnx.state(layer, BaseParam), nnx.state(layer, LoRAParam)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(pair)

    def apply(self, subject, low_rank, params, lora, x, deterministic=None, key=None):
        layer = self._make(self.layer, subject, {**params, **lora}, **low_rank)
        rngs = nnx.Rngs(dropout=key) if key is not None else None
        return layer(x, deterministic=deterministic, rngs=rngs)

    def adapters(self, subject, low_rank, params, lora):
        return lora_nnx.adapters_of(self._make(self.layer, subject, {**params, **lora}, **low_rank))

    def plain_init(self, subject):
        return nnx.to_pure_dict(nnx.state(self._make(self.base, subject), nnx.Param))

    def plain(self, subject, params, x):
        return self._make(self.base, subject, params)(x)


# Odd sizes that differ from each other, so that a weight-sized array can only be the weight.
LAYOUTS = {
    "heads_in": ({"features": 13, "axis": (-2, -1)}, (2, 5, 7), "iio"),
    "middle": ({"features": (5, 11), "axis": 1, "use_bias": False}, (2, 3, 7), "ioo"),
    "batch": (
        {"features": (5, 11), "axis": (-1, 1), "batch_dims": (0,)},
        (3, 7, 2, 13),
        "siioo",
    ),
}
SUBJECTS = [
    Subject("LoRADense", Linen(False), {"features": 11}, (2, 5, 7), "io"),
    Subject("LoRALinear", NNX(False), {"features": 11}, (2, 5, 7), "io"),
] + [
    Subject(f"{front}-{name}", side(True), *layout)
    for name, layout in LAYOUTS.items()
    for front, side in {"LoRADenseGeneral": Linen, "LoRALinearGeneral": NNX}.items()
]
DENSE, LINEAR = SUBJECTS[:2]


def relative(got: Any, wanted: Any) -> float:
    got, wanted = (np.asarray(value).astype(np.float64) for value in (got, wanted))
    assert got.shape == wanted.shape
    assert np.linalg.norm(wanted) > 0, "vacuous: the wanted value is zero"
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def same_bits(got: Any, wanted: Any) -> bool:
    return got.dtype == wanted.dtype and np.asarray(got).tobytes() == np.asarray(wanted).tobytes()


def loss(apply: Callable[..., jax.Array], *args: Any) -> jax.Array:
    y = apply(*args)
    return jnp.sum(jnp.sin(y.astype(jnp.float64 if y.dtype == jnp.float64 else jnp.float32)))
