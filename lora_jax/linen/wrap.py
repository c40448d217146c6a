"""``wrap``: a Linen module as the function of parameters that ``plan`` and ``lora`` take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from ..core.errors import LoraError

PARAMS = "params"


def wrap(module: nn.Module, method: Callable[..., Any] | str | None = None) -> Callable[..., Any]:
    """Return ``fn(params, *args, variables={}, rngs=None, mutable=False, **kwargs)``.

    It is ``module.apply({"params": params, **variables}, *args, ...)``, so that the paths of
    adapters begin inside ``"params"`` and no other collection can be adapted. With ``mutable``
    it returns ``(output, updated collections)`` as ``apply`` does.

    Args:
        module: any Linen module.
        method: the method to call, as in ``apply``; ``__call__`` by default.

    Returns:
        The function. ``params`` is a dict or a ``FrozenDict``; ``variables`` holds the other
        collections, such as ``{"batch_stats": ...}``; ``rngs`` and ``mutable`` are those of
        ``apply``, and so is everything else. ``jax.jit`` takes ``static_argnames="mutable"``
        when it is a name or a tuple of names.

    Raises:
        LoraError: at the call, when ``variables`` holds ``"params"``, too.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from lora_jax import LoraConfig, lora, merge, plan
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train):
    ...         x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
    ...         return nn.Dropout(0.5, deterministic=not train)(x)
    >>> x, config = jnp.ones((2, 3)), LoraConfig(r=1, target_modules="all-linear")
    >>> variables = Net().init(jax.random.key(0), x, train=False)
    >>> params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    >>> fn = wrap(Net())
    >>> found = plan(fn, params, config, x, variables=state, train=False)
    >>> [leaf.path for leaf in found.adapted]
    ['Dense_0.kernel']

    A training step gives the output and the new statistics, as ``Net().apply`` would:

    >>> adapters, rngs = found.init(jax.random.key(1)), {"dropout": jax.random.key(2)}
    >>> options = dict(train=True, rngs=rngs, mutable=["batch_stats"])
    >>> y, state = lora(fn)(params, adapters, x, variables=state, **options)
    >>> list(state["batch_stats"]["BatchNorm_0"])
    ['mean', 'var']

    So does one with the adapters merged:

    >>> fn(merge(params, adapters), x, variables=state, train=False).shape
    (2, 4)
    """

    def fn(
        params: Mapping[str, Any],
        *args: Any,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        others = dict(variables or {})
        if PARAMS in others:
            raise LoraError(
                f"variables: got the collection {PARAMS!r}, wanted the others alone; "
                "params are the first argument"
            )
        return module.apply({PARAMS: params, **others}, *args, method=method, **options)

    return fn
