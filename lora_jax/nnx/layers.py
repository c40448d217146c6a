"""NNX layers with a low-rank path: ``LoRALinear``, ``LoRALinearGeneral``.

A and B are ``LoRAParam``: ``nnx.Optimizer(model, tx, wrt=LoRAParam)`` and ``nnx.DiffState(0,
LoRAParam)`` select them and nothing else, and so does Flax's own ``nnx.LoRAParam``. As that one
is an ``nnx.Param``, the state of the base model is ``nnx.state(model, BaseParam)``.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Key, Num

from ..core import flax_layer as layers
from ..core import paths
from ..core.adapter import Adapter
from ..core.buffers import apart
from ..core.errors import AdapterError, ConfigError
from ..core.initializers import draw, fold_in_path
from ..core.xla import bf16_dot
from .params import LoRAParam

# The constructor and the call below extend those of the layer that stands next in the bases.
_Next = nnx.LinearGeneral if TYPE_CHECKING else nnx.Module
T = TypeVar("T", bound="_LowRank")


class _LowRank(_Next):
    """The low-rank path and its fields, mixed in before the NNX layer ``_base``."""

    _base: ClassVar[type[nnx.Linear | nnx.LinearGeneral]]

    def __init__(
        self,
        in_features: Any,
        out_features: Any,
        *,
        r: int = 8,
        lora_alpha: int | float = 8,
        use_rslora: bool = False,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | str = True,
        lora_dtype: DTypeLike = jnp.float32,
        deterministic: bool = False,
        rngs: nnx.Rngs,
        **base: Any,
    ) -> None:
        self.r = r
        self.lora_alpha = lora_alpha
        self.use_rslora = use_rslora
        self.lora_dropout = lora_dropout
        self.init_lora_weights = init_lora_weights
        self.deterministic = deterministic
        layers.config_of(self)
        super().__init__(in_features, out_features, rngs=rngs, **base)
        if self.dot_general is lax.dot_general:
            self.dot_general = bf16_dot.dot_general
        shape, axes = self.kernel.shape, _axes(self)
        a, b = draw(_key(rngs), init_lora_weights, shape, axes, r, lora_dtype)
        self.lora_a, self.lora_b = LoRAParam(a), LoRAParam(b)
        self.rngs = rngs["dropout"].fork() if lora_dropout else nnx.data(None)

    @classmethod
    def from_linear(
        cls: type[T], linear: nnx.Linear | nnx.LinearGeneral, *, rngs: nnx.Rngs, **fields: Any
    ) -> T:
        """Return a layer around an existing one: its kernel and bias are the same Variables.

        Args:
            linear: a layer of the class that this one stands in for, and of no subclass.
            rngs: draws A, and dropout's stream.
            **fields: the keyword fields of the low-rank path.

        Raises:
            AdapterError: ``linear`` is another kind of layer.
            ConfigError: lists every field that is out of range.
        """
        if type(linear) is not cls._base:
            got, wanted = type(linear).__name__, cls._base.__name__
            raise AdapterError(f"{cls.__name__}.from_linear: got a {got}, wanted an nnx.{wanted}")
        # Every argument that the constructor keeps has its name as an attribute.
        kept = {
            name: getattr(linear, name)
            for name in inspect.signature(cls._base.__init__).parameters
            if hasattr(linear, name)
        }
        kernel, bias = linear.kernel, linear.bias
        kept["kernel_init"] = lambda *_: kernel[...]
        if bias is not None:
            kept["bias_init"] = lambda *_: bias[...]
        layer = cls(**kept, rngs=rngs, **fields)
        layer.kernel, layer.bias = kernel, bias
        return layer

    def __call__(
        self,
        inputs: Num[Array, "..."],
        out_sharding: Any = None,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Inexact[Array, "..."]:
        """Return the layer's output, laid out as the layer without the path does.

        Args:
            inputs: x.
            out_sharding: of the output, as in ``lax.dot_general``.
            deterministic: switches dropout off for this call.
            rngs: draws dropout's mask instead of the layer's own stream.
        """
        y = super().__call__(inputs, out_sharding)
        axis, batch_dims, _ = _layout(self)
        return layers.add_low_rank(
            y,
            self.promote_dtype((inputs, None, None), dtype=self.dtype)[0],
            self.adapter,
            axis=axis,
            batch_dims=batch_dims,
            precision=self.precision,
            key=_dropout_key(self, deterministic, rngs),
        )

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set what ``nnx.view`` sets.

        Args:
            deterministic: switches dropout off.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    @property
    def adapter(self) -> Adapter:
        """A, B and the scale of this layer."""
        a, b = self.lora_a[...], self.lora_b[...]
        return layers.adapter_of(a, b, layers.config_of(self), _axes(self))


class LoRALinear(_LowRank, nnx.Linear):
    """``nnx.Linear`` with a low-rank path beside it.

    ``y = x · W + b + s · drop(x) · A · B``

    Kernel and bias are as they were, drawn from the same keys, and so are those of layers
    built later from the same ``rngs`` (with dropout, if it has a stream for that). ``train()``
    and ``eval()`` switch dropout, as they do ``nnx.Dropout``.

    Args:
        in_features: size of the last axis of x.
        out_features: size of the last axis of y.
        r: rank of A ``(in, r)`` and B ``(r, out)``, the ``LoRAParam`` ``lora_a`` and ``lora_b``.
        lora_alpha: numerator of the scale s.
        use_rslora: s is ``alpha / sqrt(r)`` instead of ``alpha / r``.
        lora_dropout: probability of dropping an element of x on the low-rank path, in [0, 1).
        init_lora_weights: a name in ``lora_jax.core.initializers.INITIALIZERS``.
        lora_dtype: of A and B.
        deterministic: switches dropout off.
        rngs: streams ``params`` and, with dropout, ``dropout``.
        base: the keywords of ``nnx.Linear``.

    Raises:
        ConfigError: lists every field that is out of range.

    Source: LoRA, arXiv 2106.09685, equation 3; names and defaults of PEFT.

    >>> layer, x = LoRALinear(3, 5, r=2, lora_alpha=4, rngs=nnx.Rngs(0)), jnp.ones((1, 3))
    >>> bool((layer(x) == nnx.Linear(3, 5, rngs=nnx.Rngs(0))(x)).all())
    True
    >>> layer.lora_a.shape, layer.adapter.scale
    ((3, 2), 2.0)
    """

    _base = nnx.Linear


class LoRALinearGeneral(_LowRank, nnx.LinearGeneral):
    """``nnx.LinearGeneral`` with a low-rank path beside it, for every layout of its kernel.

    ``y = x · W + b + s · drop(x) · A · B``, summed over ``axis``, with an A and a B for each
    index of ``batch_axis``

    Args:
        in_features: sizes of the axes summed over.
        out_features: sizes of the last axes of y.
        r: rank of A ``(*batch, *in, r)`` and B ``(*batch, r, *out)``. This and the other
            fields are those of ``LoRALinear``.
        base: the keywords of ``nnx.LinearGeneral``.

    Raises:
        ConfigError: lists every field that is out of range.

    Source: as ``LoRALinear``.

    >>> layer = LoRALinearGeneral((3, 6), (4, 5), axis=(-2, -1), r=2, rngs=nnx.Rngs(0))
    >>> layer.lora_a.shape, layer.lora_b.shape
    ((3, 6, 2), (2, 4, 5))
    """

    _base = nnx.LinearGeneral


def adapters_of(model: nnx.Module) -> dict[str, Adapter]:
    """Return the adapters of every LoRA layer in a model, by the path of its kernel.

    ``merge(nnx.state(model, BaseParam), adapters_of(model))`` is the state of the same model
    without low-rank paths. Each scale is its layer's own.

    Args:
        model: the model. ``nnx.scan`` and ``nnx.vmap`` must stack its layers along axis 0.

    Raises:
        AdapterError: the model has no LoRA layer.

    >>> list(adapters_of(LoRALinear(3, 5, r=2, rngs=nnx.Rngs(0))))
    ['kernel']
    """
    adapters = {
        paths.SEPARATOR.join(map(str, (*path, "kernel"))): module.adapter
        for path, module in nnx.iter_modules(model)
        if isinstance(module, _LowRank)
    }
    if not adapters:
        raise AdapterError("this model has no LoRA layer")
    return apart(adapters, adapters)


def _layout(layer: _LowRank) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return ``axis``, batch axes and features; ``nnx.Linear`` has only the last of them."""
    fields = getattr(layer, "axis", -1), getattr(layer, "batch_axis", ()), layer.out_features
    axis, batch_axis, features = map(layers.as_tuple, fields)
    return axis, batch_axis, features


def _axes(layer: _LowRank) -> str:
    return layers.kernel_axes(*_layout(layer))


def _key(rngs: nnx.Rngs) -> Key[Array, ""]:
    """Return a key that leaves the stream where it was, for the layers that are built later."""
    stream = rngs["params"]
    return jax.random.fold_in(fold_in_path(stream.key[...], "lora"), stream.count[...])


def _dropout_key(
    layer: _LowRank, deterministic: bool | None, rngs: nnx.Rngs | None
) -> Key[Array, ""] | None:
    off = layer.deterministic if deterministic is None else deterministic
    if off or layer.lora_dropout == 0:
        return None
    stream = layer.rngs if rngs is None else rngs["dropout"]
    if stream is None:
        problem = "lora_dropout was 0 when this layer was built, so it has no stream: pass rngs"
        raise ConfigError(problem)
    return stream()
