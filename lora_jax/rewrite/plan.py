"""``plan``: what LoRA will do to a model, decided and shown before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from .. import config as configs
from .. import paths
from ..adapter import Adapter, Full, a_shape, b_shape
from ..config import LoraConfig
from ..errors import ConfigError, raise_all
from ..initializers import draw, fold_in_path, init_problems
from . import select
from .interpret import Record, Site, interpret
from .table import render
from .trace import is_array, trace
from .transform import reject_outputs
from .weight import enter, same_use


@dataclass(frozen=True)
class LeafPlan:
    """The decision for one parameter.

    Args:
        path: where it is.
        shape: its shape.
        why: ``"adapted"``, ``"trained in full"``, or the reason why it stays frozen.
        r: the rank; 0 unless adapted.
        scale: the adapter's scale.
        axes: the adapter's ``axes``, read from the primitives that use the weight.
        sites: how many primitives use the weight.
        dense_gradient: an author's own derivative forms the full ``dW`` of this weight.
    """

    path: str
    shape: tuple[int, ...]
    why: str
    r: int = 0
    scale: float | int = 0.0
    axes: str = ""
    sites: int = 0
    dense_gradient: bool = False

    @property
    def adapted(self) -> bool:
        """Whether the parameter gets A and B."""
        return self.r > 0

    @property
    def a_shape(self) -> tuple[int, ...]:
        """The shape of A."""
        return a_shape(self.shape, self.axes, self.r)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """The shape of B."""
        return b_shape(self.shape, self.axes, self.r)

    @property
    def trained(self) -> int:
        """How many values are trained for this parameter."""
        if self.adapted:
            return math.prod(self.a_shape) + math.prod(self.b_shape)
        return math.prod(self.shape) if self.why == TRAINED else 0


TRAINED = "trained in full"


@dataclass(frozen=True)
class Plan:
    """What LoRA does to one model: a decision for every parameter. Printing it shows a table.

    Args:
        config: the configuration that was resolved.
        leaves: one decision for each parameter, in the order of the parameters.
        full: the parameters to train in full, by path, as they are in the model.
    """

    config: LoraConfig
    leaves: tuple[LeafPlan, ...]
    full: Mapping[str, Any] = field(repr=False)

    @property
    def adapted(self) -> tuple[LeafPlan, ...]:
        """The parameters that get A and B."""
        return tuple(leaf for leaf in self.leaves if leaf.adapted)

    @property
    def trainable(self) -> int:
        """The number of trained values."""
        return sum(leaf.trained for leaf in self.leaves)

    @property
    def base(self) -> int:
        """The number of values in the model's parameters."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves)

    def init(
        self, key: Key[Array, ""], dtype: DTypeLike = jnp.float32
    ) -> dict[str, Adapter | Full]:
        """Return fresh adapters: ``ΔW = 0`` unless the configuration says otherwise.

        Each path draws from its own key, so another target changes nothing for this one.
        Leaves trained in full are copies of the parameters, in the parameters' dtype.

        Args:
            key: the random key.
            dtype: of A and B; float32 beside a base of any dtype, as in PEFT.
        """
        adapters: dict[str, Adapter | Full] = {}
        for leaf in self.adapted:
            init, own = self.config.init_lora_weights, fold_in_path(key, leaf.path)
            a, b = draw(own, init, leaf.shape, leaf.axes, leaf.r, dtype)
            adapters[leaf.path] = Adapter(a, b, leaf.scale, leaf.axes, self.config.lora_dropout)
        copies = {path: Full(jnp.array(value, copy=True)) for path, value in self.full.items()}
        return adapters | copies

    def abstract(self, dtype: DTypeLike = jnp.float32) -> dict[str, Adapter | Full]:
        """Return the adapters' shapes and dtypes without drawing them."""
        return jax.eval_shape(lambda key: self.init(key, dtype), jax.random.key(0))

    def __str__(self) -> str:
        return render(self)


