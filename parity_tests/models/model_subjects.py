"""Models as subjects of the laws: what a table row says, and how parameters are drawn."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Built = tuple[Callable[..., Any], Any, tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Model:
    """One model under the laws.

    Args:
        name: of the test.
        make: builds the function, its parameters in a dtype, and its other arguments.
        axes: what planning must read off each target, by the name that targets it.
        count: how many parameters the targets are.
        sites: how many uses the parameters of a target have, where it is not one.
        precision: a row of ``laws.BOUNDS``.
    """

    name: str
    make: Callable[[Any], Built]
    axes: Mapping[str, str]
    count: int
    sites: Mapping[str, int] = field(default_factory=dict)
    precision: str = "double"
    r: int = 2
    dense_gradient: bool = False
    materialized: bool = False
    vmaps: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def sites_of(self, name: str) -> int:
        return self.sites.get(name, 1)

    @functools.cache  # noqa: B019  (a table row lives as long as the tests)
    def build(self, dtype: Any) -> Built:
        # Users run these models with JAX's default promotion.
        with jax.numpy_dtype_promotion("standard"):
            fn, params, args = self.make(dtype)

        @functools.wraps(fn)
        def loosely(params: Any, *args: Any) -> Any:
            with jax.numpy_dtype_promotion("standard"):
                return fn(params, *args)

        return loosely, params, args


def drawn(tree: Any, dtype: Any, seed: int = 0) -> Any:
    """Return random values in the places of a tree's floating-point arrays, nothing left at zero.

    Matrices keep the size of what they multiply; vectors, which may be norms' scales, are near 1.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        values = rng.normal(size=leaf.shape)
        if len(leaf.shape) < 2:
            return jnp.asarray(1 + values / 8, dtype)
        fan_in = math.prod(leaf.shape) / max(leaf.shape[0], leaf.shape[-1])
        return jnp.asarray(values / math.sqrt(fan_in), dtype)

    return jax.tree.map(draw, tree)


def normal(*shape: int, dtype: Any, seed: int = 7) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def tokens(*shape: int, vocabulary: int, seed: int = 7) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(3, vocabulary, shape), jnp.int32)
