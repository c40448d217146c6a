"""What all contestants of the SmolLM2-shaped cases get: sizes, random weights, adapters, tokens.

Everything is drawn with NumPy, so that a contestant in PyTorch holds no arrays of JAX. Layers are
the first axis of every weight and of every A and B; ``unrolled`` makes lists of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import Adapter, Plan, plan, save_pretrained

from ..case import Arrays, Needed, as_arrays
from . import decoder
from .decoder import Params, Sizes

SMOLLM2 = Sizes(
    layers=30,
    width=576,
    hidden=1536,
    heads=9,
    vocabulary=49_152,
    rows=4,
    tokens=128,
    kv_heads=3,
    theta=100_000.0,
    eps=1e-5,
    tied=True,
)
BATCHES = 4
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01

# Of the adapters' B, so that the low-rank path is seen, and is small beside the frozen one.
B_SIZE = 0.02

# PyTorch's module of each linear, in a layer.
MODULES = {name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")} | {
    name: f"mlp.{name}_proj" for name in ("gate", "up", "down")
}


@dataclass(frozen=True)
class Task:
    """What is trained.

    Args:
        sizes: of the decoder.
        dtype: of the frozen weights and the activations; adapters are float32.
        r: the rank of all adapters.
    """

    sizes: Sizes = SMOLLM2
    dtype: str = "float32"
    r: int = 16

    def __str__(self) -> str:
        s = self.sizes
        return (
            f"a decoder of {s.layers} layers of width {s.width}, vocabulary {s.vocabulary:,}, "
            f"{s.rows} x {s.tokens} tokens, LoRA r={self.r} on its seven linears, {self.dtype}"
        )


def weights(sizes: Sizes) -> dict[str, Any]:
    """Return random float32 weights, the same at every call: norms near 1, products near 1."""
    rng = np.random.default_rng(0)

    def matrix(*shape: int, fan_in: int) -> np.ndarray:
        drawn = rng.standard_normal(shape, np.float32)
        return np.multiply(drawn, fan_in**-0.5, out=drawn, dtype=np.float32)

    def norm(*shape: int) -> np.ndarray:
        return 1 + np.float32(0.1) * rng.standard_normal(shape, np.float32)

    n, d = sizes.layers, sizes.width
    layers = {"norm1": norm(n, d), "norm2": norm(n, d)}
    for name, (width_in, width_out) in decoder.linears(sizes).items():
        layers[name] = matrix(n, width_in, width_out, fan_in=width_in)
    head = {} if sizes.tied else {"head": matrix(d, sizes.vocabulary, fan_in=d)}
    embedding = matrix(sizes.vocabulary, d, fan_in=d)
    return {"embedding": embedding, "layers": layers, "norm": norm(d), **head}


def unrolled(params: Params) -> dict[str, Any]:
    """Return the same weights with a list of layers."""
    layers = params["layers"]
    count = len(layers["norm1"])
    return {**params, "layers": [{name: w[n] for name, w in layers.items()} for n in range(count)]}


def in_jax(task: Task, *, scan: bool) -> Any:
    """Return the weights as arrays of JAX in the task's dtype."""
    drawn = weights(task.sizes)
    return jax.tree.map(lambda w: jnp.asarray(w, task.dtype), drawn if scan else unrolled(drawn))


def shapes(task: Task, *, scan: bool) -> Any:
    """Return the shapes of ``in_jax``."""
    return decoder.shapes(task.sizes, task.dtype, stacked=scan)


def planned(task: Task, *, scan: bool) -> Plan:
    """Return the plan of the decoder's adapters."""

    def fn(params: Params, ids: jax.Array) -> jax.Array:
        return decoder.states(task.sizes, params, ids)

    config, ids = decoder.config(task.r), decoder.tokens(task.sizes)
    return plan(fn, shapes(task, scan=scan), config, ids)


