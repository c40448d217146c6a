"""The layer in JAX: ours in its three forms, and the layer without LoRA.

Whatever its library, a contestant is a pure function of what is trained, what is frozen and x;
each is compiled ahead of time in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax import Adapter, LoraConfig, lora, plan
from lora_jax.linen import LoRADense
from lora_jax.nnx import LoRALinear, LoRAParam

from ..case import Arrays, Work, as_arrays
from .common import jax_work
from .layer import Given, Layer, draw

Apply = Callable[[Any, Any, jax.Array], jax.Array]
Named = Callable[[Any], Mapping[str, Any]]


def layer_work(given: Given, apply: Apply, trained: Any, frozen: Any, named: Named) -> Work:
    """Return the work of a layer.

    Args:
        given: x, g, and which work.
        apply: ``y = apply(trained, frozen, x)``; a wider y is cast to the layer's dtype.
        trained: what gradients are taken of.
        frozen: everything else.
        named: makes the gradient of ``trained`` into dA and dB, outside the clock.
    """
    dtype = given.layer.dtype

    def forward(trained: Any, frozen: Any, x: jax.Array) -> jax.Array:
        return apply(trained, frozen, x).astype(dtype)

    def both(trained: Any, frozen: Any, x: jax.Array, g: jax.Array) -> tuple[Any, ...]:
        y, pull = jax.vjp(lambda trained, x: forward(trained, frozen, x), trained, x)
        return y, *pull(g)

    def read(result: tuple[Any, ...]) -> Arrays:
        y, gradient, dx = result
        return as_arrays({"y": y, "dx": dx, **named(gradient)})

    x, g = placed(given.x, dtype), placed(given.g, dtype)
    if given.layer.backward:
        return jax_work(both, trained, frozen, x, g, read=read)
    return jax_work(forward, trained, frozen, x, read=lambda y: as_arrays({"y": y}))


def placed(array: np.ndarray, dtype: str = "float32") -> jax.Array:
    """Return an array on the device."""
    return jnp.asarray(array, dtype)


def pair(a: str, b: str) -> Named:
    """Return what names the gradient of a dict that holds A and B under these keys."""
    return lambda gradient: {"dA": gradient[a], "dB": gradient[b]}


def rewritten(layer: Layer) -> Work:
    """Return the work of ``lora`` on a plain product."""
    given = draw(layer)

    def fn(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ params["w"]

    params = {"w": placed(given.w, layer.dtype)}
    config = LoraConfig(r=layer.r, lora_alpha=layer.alpha, target_modules=("w",))
    drawn = plan(fn, params, config, placed(given.x, layer.dtype)).init(jax.random.key(0))["w"]
    assert isinstance(drawn, Adapter)
    adapters = {"w": replace(drawn, a=placed(given.a), b=placed(given.b))}
    adapted = lora(fn)
    return layer_work(
        given,
        lambda adapters, params, x: adapted(params, adapters, x),
        adapters,
        params,
        lambda gradient: {"dA": gradient["w"].a, "dB": gradient["w"].b},
    )


def lora_dense(layer: Layer) -> Work:
    """Return the work of ``lora_jax.linen.LoRADense``."""
    given = draw(layer)
    module: Any = LoRADense(
        layer.outputs,
        use_bias=False,
        param_dtype=layer.dtype,
        r=layer.r,
        lora_alpha=layer.alpha,
    )
    return layer_work(
        given,
        lambda lora, params, x: module.apply({"params": params, "lora": lora}, x),
        {"lora_a": placed(given.a), "lora_b": placed(given.b)},
        {"kernel": placed(given.w, layer.dtype)},
        pair("lora_a", "lora_b"),
    )


def lora_linear(layer: Layer) -> Work:
    """Return the work of ``lora_jax.nnx.LoRALinear``."""
    given = draw(layer)
    module: Any = LoRALinear(
        layer.inputs,
        layer.outputs,
        use_bias=False,
        param_dtype=jnp.dtype(layer.dtype),
        r=layer.r,
        lora_alpha=layer.alpha,
        rngs=nnx.Rngs(0),
    )
    module.kernel[...] = placed(given.w, layer.dtype)
    module.lora_a[...], module.lora_b[...] = placed(given.a), placed(given.b)
    return nnx_work(given, module, LoRAParam, pair("lora_a", "lora_b"))


def nnx_work(given: Given, module: nnx.Module, kind: type[nnx.Variable], named: Named) -> Work:
    """Return the work of an NNX module whose variables of this kind are trained."""
    graph, trained, frozen = nnx.split(module, kind, ...)

    def apply(trained: Any, frozen: Any, x: jax.Array) -> jax.Array:
        whole: Any = nnx.merge(graph, trained, frozen)
        return whole(x)

    def pure(gradient: nnx.State) -> Mapping[str, Any]:
        return named(nnx.to_pure_dict(gradient))

    return layer_work(given, apply, trained, frozen, pure)


def frozen(layer: Layer) -> Work:
    """Return the work of the plain product: y and dx alone, which LoRA needs as well."""
    given = draw(layer)
    weight = placed(given.merged, layer.dtype)
    return layer_work(given, lambda _, weight, x: x @ weight, (), weight, lambda _: {})


def full(layer: Layer) -> Work:
    """Return the work of the plain product with a trained weight: y, dx and dW."""
    given = draw(layer)
    weight = placed(given.merged, layer.dtype)
    return layer_work(
        given,
        lambda weight, _, x: x @ weight,
        weight,
        (),
        lambda dw: given.chained(np.asarray(dw, np.float32)),
    )
