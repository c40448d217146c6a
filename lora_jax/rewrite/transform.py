"""``lora``: from a function of parameters to the same function with adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..core import delta, paths, token_rows
from ..core.adapter import Adapter, Adapters, Full, Rows, check_fit
from ..core.alora import check_active, masked
from ..core.errors import AdapterError, raise_all
from . import signature
from .interpret import Record, interpret
from .origins import Alone
from .sites import formed
from .trace import Traced, trace
from .weight import LoraWeight, enter


def lora(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``fn'(params, adapters, *args)``: ``fn`` with ``W + s·A·B`` for every adapted W.

    No weight-sized sum is formed: each product ``x·W`` becomes ``x·W + s·(x·A)·B``, wherever
    in ``fn`` it stands. Adapters are an argument: differentiate with respect to them alone,
    exchange them without recompiling. Wrap the result in ``jax.jit``.

    ``fn'(..., dropout_key=key)`` drops inputs of the low-rank paths at each adapter's rate, with
    a key for each site and each step of a scan; without a key nothing is dropped.

    ``fn'(..., active=mask)`` is for adapters of a plan with ``alora_invocation_tokens``: they act
    where the boolean mask is True. Each product's input begins with the mask's axes, such as
    ``(batch, tokens)``, or with one axis for them all; inside ``vmap`` give what it maps.

    Its signature is ``(params, adapters, *args, dropout_key=None, active=None)``, with the names of
    ``fn`` for the arguments, so ``static_argnums`` and ``donate_argnames`` of ``jax.jit`` count and
    name what they mean. Where ``fn`` has a keyword of these two names, it is given to both.

    Args:
        fn: any JAX function whose first argument is a pytree of parameters.

    Raises:
        AdapterError: at the call, when an adapter fits no parameter or is never applied, or when
            a mask is missing or there is none to want it.
        PlanError: at the call, when a weight is used in a way that has no rule, or the mask does
            not fit the input of a product.

    Source: LoRA, arXiv 2106.09685, applied to the function's jaxpr.

    >>> import jax.numpy as jnp
    >>> def fn(params, x):
    ...     return jnp.tanh(x @ params["w"])
    >>> adapters = {"w": Adapter(jnp.ones((3, 1)), jnp.zeros((1, 2)), scale=2.0)}
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    >>> bool((lora(fn)(params, adapters, x) == fn(params, x)).all())
    True
    """
    taken = signature.names_of(fn)

    def adapted(*given: Any, **named: Any) -> Any:
        params, adapters, args, kwargs, keywords = signature.arguments(given, named, taken)
        dropout_key, active = keywords["dropout_key"], keywords["active"]
        if "active" in taken and not masked(adapters):
            active = None
        check_fit(params, adapters)
        check_active(adapters, active)
        traced = trace(fn, params, args, kwargs)
        record = Record(dropout_key=dropout_key, active=active)
        outs = apply(record, traced, traced.operands, adapters)
        reject_unused(record, adapters)
        return traced.rebuild(outs)

    return signature.with_signature(adapted, fn)


def apply(record: Record, traced: Traced, operands: Sequence[Any], adapters: Adapters) -> list[Any]:
    """Return the outputs of a traced function with these adapters in it.

    Raises:
        PlanError: a weight is used in a way that has no rule.
    """
    outs = run_adapted(record, traced, operands, adapters)
    record.raise_rejected()
    return outs


def run_adapted(
    record: Record, traced: Traced, operands: Sequence[Any], adapters: Adapters
) -> list[Any]:
    """Return what ``apply`` does, with every use that has no rule in the record, not raised."""
    values, parts = list(operands), _parts(adapters)
    for place, path in enumerate(traced.paths):
        whole, base = adapters.get(path), values[place]
        if isinstance(whole, Full):
            values[place] = whole.value
        elif isinstance(whole, Rows):
            values[place] = enter(path, base, token_rows.pair(base, whole))
        elif path in parts:
            values[place] = enter(path, base, delta.joined(parts[path], base.shape))
    record.alone = Alone(traced)
    outs = interpret(record, traced.closed, values)
    outs = [formed(record, out, (-1 - n,)) for n, out in enumerate(outs)]
    reject_outputs(record, outs)
    return outs


def reject_outputs(record: Record, outs: list[Any]) -> None:
    """Record every adapted weight that the function returns, where no product can meet it."""
    for n, out in enumerate(outs):
        if isinstance(out, LoraWeight):
            for path in out.paths:
                record.rejected.setdefault(path, {})[(-1 - n,)] = "the function returns it"


def reject_unused(record: Record, adapters: Adapters) -> None:
    """Raise one ``AdapterError`` with every low-rank pair, and all rows, that no product uses."""
    wanted = _parts(adapters).keys() | {n for n, one in adapters.items() if isinstance(one, Rows)}
    unused = sorted(wanted - record.sites.keys() - record.formed)
    raise_all(
        AdapterError,
        "these adapters are never applied by the function",
        (f"{path}: no product uses it" for path in unused),
    )


def _parts(adapters: Adapters) -> dict[str, list[Adapter]]:
    """Return the pairs of every parameter: one, or one for each range of its columns."""
    parts: dict[str, list[Adapter]] = {}
    for name, adapter in adapters.items():
        if isinstance(adapter, Adapter):
            parts.setdefault(paths.parameter_of(name), []).append(adapter)
    return parts
