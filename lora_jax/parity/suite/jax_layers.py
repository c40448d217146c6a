"""JAX's sides of the layer checks: each takes a ``Case`` and returns y, dx, dA, dB as numpy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ... import linen, lora
from ... import nnx as lora_nnx
from ...core.adapter import Adapter
from ..tensors import Tensors
from .lora_oracle import Case

Side = Callable[..., Tensors]

_COMPILED: list[Any] = []


def _side(build: Callable[..., Callable[..., Any]]) -> Side:
    """Make a side of ``build(features, config, base, low_rank)``, compiled once a configuration.

    What it builds is called with W, bias, x, g, A, B and returns y, the gradients of A and B by
    ``lora_a`` and ``lora_b``, and that of x.
    """

    @functools.cache
    def compiled(features: int, config: Any, base: str, low_rank: str) -> Callable[..., Any]:
        return jax.jit(build(features, dict(config), base, low_rank))

    _COMPILED.append(compiled)

    def run(
        case: Case,
        alpha: int | float,
        *,
        rslora: bool = False,
        base: str = "float32",
        low_rank: str = "float32",
    ) -> Tensors:
        config = (("r", case.b.shape[0]), ("lora_alpha", alpha), ("use_rslora", rslora))
        step = compiled(case.w.shape[1], config, base, low_rank)
        args = [jnp.asarray(value, base) for value in (case.w, case.bias, case.x, case.g)]
        args += [jnp.asarray(value, low_rank) for value in (case.a, case.b)]
        y, grads, dx = step(*args)
        if set(grads) != {"lora_a", "lora_b"}:
            raise AssertionError(f"got gradients for {sorted(grads)}, wanted A and B alone")
        dtypes = y.dtype, dx.dtype, grads["lora_a"].dtype
        if dtypes != (base, base, low_rank):
            raise AssertionError(f"got y, dx, dA as {dtypes}, wanted {(base, base, low_rank)}")
        tensors = {"y": y, "dx": dx, "dA": grads["lora_a"], "dB": grads["lora_b"]}
        return {name: np.asarray(value) for name, value in tensors.items()}

    return run


def reset() -> None:
    """Forget what was compiled, which a planted bug may have gone into."""
    for compiled in _COMPILED:
        compiled.cache_clear()


def lora_dense(features: int, config: Any, base: str, low_rank: str) -> Callable[..., Any]:
    """Build ``linen.LoRADense``."""
    layer = linen.LoRADense(features, dtype=base, param_dtype=base, lora_dtype=low_rank, **config)

    def step(w: Any, bias: Any, x: Any, g: Any, a: Any, b: Any) -> Any:
        params = {"kernel": w, "bias": bias}
        adapters = {"lora_a": a, "lora_b": b}
        y, pull = jax.vjp(
            lambda lora, x: layer.apply({"params": params, "lora": lora}, x), adapters, x
        )
        return y, *pull(g)

    return step


def lora_linear(features: int, config: Any, base: str, low_rank: str) -> Callable[..., Any]:
    """Build ``nnx.LoRALinear``."""

    def step(w: Any, bias: Any, x: Any, g: Any, a: Any, b: Any) -> Any:
        layer: Any = lora_nnx.LoRALinear(
            *w.shape, dtype=base, param_dtype=base, lora_dtype=low_rank, **config, rngs=nnx.Rngs(0)
        )
        layer.kernel[...], layer.bias[...], layer.lora_a[...], layer.lora_b[...] = w, bias, a, b

        def loss(layer: Any, x: Any) -> Any:
            y = layer(x)
            return jnp.vdot(g, y), y

        wrt = nnx.DiffState(0, lora_nnx.LoRAParam)
        (grads, dx), y = nnx.grad(loss, argnums=(wrt, 1), has_aux=True)(layer, x)
        return y, nnx.to_pure_dict(grads), dx

    return step


def rewritten(features: int, config: Any, base: str, low_rank: str) -> Callable[..., Any]:
    """Build a plain function of a dict under the rewriter."""
    from ...core.config.lora_config import LoraConfig, scale

    def fn(params: Any, x: Any) -> Any:
        return x @ params["kernel"] + params["bias"]

    s = scale(LoraConfig(**config), config["r"], config["lora_alpha"])

    def step(w: Any, bias: Any, x: Any, g: Any, a: Any, b: Any) -> Any:
        def run(low_rank: Any, x: Any) -> Any:
            adapters = {"kernel": Adapter(low_rank["lora_a"], low_rank["lora_b"], s)}
            return lora(fn)({"kernel": w, "bias": bias}, adapters, x)

        y, pull = jax.vjp(run, {"lora_a": a, "lora_b": b}, x)
        return y, *pull(g)

    return step


JAX_SIDES: dict[str, Side] = {
    "LoRADense": _side(lora_dense),
    "LoRALinear": _side(lora_linear),
    "rewriter": _side(rewritten),
}
