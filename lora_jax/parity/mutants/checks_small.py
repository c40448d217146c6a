"""A small model with every way in which a weight is used, in JAX and in PyTorch.

A tied embedding that is looked up and multiplied with, a dilated convolution, a square product,
two layers stacked for a scan with heads and rotary positions, a range of columns. PyTorch's side
is written from ``W + s·A·B`` alone, and has its scales from a table of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ... import lora
from ... import plan as make_plan
from ...core.adapter import Adapter, Adapters
from ...core.config.lora_config import LoraConfig
from ...rewrite import Plan
from ...train.data import Batch
from ..tensors import Tensors

VOCABULARY, WIDTH, HEADS, HEAD, HIDDEN, ROWS, TOKENS = 23, 12, 3, 4, 20, 6, 7

SHAPES: dict[str, tuple[int, ...]] = {
    "conv": (3, WIDTH, WIDTH),
    "embed": (VOCABULARY, WIDTH),
    "layers.bias": (2, HIDDEN),
    "layers.down": (2, HIDDEN, WIDTH),
    "layers.k": (2, WIDTH, HEADS, HEAD),
    "layers.o": (2, HEADS, HEAD, WIDTH),
    "layers.q": (2, WIDTH, HEADS, HEAD),
    "layers.up": (2, WIDTH, HIDDEN),
    "layers.v": (2, WIDTH, HEADS, HEAD),
    "mix": (WIDTH, WIDTH),
}
COLUMNS = (5, 20)
CONFIG = LoraConfig(
    r=3,
    lora_alpha=16,
    target_modules=["conv", "embed", "mix", "down", "o", "q", "up", "v"],
    rank_pattern={"o": 5},
    alpha_pattern={"down": 11, "mix": 20},
    output_slices={"up": [COLUMNS]},
)

# What alpha / r is, said once more.
SCALES: dict[str, float] = dict.fromkeys(
    ("conv", "embed", "layers.q", "layers.v", "layers.up"), 16 / 3
)
SCALES |= {"layers.o": 16 / 5, "layers.down": 11 / 3, "mix": 20 / 3}

# Letters of einsum for A and B of each weight, and of the weight.
_DELTAS = {
    "conv": "wir,ro->wio",
    "embed": "ir,ro->io",
    "layers.down": "sir,sro->sio",
    "layers.o": "shir,sro->shio",
    "layers.q": "sir,srho->siho",
    "layers.up": "sir,sro->sio",
    "layers.v": "sir,srho->siho",
    "mix": "ir,ro->io",
}


@dataclass(frozen=True)
class Small:
    """One draw of the model.

    Args:
        params: the frozen weights by path, numpy.
        pairs: A and B by ``<path>.a`` and ``<path>.b``, numpy, B not zero.
        ids: tokens ``(rows, tokens)``.
        labels: one for each row.
        weights: 0 for rows that do not count.
    """

    params: Tensors
    pairs: Tensors
    ids: Any
    labels: Any
    weights: Any

    @property
    def batch(self) -> Batch:
        """What a training step is given."""
        return Batch(self.ids, np.ones_like(self.ids), self.labels, self.weights)


def draw(seed: int) -> Small:
    """Return a model with weights of the usual sizes and pairs that are seen in the logits."""
    rng = np.random.default_rng(seed)

    def normal(shape: tuple[int, ...], size: float) -> Any:
        return (size * rng.standard_normal(shape)).astype(np.float32)

    params = {path: normal(shape, 0.3) for path, shape in SHAPES.items()}
    ranks = {path: 5 if path == "layers.o" else 3 for path in SCALES}
    pairs = {}
    for path, r in ranks.items():
        ins, outs = _DELTAS[path].split("->")[0].split(",")
        axes = dict(zip(_DELTAS[path].split("->")[1], SHAPES[path], strict=True)) | {"r": r}
        if path == "layers.up":
            axes["o"] = COLUMNS[1] - COLUMNS[0]
        pairs[f"{path}.a"] = normal(tuple(axes[x] for x in ins), 0.2)
        pairs[f"{path}.b"] = normal(tuple(axes[x] for x in outs), 0.1)
    ids = rng.integers(0, VOCABULARY, (ROWS, TOKENS)).astype(np.int32)
    labels = rng.integers(0, VOCABULARY, ROWS).astype(np.int32)
    weights = np.array([1, 1, 0, 1, 1, 0], np.float32)
    return Small(params, pairs, ids, labels, weights)


def forward(params: Any, ids: Any, mask: Any = None) -> Any:
    """Return the logits ``(rows, vocabulary)`` of the last token's next, in JAX."""
    x = params["embed"][ids]
    spec = lax.conv_dimension_numbers(x.shape, params["conv"].shape, ("NWC", "WIO", "NWC"))
    x = x + lax.conv_general_dilated(
        x, params["conv"], (1,), ((2, 2),), rhs_dilation=(2,), dimension_numbers=spec
    )
    x = x + jnp.tanh(x @ params["mix"])
    cos, sin = (jnp.asarray(part, x.dtype)[:, None] for part in _angles(ids.shape[1]))

    def turned(y: Any) -> Any:
        half = HEAD // 2
        return y * cos + jnp.concatenate([-y[..., half:], y[..., :half]], -1) * sin

    def layer(x: Any, own: Any) -> tuple[Any, None]:
        q, k, v = (jnp.einsum("ntd,dhk->nthk", x, own[name]) for name in "qkv")
        scores = jnp.einsum("nthk,nshk->nhts", turned(q), turned(k)) / HEAD**0.5
        causal = np.tri(ids.shape[1], dtype=bool)
        heads = jnp.einsum("nhts,nshk->nthk", jax.nn.softmax(jnp.where(causal, scores, -1e9)), v)
        x = x + jnp.einsum("nthk,hkd->ntd", heads, own["o"])
        return x + jnp.tanh(x @ own["up"] + own["bias"]) @ own["down"], None

    x = lax.scan(layer, x, params["layers"])[0]
    return x[:, -1] @ params["embed"].T


