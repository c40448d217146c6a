"""JAX's side of the layer kinds: each layer's plain function under the rewriter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import lora
from ...core.adapter import Adapter
from ..tensors import Tensors
from .kinds import KINDS, Drawn, Kind, geometry, gradients


def plain(kind: Kind) -> Callable[..., Any]:
    """Return the layer as ``fn(params, x)``, without any low-rank path."""

    def linear(params: Any, x: Any) -> Any:
        w = params["weight"]
        return x @ (w if kind.axes == "io" else w.T) + params["bias"]

    def embedding(params: Any, ids: Any) -> Any:
        return params["weight"][ids]

    def experts(params: Any, x: Any) -> Any:
        return jnp.einsum("eni,eio->eno", x, params["weight"])

    def conv(params: Any, x: Any) -> Any:
        stride, padding, dilation = geometry(kind)
        y = jax.lax.conv_general_dilated(
            x, params["weight"], stride, [(p, p) for p in padding], rhs_dilation=dilation
        )
        return y + params["bias"].reshape(-1, *(1,) * len(stride))

    return {"linear": linear, "embedding": embedding, "experts": experts, "conv": conv}[kind.op]


@functools.cache
def _step(name: str, scale: float) -> Callable[..., Any]:
    kind = KINDS[name]
    fn = lora(plain(kind))

    def step(params: Any, x: Any, g: Any, pair: Any) -> Any:
        def run(pair: Any, x: Any) -> Any:
            a, b, m = pair["dA"], pair["dB"], pair.get("dm")
            adapter = Adapter(a, b, scale, kind.axes, magnitude=m)
            return fn(params, {"weight": adapter}, x)

        if jnp.issubdtype(x.dtype, jnp.integer):
            y, pull = jax.vjp(lambda pair: run(pair, x), pair)
            return {"y": y} | pull(g)[0]
        y, pull = jax.vjp(run, pair, x)
        gradient, dx = pull(g)
        return {"y": y, "dx": dx} | gradient

    return jax.jit(step)


def run(drawn: Drawn, base: str = "float32", low_rank: str = "float32") -> Tensors:
    """Return y, dx, dA, dB (and dm), laid out as ``lowering.truth``."""
    kind, cases = drawn.kind, list(drawn.lowered.cases)
    sizes: Any = [n for axis, n in zip(kind.axes, kind.weight, strict=True) if axis in "si"]
    a, b = (np.concatenate([getattr(case, name) for case in cases]) for name in "ab")
    stacked = (len(cases),) if len(cases) > 1 else ()
    shapes = (*sizes, kind.rank), (*stacked, kind.rank, kind.out)
    pair: Any = {"dA": a.reshape(shapes[0]), "dB": b.reshape(shapes[1])}
    if kind.dora:
        pair["dm"] = cases[0].m
    pair = {name: jnp.asarray(value, low_rank) for name, value in pair.items()}
    params = {"weight": jnp.asarray(drawn.weight, base)}
    if kind.biased:
        params["bias"] = jnp.asarray(cases[0].bias, base)
    x = jnp.asarray(drawn.x, None if drawn.x.dtype == np.int32 else base)
    found = dict(_step(kind.name, drawn.scale)(params, x, jnp.asarray(drawn.cotangent, base), pair))
    dtypes = {name: str(value.dtype) for name, value in found.items()}
    wanted = {name: base if name in ("y", "dx") else low_rank for name in found}
    if dtypes != wanted:
        raise AssertionError(f"got the dtypes {dtypes}, wanted {wanted}")
    found |= {"dA": found["dA"].reshape(-1, kind.rank), "dB": found["dB"].reshape(-1, kind.out)}
    return gradients(drawn, found)
