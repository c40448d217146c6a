"""What the laws are tested on: a function, parameters and targets for each kind of use.

Sizes are odd, differ from each other and are no products of each other, so that a
weight-sized array in a compiled program can only be that weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

B, T, D, H, K, F, L, E, V = 11, 13, 30, 3, 7, 37, 5, 2, 41


@dataclass(frozen=True)
class Subject:
    """One function under the laws; ``axes`` is what planning must read off each target."""

    name: str
    fn: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]
    axes: Mapping[str, str]
    x: tuple[int, ...] = (B, T, D)
    r: int = 3
    sites: int = 1
    dense_gradient: bool = False
    half: bool = field(default=False, kw_only=True)
    materialized: bool = field(default=False, kw_only=True)
    vmaps: bool = field(default=True, kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __str__(self) -> str:
        return self.name

    def draw(self, dtype: Any = np.float32) -> tuple[dict[str, Any], jax.Array]:
        rng = np.random.default_rng(0)
        params = {
            path: jnp.asarray(rng.normal(size=shape) / np.sqrt(max(shape)), dtype)
            for path, shape in self.shapes.items()
        }
        return params, jnp.asarray(rng.normal(size=self.x), dtype)

    def build(self, dtype: Any) -> tuple[Callable[..., Any], dict[str, Any], tuple[Any, ...]]:
        params, x = self.draw(dtype)
        return self.fn, params, (x,)

    @property
    def precision(self) -> str:
        return "half" if self.half else "double"

    @property
    def count(self) -> int:
        return len(self.axes)

    def sites_of(self, name: str) -> int:
        return self.sites


@jax.custom_vjp
def scaled_backward(w, x):
    """An author's derivative that is not the primal's: twice the input gradient."""
    return x @ w


scaled_backward.defvjp(
    lambda w, x: (x @ w, (w, x)),
    lambda res, ct: (
        3.0 * jnp.einsum("bti,bto->io", res[1], ct),
        2.0 * ct @ res[0].T,
    ),
)


@jax.custom_jvp
def scaled_tangent(w, x):
    return x @ w


@scaled_tangent.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return x @ w, 3.0 * x @ dw + 2.0 * dx @ w


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -0.1, 0.1),))


def scan_layers(p, x, *, wrap=lambda f: f):
    @wrap
    def layer(h, w):
        return jnp.tanh(h @ w["up"]) @ w["down"] @ p["shared"], None

    return lax.scan(layer, x, {"up": p["up"], "down": p["down"]})[0]


def two_scans(p, x):
    """Stacked layers whose steps hold stacked experts, scanned over in turn."""

    def outer(h, w):
        return lax.scan(lambda h, e: (h + jnp.tanh(h @ e), None), h, w)

    return lax.scan(outer, x, p["w"])[0]


def half_precision(p, x):
    return (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(x.dtype)


@jax.jit
def layer(w, x):
    return jnp.tanh(x @ w)


def jitted_twice(p, x):
    """JAX traces the layer once for both calls."""
    return layer(p["w"], layer(p["w"], x))


ALL = [
    Subject("dense", lambda p, x: jnp.tanh(x @ p["w"]), {"w": (D, F)}, {"w": "io"}),
    Subject("vector_input", lambda p, x: x @ p["w"], {"w": (D, F)}, {"w": "io"}, x=(D,)),
    Subject("weight_first", lambda p, x: p["w"] @ x, {"w": (F, D)}, {"w": "oi"}, x=(D, B)),
    Subject("transposed", lambda p, x: x @ p["w"].T, {"w": (F, D)}, {"w": "oi"}),
    Subject(
        "torch_layout",
        partial(lambda p, x: jnp.einsum("bti,oi->bto", x, p["w"])),
        {"w": (F, D)},
        {"w": "oi"},
    ),
    Subject(
        "heads_out",
        lambda p, x: jnp.einsum("btd,dhk->bhtk", x, p["w"]),
        {"w": (D, H, K)},
        {"w": "ioo"},
    ),
    Subject(
        "heads_in",
        lambda p, x: jnp.einsum("bthk,hkd->btd", x, p["w"]),
        {"w": (H, K, D)},
        {"w": "iio"},
        x=(B, T, H, K),
    ),
    Subject(
        "heads_in_swapped",
        lambda p, x: jnp.einsum("bkth,hdk->bdt", x, p["w"]),
        {"w": (H, D, K)},
        {"w": "ioi"},
        x=(B, K, T, H),
    ),
    Subject(
        "pairs_out_of_order",
        lambda p, x: lax.dot_general(x, p["w"], (((1, 2), (2, 0)), ((), ()))),
        {"w": (H, D, K)},
        {"w": "ioi"},
        x=(B, K, H),
    ),
    Subject(
        "experts",
        lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"]),
        {"w": (E, D, F)},
        {"w": "sio"},
        x=(E, B, D),
    ),
    Subject(
        "experts_last",
        lambda p, x: jnp.einsum("bed,dfe->ebf", x, p["w"]),
        {"w": (D, F, E)},
        {"w": "ios"},
        x=(B, E, D),
    ),
    Subject(
        "experts_weight_first",
        lambda p, x: jnp.einsum("efd,ebd->efb", p["w"], x),
        {"w": (E, F, D)},
        {"w": "soi"},
        x=(E, B, D),
    ),
    Subject(
        "two_batch_axes",
        lambda p, x: jnp.einsum("hebd,edhf->hebf", x, p["w"]),
        {"w": (E, D, H, F)},
        {"w": "siso"},
        x=(H, E, B, D),
    ),
    Subject(
        "split_heads",
        lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["w"].reshape(D, H, K)),
        {"w": (D, H * K)},
        {"w": "io"},
    ),
    Subject(
        "merged_heads", lambda p, x: x @ p["w"].reshape(D, H * K), {"w": (D, H, K)}, {"w": "ioo"}
    ),
    Subject(
        "merged_then_transposed",
        lambda p, x: x @ p["w"].transpose(1, 2, 0).reshape(H * K, D).T,
        {"w": (D, H, K)},
        {"w": "ioo"},
    ),
    Subject(
        "unit_axes",
        lambda p, x: jnp.einsum("btd,udf->btuf", x, p["w"][None]),
        {"w": (D, F)},
        {"w": "io"},
    ),
    Subject(
        "unit_contracted",
        lambda p, x: jnp.einsum("btdu,udf->btf", x[..., None], p["w"][None]),
        {"w": (D, F)},
        {"w": "io"},
    ),
    Subject(
        "unit_batch",
        lambda p, x: jnp.einsum("ubtd,ufd->ubtf", x[None], p["w"].T[None]),
        {"w": (D, F)},
        {"w": "io"},
    ),
    Subject(
        "vmapped_weight",
        lambda p, x: jax.vmap(lambda w, h: jnp.tanh(h @ w))(p["w"], x),
        {"w": (E, D, F)},
        {"w": "sio"},
        x=(E, B, D),
    ),
    Subject(
        "vmapped_input",
        lambda p, x: jax.vmap(lambda h: jnp.tanh(p["w"] @ h))(x),
        {"w": (F, D)},
        {"w": "oi"},
        x=(B, D),
    ),
    Subject(
        "twice", lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": (D, D)}, {"w": "io"}, sites=2
    ),
    Subject("jitted_twice", jitted_twice, {"w": (D, D)}, {"w": "io"}, sites=2),
    Subject(
        "tied",
        lambda p, x: jnp.tanh(jax.nn.softmax(x) @ p["w"]) @ p["w"].T,
        {"w": (V, D)},
        {"w": "io"},
        x=(B, T, V),
        sites=2,
    ),
    Subject(
        "two_targets",
        lambda p, x: jax.nn.gelu(x @ p["a"] + p["bias"]) @ p["b"],
        {"a": (D, F), "b": (F, K), "bias": (F,)},
        {"a": "io", "b": "io"},
    ),
    Subject(
        "jitted",
        lambda p, x: jax.jit(lambda w, h: jax.nn.silu(h @ w))(p["w"], x),
        {"w": (D, F)},
        {"w": "io"},
    ),
    Subject(
        "jitted_transpose",
        lambda p, x: x @ jax.jit(jnp.transpose)(p["w"]),
        {"w": (F, D)},
        {"w": "oi"},
    ),
    Subject(
        "remat",
        lambda p, x: jax.checkpoint(
            lambda w, h: jnp.tanh(h @ w), policy=jax.checkpoint_policies.dots_saveable
        )(p["w"], x),
        {"w": (D, F)},
        {"w": "io"},
    ),
    Subject(
        "custom_vjp",
        lambda p, x: scaled_backward(p["w"], jnp.tanh(x)),
        {"w": (D, F)},
        {"w": "io"},
        dense_gradient=True,
    ),
    Subject(
        "custom_jvp",
        lambda p, x: scaled_tangent(p["w"], jnp.tanh(x)),
        {"w": (D, F)},
        {"w": "io"},
        dense_gradient=True,
    ),
    Subject(
        "custom_activation",
        lambda p, x: clipped(jax.nn.relu(x @ p["w"])),
        {"w": (D, F)},
        {"w": "io"},
    ),
    Subject(
        "scan",
        scan_layers,
        {"up": (L, D, F), "down": (L, F, K), "shared": (K, D)},
        {"up": "sio", "down": "sio", "shared": "io"},
    ),
    Subject(
        "scan_reversed",
        lambda p, x: lax.scan(
            lambda h, w: (jnp.tanh(h @ w), h.sum()), x, p["w"], reverse=True, unroll=2
        ),
        {"w": (L, D, D)},
        {"w": "sio"},
    ),
    Subject(
        "scan_remat",
        partial(scan_layers, wrap=jax.checkpoint),
        {"up": (L, D, F), "down": (L, F, K), "shared": (K, D)},
        {"up": "sio", "down": "sio", "shared": "io"},
    ),
    Subject("scan_in_scan", two_scans, {"w": (L, E, D, D)}, {"w": "ssio"}),
    Subject(
        "scan_of_transposed",
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w.T), None), x, p["w"].transpose(2, 0, 1))[
            0
        ],
        {"w": (D, D, L)},
        {"w": "ois"},
    ),
    Subject(
        "inner_grad",
        lambda p, x: jax.grad(lambda h: jnp.tanh(h @ p["w"]).sum())(x),
        {"w": (D, F)},
        {"w": "io"},
        sites=2,
    ),
    Subject("half_precision", half_precision, {"w": (D, F)}, {"w": "io"}, half=True),
]
