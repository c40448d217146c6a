"""``plan``: what LoRA will do to a model, decided and shown before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from .. import config as configs
from .. import lowrank, paths
from ..adapter import IN, OUT, Adapter, Full, a_shape, b_shape, magnitude_shape, part_shape
from ..config import LoraConfig
from ..errors import ConfigError, raise_all
from ..initializers import draw, fold_in_path, for_lookup, init_problems, reads_more
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
        primitives: the primitives that use the weight, each once.
        window: the axes that slide over the input, as those of a convolution's kernel do.
        groups: how many groups of channels a convolution keeps apart.
        materialized: why ``W + s·A·B`` is formed; empty where it is not.
        columns: the range of the first ``o`` axis that is adapted; None for all of it.
        dora: whether DoRA's magnitude is trained beside A and B.
    """

    path: str
    shape: tuple[int, ...]
    why: str = ""
    r: int = 0
    scale: float | int = 0.0
    axes: str = ""
    sites: int = 0
    dense_gradient: bool = False
    primitives: tuple[str, ...] = ()
    window: frozenset[int] = frozenset()
    groups: int = 1
    materialized: str = ""
    columns: tuple[int, int] | None = None
    dora: bool = False

    @property
    def name(self) -> str:
        """The adapter's name: the path, and the range of columns if there is one."""
        return paths.part_name(self.path, self.columns)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of the part of the parameter that is adapted."""
        return part_shape(self.shape, self.axes, self.columns)

    @property
    def looked_up(self) -> bool:
        """Whether the weight's rows are looked up, as those of an embedding are."""
        return "gather" in self.primitives

    @property
    def adapted(self) -> bool:
        """Whether the parameter gets A and B."""
        return self.r > 0

    @property
    def a_shape(self) -> tuple[int, ...]:
        """The shape of A."""
        return a_shape(self.part_shape, self.axes, self.r)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """The shape of B."""
        return b_shape(self.part_shape, self.axes, self.r)

    @property
    def magnitude_shape(self) -> tuple[int, ...]:
        """The shape of DoRA's magnitude."""
        return magnitude_shape(self.shape, self.axes)

    def adapter(self, a: Any, b: Any, dropout: int | float = 0.0, magnitude: Any = None) -> Adapter:
        """Return the adapter that this A and B are, and with DoRA this magnitude."""
        formed = bool(self.materialized)
        return Adapter(a, b, self.scale, self.axes, dropout, formed, self.columns, magnitude)

    @property
    def trained(self) -> int:
        """How many values are trained for this parameter."""
        if self.adapted:
            magnitude = math.prod(self.magnitude_shape) if self.dora else 0
            return math.prod(self.a_shape) + math.prod(self.b_shape) + magnitude
        return math.prod(self.shape) if self.why == TRAINED else 0


TRAINED = "trained in full"


