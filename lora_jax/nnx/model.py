"""``LoRAModel``: an NNX model, unmodified, with its adapters as ``LoRAParam`` beside it."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from ..core import paths
from ..core.adapter import Adapters, Entry
from ..core.errors import AdapterError, raise_all
from ..rewrite import Plan, lora
from .entry import CALL, Method
from .params import LoRAParam
from .pure import pure


class _Held:
    """A plan as a static attribute: NNX hashes those, and a plan equals only itself."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan


class LoRAModel(nnx.Module):
    """What ``wrap`` returns: ``base``, and in ``lora`` a ``LoRAParam`` for each trained array."""

    def __init__(
        self,
        base: nnx.Module,
        found: Plan,
        values: Adapters,
        dropout: Any,
        method: Method = CALL,
    ) -> None:
        self.base = base
        self.lora = nnx.Dict({k: LoRAParam(v) for k, v in paths.flatten(dict(values)).items()})
        self.structure = jax.tree.structure(dict(values))
        self.held = _Held(found)
        self.rngs = nnx.data(dropout)
        self.deterministic = False
        self.entry = method

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Return ``base(*args, **kwargs)`` with ``W + s·A·B`` for every adapted W.

        Where ``wrap`` was given a ``method``, that one is called. What the call updates in
        ``base`` and in NNX objects among its arguments is updated there, variables that it creates
        and numbers that it counts included, but for ``nnx.Param`` of ``base``: those are frozen,
        and a value that the call assigns to one is lost. What it does not update is left alone, so
        that any transform may close over a model in evaluation mode. ``deterministic`` among the
        keywords switches ``lora_dropout``.
        """
        return self.apply(self.entry, *args, **kwargs)

    def apply(self, method: Method, /, *args: Any, **kwargs: Any) -> Any:
        """Return what another method of ``base`` does, with the same adapters.

        Args:
            method: its name, or the function that the class of ``base`` has.
            *args: as ``base`` takes them.
            **kwargs: likewise.
        """
        call = pure(self.base, method, args, kwargs)
        off = kwargs.get("deterministic")
        off = self.deterministic if off is None else off
        key = None if off or self.rngs is None else self.rngs()
        out, values = lora(call.fn)(call.params, adapters(self), *call.others, dropout_key=key)
        call.update(values)
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


def adapters(model: LoRAModel) -> dict[str, Entry]:
    """Return the adapters as ``{path: Entry}``, which ``merge`` takes.

    ``nnx.update(model.base, merge(nnx.state(model.base, nnx.Param), adapters(model)))`` merges
    them in place; ``save_pretrained(directory, model.plan, adapters(model))`` saves them.
    """
    tree = jax.tree.unflatten(model.structure, range(model.structure.num_leaves))
    return paths.replace(tree, {path: value[...] for path, value in _variables(model).items()})


def put(model: LoRAModel, adapters: Adapters) -> None:
    """Set the model's adapters, such as those that ``load_pretrained`` returns.

    Raises:
        AdapterError: lists every array that the model lacks, has beyond these, or has in another
            shape; nothing is set then.
    """
    values, variables = paths.flatten(dict(adapters)), _variables(model)
    got = {path: tuple(value.shape) for path, value in values.items()}
    wanted = {path: tuple(value.shape) for path, value in variables.items()}
    problems = (
        f"{path}: got {got.get(path, 'none')}, wanted {wanted.get(path, 'none')}"
        for path in sorted(got.keys() | wanted.keys())
        if got.get(path) != wanted.get(path)
    )
    raise_all(AdapterError, "these adapters do not fit the model", problems)
    for path, value in values.items():
        variables[path].set_value(value)
    model.structure = jax.tree.structure(dict(adapters))


def _variables(model: LoRAModel) -> dict[str, LoRAParam]:
    """Return the trained arrays alone: ``nnx.capture`` puts what it gathers beside them."""
    return {path: one for path, one in model.lora.items() if isinstance(one, LoRAParam)}
