"""What ``linen/layers`` and ``nnx/layers`` share: scale, axes, the low-rank path; no Flax."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jax import lax
from jaxtyping import Array, Float, Inexact, Key

from . import lowrank
from .adapter import IN, OUT, STACKED, Adapter
from .config import lora_config
from .config.lora_config import LoraConfig
from .errors import ConfigError, raise_all
from .initializers import init_problems

FIELDS = ("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights")


def config_of(layer: Any) -> LoraConfig:
    """Return the configuration of one layer, from its attributes of PEFT's names.

    Args:
        layer: has the attributes ``FIELDS``.

    Raises:
        ConfigError: lists every one that is out of range.
    """
    config = LoraConfig(**{name: getattr(layer, name) for name in FIELDS})
    problems = init_problems(config.init_lora_weights, config.r)
    raise_all(ConfigError, "these fields of a LoRA layer are out of range", problems)
    return config


def kernel_axes(axis: Sequence[int], batch_dims: Sequence[int], features: Sequence[int]) -> str:
    """Return the letters of a Dense or DenseGeneral kernel ``(*batch, *in, *features)``.

    >>> kernel_axes((-2, -1), (0,), (12,))
    'siio'
    """
    return STACKED * len(batch_dims) + IN * len(axis) + OUT * len(features)


def adapter_of(
    a: Float[Array, "*stacked_in r"],
    b: Float[Array, "*stacked_r_out"],
    config: LoraConfig,
    axes: str,
) -> Adapter:
    """Return the ``Adapter`` of a layer, or of the stack that ``scan`` or ``vmap`` made of it.

    Args:
        a: A, as the layer's collection holds it.
        b: B, likewise.
        config: gives scale and dropout.
        axes: the letters of one layer's kernel. Any further axis of A is the transform's, who
            put it in front of A, B and the kernel alike.

    >>> import jax.numpy as jnp
    >>> adapter_of(jnp.ones((6, 4, 2)), jnp.ones((6, 2, 5)), LoraConfig(r=2), "io").axes
    'sio'
    """
    further = a.ndim - 1 - axes.count(STACKED) - axes.count(IN)
    scale = lora_config.scale(config, config.r, config.lora_alpha)
    return Adapter(a, b, scale, STACKED * further + axes, config.lora_dropout)


def add_low_rank(
    y: Inexact[Array, "*out"],
    x: Inexact[Array, "..."],
    adapter: Adapter,
    *,
    axis: Sequence[int] = (-1,),
    batch_dims: Sequence[int] = (),
    precision: lax.PrecisionLike = None,
    key: Key[Array, ""] | None = None,
) -> Inexact[Array, "*out"]:
    """Return ``y + s·(drop(x)·A)·B``, beside the ``y = x·W + b`` of a Dense or DenseGeneral layer.

    Args:
        y: the base layer's output, which dropout does not reach.
        x: the layer's input.
        adapter: of the layer's kernel ``(*batch, *in, *features)``.
        axis: the axes of x that the layer sums over; negative ones count from the end.
        batch_dims: the axes of x that the kernel has, too.
        precision: as in ``lax.dot_general``.
        key: the random key of dropout, at the adapter's rate; ``None`` for no dropout.

    Source: LoRA, arXiv 2106.09685, section 4.1; dropout as in PEFT.

    >>> import jax.numpy as jnp
    >>> adapter = Adapter(a=jnp.ones((3, 2)), b=jnp.ones((2, 5)), scale=0.5)
    >>> add_low_rank(jnp.ones((4, 5)), jnp.ones((4, 3)), adapter)[0]
    Array([4., 4., 4., 4., 4.], dtype=float32)
    """
    if key is not None:
        x, adapter = lowrank.drop(x, adapter, key)
    # Flax sorts both, so that the kernel's axes stand in the order of the input's.
    x_contract, x_batch = (sorted(n % x.ndim for n in dims) for dims in (axis, batch_dims))
    stacked = len(x_batch)
    w_contract, w_batch = range(stacked, stacked + len(x_contract)), range(stacked)
    contract, batch = (x_contract, w_contract), (x_batch, w_batch)
    return lowrank.add_dot(y, x, adapter, contract, batch, precision=precision)


def as_tuple(sizes: int | Iterable[int]) -> tuple[int, ...]:
    """Return a field that may be one number or several as a tuple, as Flax does."""
    return tuple(sizes) if isinstance(sizes, Iterable) else (sizes,)
