"""Linen layers with a low-rank path: ``LoRADense``, ``LoRADenseGeneral``.

The base weights stay in ``"params"``, named and drawn as the plain layer's; A and B are in a
collection of their own, so a training step differentiates with respect to
``variables["lora"]`` alone. Name the layers that a compact method creates (``name="query"``):
Flax names nameless ones after their class, and ``Dense_0`` does not load into ``LoRADense_0``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, no_type_check

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Num

from ..core import flax_layer, paths
from ..core.adapter import Adapter
from ..core.buffers import apart
from ..core.errors import AdapterError, raise_all
from ..core.initializers import draw
from ..core.xla import bf16_dot

COLLECTION, A, B = "lora", "lora_a", "lora_b"


class _LowRank(nn.Module, kw_only=True):
    """The fields of the low-rank path and the path itself, mixed in before a layer of Flax."""

    r: int = 8
    lora_alpha: int | float = 8
    use_rslora: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True
    lora_dtype: DTypeLike = jnp.float32
    deterministic: bool | None = None

    def __post_init__(self) -> None:
        flax_layer.config_of(self)
        if self.dot_general is None and self.dot_general_cls is None:
            self.dot_general = bf16_dot.dot_general
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: Num[Array, "..."], deterministic: bool | None = None
    ) -> Inexact[Array, "..."]:
        """Return the layer's output, laid out as the layer without the path does.

        Args:
            inputs: x.
            deterministic: switches dropout off, here or as a field.
        """
        y = super().__call__(inputs)
        axis, batch_dims, _ = _layout(self)
        return flax_layer.add_low_rank(
            y,
            self.promote_dtype(inputs, None, None, dtype=self.dtype)[0],
            _adapter(self),
            axis=axis,
            batch_dims=batch_dims,
            precision=self.precision,
            key=_dropout_key(self, deterministic),
        )


# beartype cannot check the types that Flax gives its own fields.
@no_type_check
class LoRADense(_LowRank, nn.Dense):
    """``nn.Dense`` with a low-rank path beside it.

    ``y = x · W + b + s · drop(x) · A · B``

    Every field and parameter of ``nn.Dense`` is as it was: ``"params"`` holds ``kernel``
    ``(in, features)`` and ``bias``, with the same draw. The collection ``"lora"`` holds
    ``lora_a`` ``(in, r)`` and ``lora_b`` ``(r, features)``, drawn from the rng ``"params"``.
    The call takes ``deterministic`` as ``nn.Dropout`` does; the rng is ``"dropout"``.

    Args:
        r: rank of A and B.
        lora_alpha: numerator of the scale s.
        use_rslora: s is ``alpha / sqrt(r)`` instead of ``alpha / r``.
        lora_dropout: probability of dropping an element of x on the low-rank path, in [0, 1).
        init_lora_weights: a name in ``lora_jax.core.initializers.INITIALIZERS``.
        lora_dtype: of A and B.
        deterministic: switches dropout off; give it here or at the call.

    Raises:
        ConfigError: lists every field that is out of range.

    Source: LoRA, arXiv 2106.09685, equation 3; names and defaults of PEFT.

    >>> layer, x = LoRADense(5, r=2, lora_alpha=4), jnp.ones((1, 3))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> bool((layer.apply(variables, x) == nn.Dense(5).apply(variables, x)).all())
    True
    >>> jax.tree.map(jnp.shape, variables["lora"])
    {'lora_a': (3, 2), 'lora_b': (2, 5)}
    """


@no_type_check
class LoRADenseGeneral(_LowRank, nn.DenseGeneral):
    """``nn.DenseGeneral`` with a low-rank path beside it, for every layout of its kernel.

    ``y = x · W + b + s · drop(x) · A · B``, summed over ``axis``, with an A and a B for each
    index of ``batch_dims``

    Args:
        r: rank of A ``(*batch, *in, r)`` and B ``(*batch, r, *features)``. This and the other
            fields are those of ``LoRADense``.

    Raises:
        ConfigError: lists every field that is out of range.

    Source: as ``LoRADense``.

    >>> layer = LoRADenseGeneral((4, 5), axis=(-2, -1), r=2)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3, 6)))
    >>> jax.tree.map(jnp.shape, variables["lora"])
    {'lora_a': (3, 6, 2), 'lora_b': (2, 4, 5)}
    """


def adapters_of(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[str, Adapter]:
    """Return the adapters of every LoRA layer in a model, by the path of its kernel.

    ``merge(variables["params"], adapters_of(model, variables, x))`` is the parameters of the
    same model without low-rank paths. Each scale is its layer's own. The model is traced, not
    run. ``nn.scan`` and ``nn.vmap`` must stack both collections along axis 0.

    Args:
        model: the model.
        variables: its variables, with the collection ``"lora"``.
        *args: example arguments of the model's call.
        **kwargs: example keyword arguments.

    Raises:
        AdapterError: lists every A or B that no layer uses, or that a layer lacks; or there is
            no LoRA layer.

    >>> layer, x = LoRADense(5, r=2, lora_alpha=4), jnp.ones((1, 3))
    >>> adapters_of(layer, layer.init(jax.random.key(0), x), x)["kernel"].scale
    2.0
    """
    modules = model.module_paths(jax.random.key(0), *args, **kwargs)
    found = {name: module for name, module in modules.items() if isinstance(module, _LowRank)}
    leaves = paths.flatten(variables.get(COLLECTION, {}))
    wanted = {_path(name, leaf) for name in found for leaf in (A, B)}
    if not wanted and not leaves:
        raise AdapterError("this model has no LoRA layer, and its variables no adapters")
    raise_all(
        AdapterError,
        "the LoRA layers that these arguments reach are not those of the variables",
        [f"{path}: the variables do not hold it" for path in sorted(wanted - leaves.keys())]
        + [f"{path}: no layer uses it" for path in sorted(leaves.keys() - wanted)],
    )
    adapters = {
        _path(name, "kernel"): flax_layer.adapter_of(
            leaves[_path(name, A)],
            leaves[_path(name, B)],
            flax_layer.config_of(module),
            _axes(module),
        )
        for name, module in found.items()
    }
    return apart(adapters, variables)


def _layout(module: _LowRank) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return ``axis``, ``batch_dims`` and ``features``; ``nn.Dense`` has only the last of them."""
    fields = getattr(module, "axis", -1), getattr(module, "batch_dims", ()), module.features
    axis, batch_dims, features = map(flax_layer.as_tuple, fields)
    return axis, batch_dims, features


