"""``plan``: what LoRA will do to a model, decided and shown before anything runs."""

from __future__ import annotations

import difflib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from .. import config as configs
from .. import paths
from ..adapter import IN, OUT, STACKED, Adapter, Full, a_shape, b_shape, pick
from ..config import ALL_LINEAR, LoraConfig
from ..errors import ConfigError, PlanError, raise_all
from ..initializers import INITIALIZERS
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
        adapters: dict[str, Adapter | Full] = {
            leaf.path: _draw(self.config, leaf, key, dtype) for leaf in self.adapted
        }
        return adapters | {
            path: Full(jnp.array(value, copy=True)) for path, value in self.full.items()
        }

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
    targets = _targets(config, leaves, record)
    saved = _saved(config, leaves, targets)
    _check_targets(config, targets, leaves, record)
    rows = tuple(_decide(config, path, leaves, targets, saved, record) for path in leaves)
    _check_shapes(config, rows)
    return Plan(config, rows, {path: leaves[path] for path in leaves if path in saved})


def _survey(fn: Callable[..., Any], params: Any, args: Any, kwargs: Any) -> Record:
    """Find every site of every parameter that could be a matmul weight."""
    traced = trace(fn, params, args, kwargs)
    record = Record()

    def run(*operands: Any) -> list[Any]:
        values = list(operands)
        for place, path in enumerate(traced.paths):
            if _could_adapt(values[place]):
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


def _could_adapt(leaf: Any) -> bool:
    return leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _targets(config: LoraConfig, leaves: Mapping[str, Any], record: Record) -> set[str]:
    """Return the weights that the patterns name, biases and norms of their modules apart."""
    if config.target_modules is None:
        raise PlanError(
            "target_modules is not set. Name modules, give one regular expression, or use "
            f"{ALL_LINEAR!r}. This model has: {_some(map(paths.module_of, record.sites))}"
        )
    if config.target_modules == ALL_LINEAR:
        named = {
            path
            for path in record.sites
            if path not in record.rejected and not configs.is_output_head(paths.module_of(path))
        }
    else:
        named = {path for path in leaves if _named(config.target_modules, path)}
    excluded = {path for path in named if _named(config.exclude_modules, path)}
    saved = {path for path in named if configs.is_saved(config, paths.module_of(path))}
    return {path for path in named - excluded - saved if _could_adapt(leaves[path])}


def _named(names: Any, path: str) -> bool:
    module = paths.module_of(path)
    return configs.matches(names, module) or configs.matches(names, path.replace("/", "."))


def _saved(config: LoraConfig, leaves: Mapping[str, Any], targets: set[str]) -> set[str]:
    modules = {paths.module_of(path) for path in targets}

    def whole(path: str) -> bool:
        module = paths.module_of(path)
        if configs.is_saved(config, module):
            return jnp.issubdtype(leaves[path].dtype, jnp.inexact)
        if paths.leaf_name(path) not in paths.BIAS_NAMES:
            return False
        return config.bias == "all" or (config.bias == "lora_only" and module in modules)

    return {path for path in leaves if whole(path)}


def _check_targets(
    config: LoraConfig, targets: set[str], leaves: Mapping[str, Any], record: Record
) -> None:
    modules = {paths.module_of(path): None for path in leaves}
    raise_all(
        PlanError,
        "these patterns match no module",
        (
            f"{name}: got {pattern!r}, wanted a module such as {_close(pattern, modules)}"
            for name, pattern in _unmatched(config, targets, leaves)
        ),
    )
    problems = []
    for path in sorted(targets):
        problems += [f"{path}: {why}" for why in record.rejected.get(path, {}).values()]
        if path not in record.rejected and path not in record.sites:
            problems.append(f"{path}: the function never uses it")
    raise_all(
        PlanError,
        "these targets are used in a way that has no rule (leave them out with exclude_modules)",
        problems,
    )


def _unmatched(
    config: LoraConfig, targets: set[str], leaves: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield every field and pattern that has no effect."""
    names = config.target_modules
    for name in () if names == ALL_LINEAR or names is None else _each(names):
        if not any(_named(_alike(names, name), path) for path in targets):
            yield "target_modules", name
    for name in _each(config.exclude_modules):
        if not any(_named(_alike(config.exclude_modules, name), path) for path in leaves):
            yield "exclude_modules", name
    saved = config.modules_to_save or ()
    # PEFT lists every head name it knows, so one that fits is enough.
    if saved and not any(configs.is_saved(config, paths.module_of(path)) for path in leaves):
        yield "modules_to_save", ", ".join(saved)
    for field_name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field_name):
            modules = (paths.module_of(path) for path in targets)
            if not any(configs.hits(pattern, module) for module in modules):
                yield field_name, pattern


def _each(names: Any) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _alike(names: Any, name: str) -> Any:
    """Return one pattern in the form it was given: a regex alone, a name in a list."""
    return name if isinstance(names, str) else (name,)


def _close(pattern: str, modules: Mapping[str, None]) -> str:
    tails = {module.rpartition(".")[2]: module for module in modules}
    close = [tails[name] for name in difflib.get_close_matches(pattern, tails, n=3, cutoff=0.4)]
    return _some(close or modules)


def _some(names: Any, most: int = 6) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" … ({len(names)} in all)" if len(names) > most else "")


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
    if path in saved:
        return LeafPlan(path, shape, TRAINED, sites=len(sites))
    if path not in targets:
        return LeafPlan(path, shape, _reason(config, path, leaves[path], record), sites=len(sites))
    r, alpha = configs.rank_and_alpha(config, paths.module_of(path))
    first = next(iter(sites.values()))
    return LeafPlan(
        path,
        shape,
        "adapted",
        r,
        configs.scale(config, r, alpha),
        first.letters,
        len(sites),
        any(site.dense_gradient for site in sites.values()),
    )


def _reason(config: LoraConfig, path: str, leaf: Any, record: Record) -> str:
    if _named(config.exclude_modules, path):
        return "excluded"
    if not _could_adapt(leaf):
        return "not a matrix"
    if path in record.rejected:
        return "no rule: " + next(iter(record.rejected[path].values()))
    if path not in record.sites:
        return "never used"
    head = config.target_modules == ALL_LINEAR and configs.is_output_head(paths.module_of(path))
    return "output head" if head else "not targeted"


def _check_shapes(config: LoraConfig, rows: tuple[LeafPlan, ...]) -> None:
    problems = []
    if config.init_lora_weights not in INITIALIZERS:
        wanted = ", ".join(map(repr, INITIALIZERS))
        problems.append(f"init_lora_weights: got {config.init_lora_weights!r}, wanted {wanted}")
    if config.init_lora_weights == "orthogonal":
        odd = [row for row in rows if row.adapted and row.r % 2]
        problems += [f"{row.path}: r is {row.r}, 'orthogonal' wants an even r" for row in odd]
    raise_all(ConfigError, "this configuration cannot be applied", problems)


def _draw(config: LoraConfig, leaf: LeafPlan, key: Key[Array, ""], dtype: DTypeLike) -> Adapter:
    sizes = (math.prod(pick(leaf.shape, leaf.axes, letter)) for letter in (STACKED, IN, OUT))
    stacked, fan_in, fan_out = sizes
    key = jax.random.fold_in(key, zlib.crc32(leaf.path.encode()))
    a, b = INITIALIZERS[config.init_lora_weights](key, stacked, fan_in, leaf.r, fan_out)
    return Adapter(
        a.reshape(leaf.a_shape).astype(dtype),
        b.reshape(leaf.b_shape).astype(dtype),
        leaf.scale,
        leaf.axes,
    )