def plan(
    fn: Callable[..., Any], params: Any, config: LoraConfig, *args: Any, **kwargs: Any
) -> Plan:
    """Resolve ``config`` for ``fn(params, *args, **kwargs)`` by tracing it; nothing is computed.

    Args:
        fn: any JAX function whose first argument is a pytree of parameters.
        params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
        config: what to adapt, and how.
        *args: example arguments of ``fn``, arrays or ``jax.ShapeDtypeStruct``.
        **kwargs: example keyword arguments.

    Returns:
        The decision for every parameter. ``plan.init(key)`` makes the adapters for it.

    Raises:
        PlanError: lists every pattern that matches nothing and every target whose use has no
            rule, with path and primitive.
        ConfigError: the configuration cannot be applied to these shapes.

    >>> import jax.numpy as jnp
    >>> params = {"wq": jnp.ones((6, 4)), "wo": jnp.ones((4, 6))}
    >>> fn = lambda p, x: jnp.tanh(x @ p["wq"]) @ p["wo"]
    >>> found = plan(fn, params, LoraConfig(r=2, target_modules=["wq"]), jnp.ones((3, 6)))
    >>> found.adapted[0].path, found.adapted[0].axes, found.trainable
    ('wq', 'io', 20)
    """
    leaves = {path: leaf for path, leaf in paths.flatten(params).items() if is_array(leaf)}
    record = _survey(fn, params, args, kwargs)
    targets = select.targets(config, leaves, record)
    saved = select.saved(config, leaves, targets)
    select.check(config, targets, leaves, record)
    rows = tuple(_decide(config, path, leaves, targets, saved, record) for path in leaves)
    _check_inits(config, tuple(row for row in rows if row.adapted))
    return Plan(config, rows, {path: leaves[path] for path in leaves if path in saved})


def _survey(fn: Callable[..., Any], params: Any, args: Any, kwargs: Any) -> Record:
    """Find every site of every parameter that could be a matmul weight."""
    traced = trace(fn, params, args, kwargs)
    record = Record()

    def run(*operands: Any) -> list[Any]:
        values = list(operands)
        for place, path in enumerate(traced.paths):
            if select.could_adapt(values[place]):
                values[place] = enter(path, values[place])
        outs = interpret(record, traced.closed, values)
        reject_outputs(record, outs)
        return []

    with jax.disable_jit(False):
        jax.eval_shape(run, *traced.operands)
    for path, sites in record.sites.items():
        uses = [site.letters for site in sites.values()]
        if odd := [use for use in uses if not same_use(use, uses[0])]:
            problem = f"used with axes {uses[0]!r} and with axes {odd[0]!r}"
            record.rejected.setdefault(path, {})[0] = problem
    return record


def _decide(
    config: LoraConfig,
    path: str,
    leaves: Mapping[str, Any],
    targets: set[str],
    saved: set[str],
    record: Record,
) -> LeafPlan:
    shape = tuple(leaves[path].shape)
    sites: Mapping[int, Site] = record.sites.get(path, {})
    axes = next((site.letters for site in sites.values()), "")
    if path not in targets:
        why = TRAINED if path in saved else select.reason(config, path, leaves[path], record)
        return LeafPlan(path, shape, why, axes=axes, sites=len(sites))
    r, alpha = configs.rank_and_alpha(config, paths.module_of(path))
    return LeafPlan(
        path,
        shape,
        "adapted",
        r,
        configs.scale(config, r, alpha),
        axes,
        len(sites),
        any(site.dense_gradient for site in sites.values()),
    )


def _check_inits(config: LoraConfig, rows: tuple[LeafPlan, ...]) -> None:
    init = config.init_lora_weights
    problems = {f"{row.path}: {p}" for row in rows for p in init_problems(init, row.r)}
    raise_all(ConfigError, "this configuration cannot be applied", sorted(problems))