@dataclass(frozen=True)
class Plan:
    """What LoRA does to one model: a decision for every parameter. Printing it shows a table.

    Args:
        config: the configuration that was resolved.
        leaves: one decision for each parameter, in the order of the parameters.
        full: the parameters to train in full, by path, as they are in the model.
        normed: the parameters whose norms DoRA starts from, likewise.
    """

    config: LoraConfig
    leaves: tuple[LeafPlan, ...]
    full: Mapping[str, Any] = field(repr=False)
    normed: Mapping[str, Any] = field(default_factory=dict, repr=False)

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
        shapes = {leaf.path: leaf.shape for leaf in self.leaves}
        return sum(map(math.prod, shapes.values()))

    def init(
        self, key: Key[Array, ""], dtype: DTypeLike = jnp.float32
    ) -> dict[str, Adapter | Full]:
        """Return fresh adapters: ``ΔW = 0`` unless the configuration says otherwise.

        Each path draws from its own key, so another target changes nothing for this one.
        Leaves trained in full are copies of the parameters, in the parameters' dtype.

        Args:
            key: the random key.
            dtype: of A and B; float32 beside a base of any dtype, as in PEFT.

        Raises:
            ConfigError: the initialisation reads more than shapes, as ``"pissa"`` does.
        """
        if reads_more(self.config.init_lora_weights):
            raise ConfigError(
                f"init_lora_weights={self.config.init_lora_weights!r} reads the weights: use "
                "base, adapters = lora_jax.inits.initialise(plan, params, key), and that base"
            )
        adapters: dict[str, Adapter | Full] = {}
        for leaf in self.adapted:
            init, own = self.config.init_lora_weights, fold_in_path(key, leaf.name)
            init = for_lookup(init) if leaf.looked_up else init
            a, b = draw(own, init, leaf.part_shape, leaf.axes, leaf.r, dtype)
            adapter = leaf.adapter(a, b, self.config.lora_dropout)
            if leaf.dora:
                norm = lowrank.dora_norm(self.normed[leaf.path], adapter).astype(dtype)
                adapter = replace(adapter, magnitude=norm)
            adapters[leaf.name] = adapter
        copies = {path: Full(jnp.array(value, copy=True)) for path, value in self.full.items()}
        return adapters | copies

    def abstract(self, dtype: DTypeLike = jnp.float32) -> dict[str, Adapter | Full]:
        """Return the adapters' shapes and dtypes without drawing them."""

        def init(key: Any, full: Any, normed: Any) -> dict[str, Adapter | Full]:
            drawn = replace(self.config, init_lora_weights=True)
            return replace(self, config=drawn, full=full, normed=normed).init(key, dtype)

        return jax.eval_shape(init, jax.random.key(0), dict(self.full), dict(self.normed))

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
    select.reject_pairs(targets, record)
    saved = select.saved(config, leaves, targets)
    select.check(config, targets, leaves, record)
    rows = tuple(
        row for path in leaves for row in _decide(config, path, leaves, targets, saved, record)
    )
    adapted = tuple(row for row in rows if row.adapted)
    _check_slices(adapted)
    _check_inits(config, adapted)
    full = {path: leaves[path] for path in leaves if path in saved}
    normed = {row.path: leaves[row.path] for row in adapted if row.dora}
    return Plan(config, rows, full, normed)


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
        first, *others = sites.values()
        if odd := [one.letters for one in others if not _fit(first, one)]:
            problem = f"used with axes {first.letters!r} and with axes {odd[0]!r}"
            record.rejected.setdefault(path, {})[()] = problem
    return record


def _fit(one: Site, other: Site) -> bool:
    return same_use(one.letters, other.letters, one.window | other.window)


def _decide(
    config: LoraConfig,
    path: str,
    leaves: Mapping[str, Any],
    targets: set[str],
    saved: set[str],
    record: Record,
) -> list[LeafPlan]:
    shape, module = tuple(leaves[path].shape), paths.module_of(path)
    sites = list(record.sites.get(path, {}).values())
    # PEFT's A belongs to the vocabulary, whichever use of a tied embedding comes first.
    sites.sort(key=lambda site: site.primitive != "gather")
    seen = LeafPlan(
        path,
        shape,
        axes=sites[0].letters if sites else "",
        sites=len(sites),
        primitives=tuple(dict.fromkeys(site.primitive for site in sites)),
        window=frozenset().union(*(site.window for site in sites)),
        groups=max((site.groups for site in sites), default=1),
    )
    if path not in targets:
        why = TRAINED if path in saved else select.reason(config, path, leaves[path], record)
        return [replace(seen, why=why)]
    refused = record.rejected.get(path, {})
    r, alpha = configs.rank_and_alpha(config, module)
    whole = replace(
        seen,
        why="adapted",
        r=r,
        scale=configs.scale(config, r, alpha),
        # Used by no product, only as it is: any letters do, and these are a kernel's.
        axes=seen.axes or IN * (len(shape) - 1) + OUT,
        dense_gradient=any(site.dense_gradient for site in sites),
        materialized=next(iter(refused.values()), ""),
        dora=config.use_dora,
    )
    ranges = configs.slices(config, module) or (None,)
    return [replace(whole, columns=columns) for columns in ranges]


def _check_slices(rows: tuple[LeafPlan, ...]) -> None:
    raise_all(
        ConfigError,
        "these output_slices do not fit",
        (
            f"{row.path}: got columns {row.columns}, wanted a range within the first output axis "
            f"of {row.shape} {row.axes}"
            for row in rows
            if row.columns and (OUT not in row.axes or min(row.part_shape) < 1)
        ),
    )


def _check_inits(config: LoraConfig, rows: tuple[LeafPlan, ...]) -> None:
    init = config.init_lora_weights
    problems = {
        f"{row.path}: {problem}"
        for row in rows
        for problem in init_problems(init, row.r, drawn=False)
    }
    raise_all(ConfigError, "this configuration cannot be applied", sorted(problems))
