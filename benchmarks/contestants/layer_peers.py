"""The layer in the other LoRA libraries for JAX, each as its documentation uses it.

flax's and quax's have no scale, so their B holds it. A and B are in float32 everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..case import Unsupported, Work
from .layer import SCALE, Layer, draw
from .layer_jax import layer_work, nnx_work, pair, placed


def flax_nnx(layer: Layer) -> Work:
    """Return the work of ``nnx.LoRALinear``, which is ``nnx.Linear`` and ``nnx.LoRA``."""
    from flax import nnx

    given = draw(layer)
    module: Any = nnx.LoRALinear(
        layer.inputs,
        layer.outputs,
        lora_rank=layer.r,
        use_bias=False,
        param_dtype=jnp.dtype(layer.dtype),
        rngs=nnx.Rngs(0),
    )
    module.kernel[...] = placed(given.w, layer.dtype)
    module.lora.lora_a[...] = placed(given.a)
    module.lora.lora_b[...] = placed(SCALE * given.b)

    def named(gradient: Mapping[str, Any]) -> Mapping[str, Any]:
        of = gradient["lora"]
        return {"dA": of["lora_a"], "dB": SCALE * of["lora_b"]}

    return nnx_work(given, module, nnx.LoRAParam, named)


def qwix(layer: Layer) -> Work:
    """Return the work of Linen's ``Dense`` under qwix's ``LoraProvider``."""
    import flax.linen as nn
    import qwix

    given = draw(layer)
    plain = nn.Dense(layer.outputs, use_bias=False, param_dtype=layer.dtype)
    provider = qwix.LoraProvider(module_path=".*", rank=layer.r, alpha=layer.alpha)
    adapted: Any = qwix.apply_lora_to_model(plain, provider)
    return layer_work(
        given,
        lambda trained, frozen, x: adapted.apply({"params": {**frozen, **trained}}, x),
        {"kernel_lora_a": placed(given.a), "kernel_lora_b": placed(given.b)},
        {"kernel": placed(given.w, layer.dtype)},
        pair("kernel_lora_a", "kernel_lora_b"),
    )


def quax(layer: Layer) -> Work:
    """Return the work of Equinox's ``Linear``, ``loraify``'d by quax's example of LoRA.

    Its weight is ``(out, in)``, so its a is Bᵀ and its b is Aᵀ.
    """
    import equinox as eqx
    import quax
    from quax.examples.lora import loraify

    given = draw(layer)
    linear = eqx.nn.Linear(layer.inputs, layer.outputs, use_bias=False, key=jax.random.key(0))
    linear = eqx.tree_at(lambda one: one.weight, linear, placed(given.w.T, layer.dtype))
    adapted = loraify(linear, rank=layer.r, key=jax.random.key(1))

    def apply(trained: Mapping[str, jax.Array], frozen: Any, x: jax.Array) -> Any:
        both = (trained["a"], trained["b"])
        whole = eqx.tree_at(lambda one: (one.weight.a, one.weight.b), frozen, both)
        return quax.quaxify(lambda one, x: jax.vmap(one)(x))(whole, x)

    trained = {"a": placed(SCALE * given.b.T), "b": placed(given.a.T)}
    return layer_work(
        given,
        apply,
        trained,
        adapted,
        lambda gradient: {"dA": gradient["b"].T, "dB": SCALE * gradient["a"].T},
    )


def keras(layer: Layer) -> Work:
    """Return the work of keras' ``Dense`` after ``enable_lora``, on JAX.

    It multiplies x with ``W + s·A·B``, summed in float32 and cast to the layer's dtype.
    """
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    if keras.backend.backend() != "jax":
        raise Unsupported(f"keras runs on {keras.backend.backend()}: set KERAS_BACKEND=jax")
    given = draw(layer)
    dense = keras.layers.Dense(layer.outputs, use_bias=False, dtype=layer.dtype)
    dense.build((layer.tokens, layer.inputs))
    dense.enable_lora(layer.r, lora_alpha=layer.alpha)
    names = [variable.name for variable in dense.trainable_variables]

    def apply(trained: Mapping[str, jax.Array], frozen: Any, x: jax.Array) -> jax.Array:
        return dense.stateless_call([trained[name] for name in names], frozen, x)[0]

    return layer_work(
        given,
        apply,
        {"lora_kernel_a": placed(given.a), "lora_kernel_b": placed(given.b)},
        [placed(given.w, layer.dtype)],
        pair("lora_kernel_a", "lora_kernel_b"),
    )
