"""``wrap``: any NNX model as a ``LoRAModel``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ..core.config.lora_config import LoraConfig
from ..core.errors import LoraError
from ..rewrite import plan
from .entry import CALL, Method, with_rngs
from .model import LoRAModel
from .pure import pure


def wrap(
    model: nnx.Module,
    config: LoraConfig,
    *args: Any,
    rngs: nnx.Rngs,
    lora_dtype: DTypeLike = jnp.float32,
    method: Method = CALL,
    call_kwargs: Mapping[str, Any] = MappingProxyType({}),
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
        method: what is called in the place of ``model(…)``, by its name or as the class has it;
            ``wrapped.apply(name, …)`` calls any other with the same adapters.
        call_kwargs: example keyword arguments whose names are those above, such as a call's own
            ``rngs`` (which is a copy of these if it must be given and is not).
        **kwargs: other example keyword arguments.

    Raises:
        PlanError: as ``plan``.
        LoraError: the model has no such method, or ``rngs`` no stream that is needed.

    >>> import optax
    >>> model, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3))
    >>> config = LoraConfig(r=2, target_modules="all-linear")
    >>> wrapped = wrap(model, config, x, rngs=nnx.Rngs(1))
    >>> bool((wrapped(x) == model(x)).all())
    True
    >>> optimizer = nnx.Optimizer(wrapped, optax.sgd(0.1), wrt=nnx.LoRAParam)
    >>> wrt = nnx.DiffState(0, nnx.LoRAParam)
    >>> gradient = nnx.grad(lambda model: model(x).sum(), argnums=wrt)(wrapped)
    >>> _ = optimizer.update(wrapped, gradient)
    >>> bool((wrapped(x) == model(x)).all())
    False
    """
    given = with_rngs(model, method, args, {**kwargs, **call_kwargs}, rngs)
    call = pure(model, method, args, given)
    found = plan(call.fn, call.params, config, *call.others)
    values = found.init(_stream(rngs, "params")(), lora_dtype)
    full, rows = (
        {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in held.items()}
        for held in (found.full, found.rows)
    )
    dropout = _stream(rngs, "dropout").fork() if config.lora_dropout else None
    return LoRAModel(model, replace(found, full=full, rows=rows), values, dropout, method)


def _stream(rngs: nnx.Rngs, name: str) -> nnx.RngStream:
    try:
        return rngs[name]
    except (AttributeError, KeyError) as error:
        streams = ", ".join(rngs) or "none"
        raise LoraError(
            f"rngs: got the streams {streams}, wanted {name!r} or one for all, nnx.Rngs(0); what "
            'the model\'s own call needs goes into call_kwargs={"rngs": …}'
        ) from error