def _axes(module: _LowRank) -> str:
    return flax_layer.kernel_axes(*_layout(module))


def _adapter(module: _LowRank) -> Adapter:
    """Return the module's adapter, drawn if its collection is being made."""
    config, axes = flax_layer.config_of(module), _axes(module)

    @functools.cache
    def pair() -> tuple[jax.Array, jax.Array]:
        # A scope of its own: counting keys here would shift the base's draws under scan, which
        # traces a layer more than once.
        assert module.scope is not None
        key = module.scope.push(COLLECTION, reuse=True).make_rng("params")
        shape = nn.unbox(module.get_variable("params", "kernel")).shape
        return draw(key, config.init_lora_weights, shape, axes, config.r, module.lora_dtype)

    a = module.variable(COLLECTION, A, lambda: pair()[0])
    b = module.variable(COLLECTION, B, lambda: pair()[1])
    return flax_layer.adapter_of(a.value, b.value, config, axes)


def _dropout_key(module: _LowRank, deterministic: bool | None) -> jax.Array | None:
    if module.lora_dropout == 0:
        return None
    if nn.merge_param("deterministic", module.deterministic, deterministic):
        return None
    return module.make_rng("dropout")


def _path(module: str, leaf: str) -> str:
    # Flax joins names by "/"; the root module's is empty.
    return paths.SEPARATOR.join(filter(None, (*module.split("/"), leaf)))