def nested(params: Tensors) -> Any:
    """Return the parameters as the tree that ``forward`` takes."""
    layers = {p.removeprefix("layers."): v for p, v in params.items() if p.startswith("layers.")}
    return {p: v for p, v in params.items() if not p.startswith("layers.")} | {"layers": layers}


def planned(small: Small) -> Plan:
    """Return the plan of the model, from the live code."""
    return make_plan(forward, nested(small.params), CONFIG, small.ids)


def adapters_of(plan: Plan, small: Small, *, zero: bool = False) -> Adapters:
    """Return the adapters as the plan has them, with the drawn A and B; with ``zero``, B = 0."""
    adapters = {}
    for leaf in plan.adapted:
        a, b = (jnp.asarray(small.pairs[f"{leaf.path}.{part}"]) for part in "ab")
        adapters[leaf.name] = leaf.adapter(a, jnp.zeros_like(b) if zero else b)
    return adapters


@functools.cache
def compiled() -> tuple[Plan, Callable[..., Any]]:
    """Return the plan and the compiled step, both from the live code."""
    plan = planned(draw(0))

    def step(params: Any, adapters: Adapters, ids: Any, g: Any) -> Any:
        y, pull = jax.vjp(lambda adapters: lora(forward)(params, adapters, ids), adapters)
        return y, pull(g)[0]

    return plan, jax.jit(step)


def reset() -> None:
    """Forget what was compiled."""
    compiled.cache_clear()


def run_jax(small: Small, g: Any, *, zero: bool = False) -> Tensors:
    """Return the logits and the gradients ``d<path>.<part>`` of ``⟨g, logits⟩``, by live code."""
    plan, step = compiled()
    adapters = adapters_of(plan, small, zero=zero)
    y, gradients = step(nested(small.params), adapters, small.ids, g)
    found = {"logits": np.asarray(y)}
    for leaf in plan.adapted:
        own: Any = gradients[leaf.name]
        assert isinstance(own, Adapter)
        found |= {f"d{leaf.path}.a": np.asarray(own.a), f"d{leaf.path}.b": np.asarray(own.b)}
    return found


def torch_logits(params: Any, pairs: Any, ids: Any) -> Any:
    """Return the logits by PyTorch, from tensors by path."""
    import torch
    from torch.nn import functional as F

    w = dict(params)
    for path, letters in _DELTAS.items():
        change = SCALES[path] * torch.einsum(letters, pairs[f"{path}.a"], pairs[f"{path}.b"])
        if path == "layers.up":
            change = F.pad(change, (COLUMNS[0], HIDDEN - COLUMNS[1]))
        w[path] = w[path] + change
    x = w["embed"][ids]
    x = x + F.conv1d(x.mT, w["conv"].permute(2, 1, 0), padding=2, dilation=2).mT
    x = x + torch.tanh(x @ w["mix"])
    cos, sin = (torch.from_numpy(part).to(x.dtype)[:, None] for part in _angles(ids.shape[1]))

    def turned(y: Any) -> Any:
        first, second = y.chunk(2, -1)
        return y * cos + torch.cat([-second, first], -1) * sin

    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    for n in range(2):
        own = {p.removeprefix("layers."): v[n] for p, v in w.items() if p.startswith("layers.")}
        q, k, v = (torch.einsum("ntd,dhk->nhtk", x, own[name]) for name in "qkv")
        q, k = (turned(one.transpose(1, 2)).transpose(1, 2) for one in (q, k))
        scores = (q @ k.mT / HEAD**0.5).masked_fill(~causal, -1e9)
        heads = scores.softmax(-1) @ v
        x = x + torch.einsum("nhtk,hkd->ntd", heads, own["o"])
        x = x + torch.tanh(x @ own["up"] + own["bias"]) @ own["down"]
    return x[:, -1] @ w["embed"].T


def run_torch(small: Small, g: Any, *, wide: bool = False) -> Tensors:
    """Return what ``run_jax`` does, by PyTorch; with ``wide`` in float64."""
    import torch

    dtype = torch.float64 if wide else torch.float32
    params = {path: torch.tensor(value, dtype=dtype) for path, value in small.params.items()}
    pairs = {
        name: torch.tensor(value, dtype=dtype, requires_grad=True)
        for name, value in small.pairs.items()
    }
    y = torch_logits(params, pairs, torch.from_numpy(small.ids).long())
    y.backward(torch.tensor(g, dtype=dtype))
    found = {"logits": y.detach().numpy()}
    return found | {f"d{n}": p.grad.numpy() for n, p in pairs.items() if p.grad is not None}


def off_by_a_rounding(small: Small, seed: int) -> Small:
    """Return the model in float64 with every value off by one rounding of float32."""
    rng = np.random.default_rng(seed)

    def moved(tensors: Tensors) -> Tensors:
        return {
            n: v * (1 + 2.0**-24 * rng.choice((-1.0, 1.0), v.shape)) for n, v in tensors.items()
        }

    return replace(small, params=moved(small.params), pairs=moved(small.pairs))


def _angles(length: int) -> tuple[Any, Any]:
    frequencies = 10.0 ** -np.arange(HEAD // 2)
    angles = np.tile(np.outer(np.arange(length), frequencies), 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
