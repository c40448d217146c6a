"""Activated LoRA: adapters that act only from the invocation tokens on.

Before those tokens the model is the base model, so that one cache of keys and values serves the
base and every such adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Inexact, Int

from .adapter import Adapter, Adapters
from .errors import AdapterError, ConfigError, raise_all


def alora_mask(
    input_ids: Int[Array | np.ndarray, "*batch tokens"], invocation_tokens: Sequence[int]
) -> Bool[Array, "*batch tokens"]:
    """Return where an aLoRA is active: from the last occurrence of the invocation tokens on.

    ``mask[t] = t >= max{u : ids[u:u+n] == invocation_tokens}``; no position of an example without
    the tokens. Padding behind the tokens counts as active, as in PEFT, and is masked elsewhere.

    PEFT looks for the tokens in the prompt alone: while tokens are generated, one at a time with a
    cache, the mask of each new one is ``alora_mask(prompt, tokens)[:, -1:]``.

    Args:
        input_ids: the examples' tokens.
        invocation_tokens: ``LoraConfig.alora_invocation_tokens``; static under ``jit``.

    Raises:
        ConfigError: there are no invocation tokens.

    Source: Activated LoRA, arXiv 2504.12397; PEFT 0.21.2.

    >>> ids = jnp.array([[5, 7, 8, 1, 7, 8, 2], [7, 1, 8, 7, 8, 0, 0], [8, 7, 1, 1, 1, 1, 7]])
    >>> alora_mask(ids, (7, 8)).astype(int).tolist()
    [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]]
    """
    if not invocation_tokens:
        raise ConfigError("invocation_tokens: got none, wanted at least one token id")
    input_ids = jnp.asarray(input_ids)
    tokens, starts = input_ids.shape[-1], input_ids.shape[-1] - len(invocation_tokens) + 1
    if starts < 1:
        return jnp.zeros(input_ids.shape, bool)
    found = jnp.ones((*input_ids.shape[:-1], starts), bool)
    for n, token in enumerate(invocation_tokens):
        found &= lax.slice_in_dim(input_ids, n, n + starts, axis=input_ids.ndim - 1) == token
    last = jnp.max(jnp.where(found, jnp.arange(starts), -1), axis=-1, keepdims=True)
    return (jnp.arange(tokens) >= last) & (last >= 0)


def silenced(
    x: Inexact[Array, "..."], active: Bool[Array, "..."], axes: Sequence[int]
) -> Inexact[Array, "..."]:
    """Return x with zeros where the mask is False.

    Args:
        x: the input of a product.
        active: the mask, ``(batch, tokens)``, or of any shape that x begins with.
        axes: the axes of x that the product keeps; the mask's come first among them, or one for
            all of them, as in ``(batch · tokens, features)``.

    Raises:
        ValueError: the mask does not fit, with both shapes.

    >>> x, mask = jnp.ones((2, 3, 1)), jnp.array([[True, False, True], [False, True, True]])
    >>> silenced(x, mask, [0, 1]).ravel().tolist()
    [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    >>> silenced(x.reshape(6, 1), mask, [0]).ravel().tolist()
    [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    """
    sizes = tuple(x.shape[axis] for axis in axes)
    if sizes[: active.ndim] == active.shape:
        along = axes[: active.ndim]
    elif sizes[:1] == (active.size,):
        active, along = active.ravel(), axes[:1]
    else:
        raise ValueError(f"active has the shape {active.shape}, the input's axes are {sizes}")
    return jnp.where(lax.broadcast_in_dim(active, x.shape, along), x, 0)


def check_active(adapters: Adapters, active: Any) -> None:
    """Raise unless a mask is given where, and only where, adapters want one.

    Raises:
        AdapterError: lists the adapters that want a mask; or there is a mask and none wants it,
            or it is not boolean.
    """
    wanting = masked(adapters)
    if active is None:
        raise_all(
            AdapterError,
            "these adapters act on a part of the tokens (alora_invocation_tokens): call with "
            "active=alora_mask(input_ids, tokens)",
            wanting,
        )
    elif not wanting:
        raise AdapterError(
            "active: got a mask, but no adapter is masked. Plan with alora_invocation_tokens, or "
            "leave active out"
        )
    elif jnp.result_type(active) != jnp.bool_:
        raise AdapterError(f"active: got {jnp.result_type(active)}, wanted bool")


def refuse_masked(adapters: Adapters, what: str) -> None:
    """Raise for adapters whose change is not one of the weight alone.

    Raises:
        AdapterError: lists every one that acts on a part of the tokens.
    """
    raise_all(
        AdapterError,
        f"these adapters act on a part of the tokens (alora_invocation_tokens), so {what}",
        masked(adapters),
    )


def masked(adapters: Adapters) -> list[str]:
    """Return the names of the adapters that act only where the mask says."""
    return [n for n, one in adapters.items() if isinstance(one, Adapter) and one.masked]
