"""``wrap``: an NNX model, unmodified, with its adapters as ``LoRAParam`` beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .. import paths
from ..adapter import Adapters, Entry
from ..config import LoraConfig
from ..errors import AdapterError, raise_all
from ..rewrite import Plan, lora, plan
from .layers import LoRAParam
from .pure import pure


class _Held:
    """A plan as a static attribute: NNX hashes those, and a plan equals only itself."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan


class LoRAModel(nnx.Module):
    """What ``wrap`` returns: ``base``, and in ``lora`` a ``LoRAParam`` for each trained array."""

    def __init__(self, base: nnx.Module, found: Plan, values: Adapters, dropout: Any) -> None:
        self.base = base
        self.lora = nnx.Dict({k: LoRAParam(v) for k, v in paths.flatten(dict(values)).items()})
        self.structure = jax.tree.structure(dict(values))
        self.held = _Held(found)
        self.rngs = nnx.data(dropout)
        self.deterministic = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return ``base(*args, **kwargs)`` with ``W + s·A·B`` for every adapted W.

        What the call updates in ``base`` and in NNX objects among its arguments is updated
        there, but for ``nnx.Param`` of ``base``: those are frozen, and a value that the call
        assigns to one is lost. ``deterministic`` among the keywords switches ``lora_dropout``.
        """
        nodes, fn, params, others = pure(self.base, args, kwargs)
        off = kwargs.get("deterministic")
        off = self.deterministic if off is None else off
        key = None if off or self.rngs is None else self.rngs()
        out, state = lora(fn)(params, adapters(self), *others, dropout_key=key)
        nnx.update(nodes, state)
        return out

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set what ``nnx.view`` sets.

        Args:
            deterministic: switches ``lora_dropout`` off.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    @property
    def plan(self) -> Plan:
        """The plan, for ``save_pretrained`` and ``load_pretrained``."""
        return self.held.plan


def wrap(
    model: nnx.Module,
    config: LoraConfig,
    *args: Any,
    rngs: nnx.Rngs,
    lora_dtype: DTypeLike = jnp.float32,
    **kwargs: Any,
) -> LoRAModel:
    """Return a module that calls ``model`` with adapters, and holds them as ``LoRAParam``.

    ``model`` is neither copied nor changed: it is ``base`` of the new module, and paths are those
    of ``nnx.state(model, nnx.Param)``. A weight that two modules share has one pair.

    Args:
        model: any NNX model.
        config: what to adapt, and how; ``modules_to_save`` become ``LoRAParam`` as well.
        *args: example arguments of the model's call, arrays or ``jax.ShapeDtypeStruct``.
        rngs: draws A and, with ``lora_dropout``, gives the stream ``dropout``.
        lora_dtype: of A and B.
        **kwargs: example keyword arguments; give a call's own ``rngs`` by position.

    Raises:
        PlanError: as ``plan``.
        LoraError: the call adds or removes variables or changes what is no variable.

    >>> import optax
    >>> model, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3))
    >>> config = LoraConfig(r=2, target_modules="all-linear")
    >>> wrapped = wrap(model, config, x, rngs=nnx.Rngs(1))
    >>> bool((wrapped(x) == model(x)).all())
    True
    >>> optimizer = nnx.Optimizer(wrapped, optax.sgd(0.1), wrt=LoRAParam)
    >>> wrt = nnx.DiffState(0, LoRAParam)
    >>> gradient = nnx.grad(lambda model: model(x).sum(), argnums=wrt)(wrapped)
    >>> _ = optimizer.update(wrapped, gradient)
    >>> bool((wrapped(x) == model(x)).all())
    False
    """
    _, fn, params, others = pure(model, args, kwargs)
    found = plan(fn, params, config, *others)
    values = found.init(rngs.params(), lora_dtype)
    full, rows = (
        {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in held.items()}
        for held in (found.full, found.rows)
    )
    dropout = rngs["dropout"].fork() if config.lora_dropout else None
    return LoRAModel(model, replace(found, full=full, rows=rows), values, dropout)


def adapters(model: LoRAModel) -> dict[str, Entry]:
    """Return the adapters as ``{path: Entry}``, which ``merge`` takes.

    ``nnx.update(model.base, merge(nnx.state(model.base, nnx.Param), adapters(model)))`` merges
    them in place; ``save_pretrained(directory, model.plan, adapters(model))`` saves them.
    """
    tree = jax.tree.unflatten(model.structure, range(model.structure.num_leaves))
    return paths.replace(tree, {path: value[...] for path, value in model.lora.items()})


def put(model: LoRAModel, adapters: Adapters) -> None:
    """Set the model's adapters, such as those that ``load_pretrained`` returns.

    Raises:
        AdapterError: lists every array that the model lacks, has beyond these, or has in another
            shape; nothing is set then.
    """
    values = paths.flatten(dict(adapters))
    got = {path: tuple(value.shape) for path, value in values.items()}
    wanted = {path: tuple(value.shape) for path, value in model.lora.items()}
    problems = (
        f"{path}: got {got.get(path, 'none')}, wanted {wanted.get(path, 'none')}"
        for path in sorted(got.keys() | wanted.keys())
        if got.get(path) != wanted.get(path)
    )
    raise_all(AdapterError, "these adapters do not fit the model", problems)
    for path, value in values.items():
        model.lora[path].set_value(value)
    model.structure = jax.tree.structure(dict(adapters))
