"""A stack of two linears, the same in JAX and, with its adapters, in PEFT.

It has what an MLP has, ``relu(x·up)·down`` in every layer, and no more: what many adapters cost
beside the weights is measured on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import Adapter, LoraConfig, Plan, plan

from ..case import Arrays
from ..contestants.common import torch_ready
from . import decoder

Params = Mapping[str, Any]
Pairs = dict[str, Adapter]
TARGETS = ("up", "down")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a stack: ``width`` to ``hidden`` to ``width`` in each layer."""

    width: int
    hidden: int
    layers: int = 1

    @property
    def weights(self) -> int:
        """How many values one matrix has; there are two in a layer."""
        return self.width * self.hidden


def shapes(sizes: Sizes) -> Params:
    """Return the parameters' shapes, in float32."""
    d, h = sizes.width, sizes.hidden
    layer = {"up": (d, h), "down": (h, d)}
    return {
        "layers": [
            {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in each}
            for each in [layer.items()] * sizes.layers
        ]
    }


def draw(sizes: Sizes) -> Params:
    """Return random parameters."""
    return decoder.draw(shapes(sizes), seed=0)


def forward(params: Params, x: jax.Array) -> jax.Array:
    """Return the output, of x's shape."""
    for layer in params["layers"]:
        x = jax.nn.relu(x @ layer["up"]["kernel"]) @ layer["down"]["kernel"]
    return x


def planned(sizes: Sizes, r: int) -> Plan:
    """Return the plan that adapts every linear; the scale is 2."""
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS)
    x = jax.ShapeDtypeStruct((1, sizes.width), jnp.float32)
    return plan(forward, shapes(sizes), config, x)


def adapters(sizes: Sizes, r: int, seed: int = 1) -> Pairs:
    """Return random adapters; B is not zero."""
    return decoder.draw(planned(sizes, r).abstract(), seed)


def inputs(shape: Sequence[int], count: int) -> list[jax.Array]:
    """Return random inputs that differ."""
    rng = np.random.default_rng(2)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(count)]


def factors(stacked: Mapping[str, Any]) -> Arrays:
    """Return A and B of adapters by the names that all contestants give them."""
    return {
        f"{path}.{name}": np.asarray(getattr(pair, name), np.float64)
        for path, pair in stacked.items()
        for name in ("a", "b")
    }


def torch_weights(params: Params) -> list[dict[str, Any]]:
    """Return the weights as PyTorch has them, for any number of modules to share."""
    torch = torch_ready()
    return [
        {name: torch.tensor(np.asarray(one["kernel"]).T.copy()) for name, one in layer.items()}
        for layer in params["layers"]
    ]


def torch_module(weights: Sequence[Mapping[str, Any]]) -> Any:
    """Return the stack as a PyTorch module over these weights, not over copies of them."""
    torch = torch_ready()

    class Layer(torch.nn.Module):
        def __init__(self, tensors: Mapping[str, Any]) -> None:
            super().__init__()
            for name, tensor in tensors.items():
                linear = torch.nn.Linear(*tensor.shape[::-1], bias=False, device="meta")
                linear.weight = torch.nn.Parameter(tensor, requires_grad=False)
                setattr(self, name, linear)

        def forward(self, x: Any) -> Any:
            return self.down(torch.relu(self.up(x)))

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(map(Layer, weights))

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return x

    return Stack()


def peft_model(weights: Sequence[Mapping[str, Any]], pairs: Sequence[Pairs]) -> Any:
    """Return a PEFT model with these adapters, named by their numbers: ``"0"`` and so on.

    All pairs of an adapter have the same scale.
    """
    torch = torch_ready()
    import peft

    model: Any = None
    for n, one in enumerate(pairs):
        (r,) = {pair.a.shape[-1] for pair in one.values()}
        scale: Any = next(iter(one.values())).scale
        config = peft.LoraConfig(r=r, lora_alpha=scale * r, target_modules=list(TARGETS))
        if model is None:
            model = peft.get_peft_model(torch_module(weights), config, adapter_name=str(n))
        else:
            model.add_adapter(str(n), config)
        with torch.no_grad():
            for path, pair in one.items():
                factors_of = peft_factors(model, path, str(n))
                for factor, value in zip(factors_of, (pair.a, pair.b), strict=True):
                    factor.copy_(torch.tensor(np.asarray(value).T.copy()))
    return model


def peft_factors(model: Any, path: str, adapter: str) -> tuple[Any, Any]:
    """Return A and B of one adapter as PEFT has them, both transposed to ours."""
    module = model.base_model.model.get_submodule(path.removesuffix(".kernel"))
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight
