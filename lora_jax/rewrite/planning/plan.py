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

from ...core import delta, paths
from ...core import sharding as placing
from ...core import token_rows as rows_of
from ...core.adapter import IN, OUT, Adapter, Entry, Full
from ...core.config import lora_config
from ...core.config.lora_config import LoraConfig
from ...core.errors import ConfigError, raise_all
from ...core.initializers import (
    changes_base,
    draw,
    draw_bias,
    fold_in_path,
    for_lookup,
    init_problems,
    kind_problem,
    reads_more,
)
from ..interpret import Record
from ..trace import is_array, trace
from . import left_out, select, survey, token_rows
from .given_params import Given
from .leaf_plan import TRAINED, LeafPlan
from .table import render, totals


@dataclass(frozen=True)
class Plan:
    """What LoRA does to one model: a decision for every parameter. Printing it shows a table.

    Args:
        config: the configuration that was resolved.
        leaves: one decision for each parameter, in the order of the parameters.
        full: the parameters to train in full, by path, as they are in the model.
        normed: the parameters whose norms DoRA starts from, likewise.
        rows: the parameters of which some rows are trained, likewise.
        of_changed_base: whether the parameters are those that an initialisation returned (see
            ``for_changed_base``).
        given: the parameters, for as long as somebody else keeps them.
        sharded: how the adapted parameters are sharded along explicit axes of a mesh.
    """

    config: LoraConfig
    leaves: tuple[LeafPlan, ...]
    full: Mapping[str, Any] = field(repr=False)
    normed: Mapping[str, Any] = field(default_factory=dict, repr=False)
    rows: Mapping[str, Any] = field(default_factory=dict, repr=False)
    of_changed_base: bool = False
    given: Given = field(default_factory=lambda: Given({}), repr=False, compare=False)
    sharded: Mapping[str, Any] = field(default_factory=dict, repr=False)

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

    def totals(self) -> str:
        """Return the last line of the table: what is trained of how much, and its size."""
        return totals(self.leaves, self.trainable, self.base)

    def init(
        self, key: Key[Array, ""], dtype: DTypeLike = jnp.float32, *, params: Any = None
    ) -> dict[str, Entry]:
        """Return fresh adapters: ``ΔW = 0`` unless the configuration says otherwise.

        Each path draws from its own key, so another target changes nothing for this one. Where the
        axes of a mesh are explicit, A and B are sharded as the weight is, along the axes that they
        share with it.
        Leaves trained in full are copies of the parameters, in the parameters' dtype.

        Args:
            key: the random key.
            dtype: of A, B and rows; float32 beside a base of any dtype, as in PEFT.
            params: the parameters, where the plan was made from shapes. DoRA's magnitudes, rows and
                leaves trained in full start from their values.

        Raises:
            ConfigError: the initialisation reads more than shapes, as ``"pissa"`` does; or lists
                what starts from values that were not given.

        >>> config = LoraConfig(r=1, target_modules=["w"], use_dora=True)
        >>> shapes, params = {"w": jax.ShapeDtypeStruct((1, 2), "float32")}, {"w": jnp.ones((1, 2))}
        >>> found = plan(lambda p, x: x @ p["w"], shapes, config, jnp.ones((3, 1)))
        >>> found.init(jax.random.key(0), params=params)["w"].magnitude.tolist()
        [1.0, 1.0]
        """
        own = self if params is None else self.with_params(params)
        return own._init(key, dtype)

    def _init(self, key: Key[Array, ""], dtype: DTypeLike) -> dict[str, Entry]:
        if reads_more(self.config.init_lora_weights):
            raise ConfigError(
                f"init_lora_weights={self.config.init_lora_weights!r} reads the weights: use "
                "base, adapters = lora_jax.initialise(plan, params, key), and that base"
            )
        self._reject_shapes()
        adapters: dict[str, Entry] = {}
        for leaf in self.adapted:
            init, own = self.config.init_lora_weights, fold_in_path(key, leaf.name)
            init = for_lookup(init) if leaf.looked_up else init
            a, b = draw(own, init, leaf.part_shape, leaf.axes, leaf.r, dtype)
            adapter = leaf.adapter(a, b, self.config.lora_dropout)
            if leaf.biased:
                bias = draw_bias(own, init, leaf.bias_shape, leaf.r, dtype)
                adapter = replace(adapter, bias=bias)
            if leaf.dora:
                norm = delta.dora_norm(self.normed[leaf.path], adapter).astype(dtype)
                adapter = replace(adapter, magnitude=norm)
            adapters[leaf.name] = self.placed(leaf, adapter)
        return adapters | self.copies(dtype)

    def placed(self, leaf: LeafPlan, adapter: Adapter) -> Adapter:
        """Return an adapter sharded as its weight is, where the axes of a mesh are explicit."""
        sharding = self.sharded.get(leaf.path)
        return adapter if sharding is None else placing.like_weight(adapter, sharding)

    def copies(self, dtype: DTypeLike = jnp.float32) -> dict[str, Entry]:
        """Return what is trained as it is, leaves and rows, as it is in the model.

        Args:
            dtype: of the rows; leaves keep the parameter's.

        Raises:
            ConfigError: lists them where the plan was made from shapes.
        """
        self._reject_shapes()
        leaves: dict[str, Entry] = {
            path: Full(jnp.array(value, copy=True)) for path, value in self.full.items()
        }
        return leaves | {
            leaf.path: rows_of.start(
                self.rows[leaf.path], leaf.rows, dtype, leaf.axes, leaf.row_axis
            )
            for leaf in self.leaves
            if leaf.rows
        }

    def with_params(self, params: Any) -> Plan:
        """Return the plan with these parameters where it had others, or their shapes.

        Raises:
            ConfigError: lists those that are missing or of another shape.
        """
        leaves, problems = paths.flatten(params), []
        values: dict[str, dict[str, Any]] = {}
        for name in ("full", "normed", "rows"):
            planned = getattr(self, name)
            values[name] = {path: leaves.get(path) for path in planned}
            for path, old in planned.items():
                got = tuple(leaves[path].shape) if path in leaves else None
                if got != tuple(old.shape):
                    problems.append(f"{path}: got {got}, not {tuple(old.shape)}")
        raise_all(ConfigError, "these parameters are not the plan's", sorted({*problems}))
        return replace(self, **values)

    def _reject_shapes(self) -> None:
        why = {"full": "trained in full", "normed": "its norms are DoRA's", "rows": "rows of it"}
        raise_all(
            ConfigError,
            "the plan was made from shapes, and these start from values: give init params=params",
            (
                f"{path}: {said}"
                for name, said in why.items()
                for path, value in getattr(self, name).items()
                if isinstance(value, jax.ShapeDtypeStruct)
            ),
        )

    def abstract(self, dtype: DTypeLike = jnp.float32) -> dict[str, Entry]:
        """Return the adapters' shapes and dtypes without drawing them."""

        def init(key: Any, **values: Any) -> dict[str, Entry]:
            drawn = replace(self.config, init_lora_weights=True)
            return replace(self, config=drawn, **values).init(key, dtype)

        values = dict(full=dict(self.full), normed=dict(self.normed), rows=dict(self.rows))
        return jax.eval_shape(init, jax.random.key(0), **values)

    def __str__(self) -> str:
        return render(self.leaves, self.totals())


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
    select.refuse_hanging(config, leaves)
    traced = trace(fn, params, args, kwargs)
    record = survey.survey(traced)
    if isinstance(config.target_modules, str) or any(
        map(left_out.is_whole_numbers, leaves.values())
    ):
        record.left_out.update(left_out.weights(traced, record))
    targets = select.targets(config, leaves, record)
    if config.target_modules == lora_config.ALL_LINEAR:
        targets -= left_out.no_weights(traced, record) - select.bare(config, leaves)
    select.reject_pairs(targets, record)
    select.reject_shared(config, leaves, record)
    if config.lora_bias:
        select.reject_biases(targets, record)
    owners = select.owners(targets)
    known = targets & record.sites.keys() - record.rejected.keys()
    drafts = [
        _decide(config, path, leaves, targets, set(), record, owners.get(path, ""))
        for path in sorted(known)
    ]
    survey.rehearse(traced, sum(drafts, []), record)
    saved = select.saved(config, leaves, targets)
    select.check(config, targets, leaves, record)
    trained = token_rows.rows(config, leaves, targets, saved, record)
    token_rows.check_tied(config, saved, record)
    rows = tuple(
        replace(row, why=token_rows.why(trained[path]), rows=trained[path])
        if path in trained
        else row
        for path in leaves
        for row in _decide(config, path, leaves, targets, saved, record, owners.get(path, ""))
    )
    adapted = tuple(row for row in rows if row.adapted)
    if config.target_modules == lora_config.ALL_LINEAR and not adapted:
        left_out.reject_nothing({row.path: row.why for row in rows if len(row.shape) > 1})
    left_out.warn(select.left_out(config, leaves, record))
    _check_slices(adapted)
    _check_inits(config, adapted)
    full = {path: leaves[path] for path in leaves if path in saved}
    normed = {row.path: leaves[row.path] for row in adapted if row.dora}
    by_rows = {path: leaves[path] for path in trained}
    sharded = {row.path: placing.sharding_of(leaves[row.path]) for row in adapted}
    sharded = {path: sharding for path, sharding in sharded.items() if sharding is not None}
    return Plan(config, rows, full, normed, by_rows, given=Given(leaves), sharded=sharded)


def _survey(fn: Callable[..., Any], params: Any, args: Any, kwargs: Any) -> Record:
    """Find every site of every parameter that could be a matmul weight."""
    return survey.survey(trace(fn, params, args, kwargs))


def _decide(
    config: LoraConfig,
    path: str,
    leaves: Mapping[str, Any],
    targets: set[str],
    saved: set[str],
    record: Record,
    owner: str,
) -> list[LeafPlan]:
    shape, module = tuple(leaves[path].shape), owner or paths.module_of(path)
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
    # Used by no product, only as it is: any letters do, and these are a kernel's.
    letters = seen.axes or IN * (len(shape) - 1) + OUT
    if lora_config.parameter_name(config, path) is not None:
        letters = select.stacked_letters(letters)
    r, alpha = lora_config.rank_and_alpha(
        config, owner or lora_config.name_in_patterns(config, path)
    )
    whole = replace(
        seen,
        why="adapted",
        r=r,
        scale=lora_config.scale(config, r, alpha),
        axes=letters,
        dense_gradient=any(site.dense_gradient for site in sites),
        materialized=next(iter(refused.values()), ""),
        dora=config.use_dora,
        biased=config.lora_bias,
        masked=bool(config.alora_invocation_tokens),
        owner=owner,
    )
    ranges = lora_config.slices(config, module) or (None,)
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
        for problem in (
            *init_problems(init, row.r, drawn=False),
            kind_problem(init, row.looked_up, bool(row.window)),
        )
        if problem
    }
    if config.alora_invocation_tokens and changes_base(init):
        problems.add(
            f"init_lora_weights: {init!r} takes A·B out of the base, which it changes for every "
            "token; beside alora_invocation_tokens use one that leaves the base as it is"
        )
    raise_all(ConfigError, "this configuration cannot be applied", sorted(problems))
