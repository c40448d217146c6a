"""JAX's side of the whole models: transformers' own, read by ``from_torch``, under the rewriter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import Full, LoraConfig, lora, plan
from ...peft.tensors import encode
from ...torch.from_torch import from_torch
from ..sides import jax_side
from ..sides.wide_torch import widened
from ..tensors import Tensors
from .torch_models import DEEP_LLAMA, MODELS, Model


@dataclass(frozen=True)
class Given:
    """A model read through the front end, with its plan."""

    model: Model
    fn: Callable[..., Any]
    params: Any
    plan: Any
    step: Callable[..., Any]

    def adapters(self, seed: int) -> dict[str, Any]:
        """Return adapters whose B is away from zero."""
        rng = np.random.default_rng(seed)

        def normal(leaf: Any) -> Any:
            return jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype)

        return {
            path: Full(normal(one.value))
            if isinstance(one, Full)
            else replace(one, b=normal(one.b))
            for path, one in self.plan.init(jax.random.key(seed)).items()
        }

    def run(self, adapters: Mapping[str, Any]) -> Tensors:
        """Return loss, logits and gradients by the names and in the layout of PEFT's file."""
        (loss, logits), gradients = self.step(adapters, self.params)
        return arrays({"loss": loss, "logits": logits} | encode(self.plan, gradients))

    def wide(self, adapters: Mapping[str, Any]) -> tuple[Tensors, list[str]]:
        """Return what ``run`` does in float64, and the operations that are narrower even so."""
        with ExitStack() as stack:
            stack.enter_context(jax.enable_x64(True))
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
            fn, params = from_torch(widened(self.model.make()))
            batch = {name: _double(value) for name, value in self.model.batch.items()}
            pairs = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), adapters)
            (loss, logits), gradients = jax.jit(_step(fn, batch))(pairs, params)
            found = arrays({"loss": loss, "logits": logits} | encode(self.plan, gradients))

        def outputs(pairs: Any, params: Any) -> Any:
            return lora(fn)(params, pairs, **batch)["logits"]

        return found, jax_side.islands(outputs, {"pairs": pairs, "params": params})


@functools.cache
def given(name: str) -> Given:
    """Return a model of the table, or ``"llama of 8 layers"``, with LoRA of rank 3 and alpha 4."""
    model = DEEP_LLAMA if name == "llama of 8 layers" else MODELS[name]
    fn, params = from_torch(model.make())
    config = LoraConfig(
        r=3, lora_alpha=4, target_modules=model.targets, modules_to_save=model.saved
    )
    found = plan(fn, params, config, **model.batch)
    return Given(model, fn, params, found, jax.jit(_step(fn, model.batch)))


def _step(fn: Callable[..., Any], batch: Mapping[str, Any]) -> Callable[..., Any]:
    def loss(adapters: Any, params: Any) -> Any:
        out = lora(fn)(params, adapters, **batch)
        return out["loss"], out["logits"]

    return jax.value_and_grad(loss, has_aux=True)


def arrays(tree: Mapping[str, Any]) -> Tensors:
    """Return a mapping of arrays as numpy."""
    return {name: np.asarray(value) for name, value in tree.items()}


def _double(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float64) if value.dtype == np.float32 else value