def adapters(task: Task, plan: Plan) -> dict[str, Adapter]:
    """Return random adapters for the plan, the same ones whether it is of a scan or not."""
    rng, n, r, drawn = np.random.default_rng(1), task.sizes.layers, task.r, {}
    for name, (width_in, width_out) in decoder.linears(task.sizes).items():
        a = rng.standard_normal((n, width_in, r), np.float32) * np.float32(width_in**-0.5)
        b = rng.standard_normal((n, r, width_out), np.float32) * np.float32(B_SIZE)
        drawn[name] = a, b

    def filled(path: str, entry: Any) -> Adapter:
        _, *layer, name = path.split(".")
        a, b = (part[int(layer[0])] if layer else part for part in drawn[name])
        # Copies: they are donated, and must not be views of what others read.
        return replace(entry, a=jnp.array(a), b=jnp.array(b))

    return {path: filled(path, entry) for path, entry in plan.abstract().items()}


def batches(sizes: Sizes) -> list[np.ndarray]:
    """Return token ids, int32 of shape ``(rows, tokens)``."""
    rng, shape = np.random.default_rng(2), (sizes.rows, sizes.tokens)
    return [rng.integers(0, sizes.vocabulary, shape, np.int32) for _ in range(BATCHES)]


@contextmanager
def saved(task: Task) -> Any:
    """Yield a directory that PEFT loads the adapters from, by transformers' names."""
    found = planned(task, scan=True)
    names = {f"layers.{name}": f"model.layers.{{}}.{MODULES[name]}" for name in MODULES}
    with tempfile.TemporaryDirectory() as scratch:
        yield save_pretrained(
            Path(scratch) / "adapter",
            found,
            adapters(task, found),
            task_type="CAUSAL_LM",
            names=names,
        )


def results(loss: Any, trees: Mapping[str, Mapping[tuple[str, str], Any]]) -> Arrays:
    """Return a step's results by name, each A and B of all layers as one array.

    Args:
        loss: of the step.
        trees: the adapters after it, and what else has their shapes, by what they are called;
            each by linear and part, such as ``("q", "a")``.
    """
    parts = {
        f"{part} of {name}, {kind}": value
        for kind, tree in trees.items()
        for (name, part), value in tree.items()
    }
    return as_arrays({"loss": loss, **parts})


def by_linear(tree: Mapping[str, Adapter]) -> dict[tuple[str, str], np.ndarray]:
    """Return what ``results`` wants of adapters, whether their layers are stacked or not."""
    found = dict[tuple[str, str], list[Any]]()
    for path in sorted(tree, key=_layer_of):
        for part in ("a", "b"):
            found.setdefault((path.split(".")[-1], part), []).append(getattr(tree[path], part))
    return {
        key: np.asarray(parts[0]) if parts[0].ndim == 3 else np.stack(list(map(np.asarray, parts)))
        for key, parts in found.items()
    }


def _layer_of(path: str) -> int:
    _, *layer, _ = path.split(".")
    return int(layer[0]) if layer else 0


def needed(task: Task, *, frozen: int, low_rank: int) -> Needed:
    """Return what the products cost: N weights in the linears and the head, 2 FLOPs a token each.

    Attention's own products are left out. The first layer's query, key and value need no gradient
    of their input, which is 0.2 % of SmolLM2's 4N; it is counted all the same.

    Args:
        task: the task.
        frozen: how often each weight is multiplied: forward 1, with the inputs' gradients 2, with
            its own 3.
        low_rank: how often A and B are: forward 1, with the gradients of input, A and B 3.
    """
    sizes, linears = task.sizes, decoder.linears(task.sizes).values()
    weights = sizes.layers * sum(i * o for i, o in linears) + sizes.width * sizes.vocabulary
    pairs = task.r * sizes.layers * sum(i + o for i, o in linears)
    tokens = sizes.rows * sizes.tokens
    flops = 2 * tokens * (frozen * weights + low_rank * pairs)
    return Needed(flops, weights * jnp.dtype(task.dtype).itemsize, task.dtype)
