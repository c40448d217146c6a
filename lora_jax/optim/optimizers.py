"""Optimizers made for A and B, as optax transformations of trees of adapters.

Each knows A from B by its field, so none needs a mask or a naming rule. They read axes, rank
and scale from every adapter: stacked layers, split heads and mixed ranks need nothing more.
What rank-stabilised LoRA (arXiv 2312.03732) changes is the scale: ``LoraConfig(use_rslora=True)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float

from ..core import paths
from ..core.adapter import STACKED, Adapter, is_number, rank
from ..core.errors import AdapterError, raise_all
from ..core.lowrank import accumulation_dtype
from .adam import Number, Rate, adamw, adamw_decayed_last
from .adapter_entries import entries, labelled, map_pairs

Recipe = Callable[[Rate, Number], optax.GradientTransformation]

# PEFT's: it keeps AᵀA invertible and moves nothing else.
_FA_DAMPING = 1e-8

# Leaves of an adapter that no optimizer may move: a scale that is an array.
_FIXED = ("scale",)


def loraplus(
    learning_rate: Rate,
    *,
    ratio: Number,
    optimizer: Recipe = adamw,
    weight_decay: Number = 0.0,
    embedding_learning_rate: Rate = 1e-6,
    embeddings: Collection[str] = (),
) -> optax.GradientTransformation:
    """Train B ``ratio`` times faster than A: ``η_B = ratio · η_A``.

    The groups are PEFT's: A, and leaves trained in full, at ``learning_rate``; B, DoRA's
    magnitude, biases and other vectors at ``ratio`` times that; embeddings at their own. Biases
    and the scales of norms do not decay. (PEFT decays the scale of an RMS norm, too.)

    Args:
        learning_rate: of A; a number or an optax schedule.
        ratio: of B's learning rate to A's.
        optimizer: makes the optimizer of one group from its learning rate and weight decay.
        weight_decay: of the groups that decay.
        embedding_learning_rate: of A and B of ``embeddings``.
        embeddings: the names of adapters whose weight's rows are looked up:
            ``[leaf.name for leaf in plan.adapted if leaf.looked_up]``.

    Raises:
        AdapterError: from ``init``, lists the ``embeddings`` that are no adapters.

    Source: LoRA+, arXiv 2402.12354; PEFT 0.21.2 ``create_loraplus_optimizer``.

    >>> adapters = {"w": Adapter(jnp.ones((3, 2)), jnp.ones((2, 4)), scale=1.0)}
    >>> sgd = loraplus(0.5, ratio=4, optimizer=lambda rate, decay: optax.sgd(rate))
    >>> updates, _ = sgd.update(adapters, sgd.init(adapters), adapters)
    >>> float(updates["w"].a[0, 0]), float(updates["w"].b[0, 0])
    (-0.5, -2.0)
    """

    def labels(adapters: Any) -> Any:
        known = {name for name, entry in entries(adapters) if isinstance(entry, Adapter)}
        unknown = [f"{name}: no such adapter" for name in embeddings if name not in known]
        raise_all(AdapterError, "these embeddings are not in the tree", unknown)
        return labelled(adapters, lambda *leaf: _group(embeddings, *leaf))

    fast = _times(learning_rate, ratio)
    groups: dict[Hashable, optax.GradientTransformation] = {
        "a": optimizer(learning_rate, weight_decay),
        "embedding": optimizer(embedding_learning_rate, weight_decay),
        "b": optimizer(fast, weight_decay),
        "vector": optimizer(fast, 0.0),
        "fixed": optax.set_to_zero(),
    }
    return optax.partition(groups, labels)


def lora_fa(
    learning_rate: Rate = 1e-3,
    *,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    correct_bias: bool = True,
) -> optax.GradientTransformation:
    """Train B alone, by AdamW on ``g_B ← (AᵀA + 1e-8·I)⁻¹ g_B / s²``; A stays as it is.

    That gradient changes the weight by what is nearest to full fine-tuning's step among all
    changes with this A. AdamW is the one of PEFT: ``eps`` is added to the root of the raw
    second moment, and the decay follows the step. No moments are kept for A. Leaves trained
    in full get the same AdamW.

    PEFT forms the product in bfloat16 where the machine can; here it has float32 or more.

    Args:
        learning_rate: a number or an optax schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        correct_bias: whether the moments are corrected for their start at zero.

    Raises:
        AdapterError: from ``init``, lists adapters whose A is zero, as an embedding's is at
            the start: they would never move (PEFT lets them pass); and those without a scale.

    Source: LoRA-FA, arXiv 2308.03303; PEFT 0.21.2 ``LoraFAOptimizer``.

    >>> adapters = {"w": Adapter(jnp.eye(3, 2), jnp.ones((2, 4)), scale=2.0)}
    >>> fa = lora_fa(0.1)
    >>> updates, _ = fa.update(adapters, fa.init(adapters), adapters)
    >>> float(abs(updates["w"].a).max()), round(float(updates["w"].b[0, 0]), 4)
    (0.0, -0.1)
    """

    def check(params: Any) -> optax.EmptyState:
        problems = [p for name, entry in entries(params) for p in _stuck(name, entry)]
        raise_all(AdapterError, "LoRA-FA cannot train these adapters", problems)
        return optax.EmptyState()

    def project(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return map_pairs(_projected, updates, params), state

    adam = adamw_decayed_last(learning_rate, b1, b2, eps, weight_decay, correct_bias)
    return optax.chain(optax.GradientTransformation(check, project), freeze(adam, "a"))


def riemannian(
    inner: optax.GradientTransformation, *, reg: Number = 1e-2, embeddings: Collection[str] = ()
) -> optax.GradientTransformation:
    """Give ``inner`` the gradients ``g_A(BBᵀ + reg·I)⁻¹`` and ``(AᵀA + reg·I)⁻¹g_B``.

    So a step moves ``A·B`` alike however the product is split between A and B. The scale does
    not enter. Leaves trained in full keep their gradients.

    Args:
        inner: any optax optimizer. Put ``loraplus`` inside, not around: each of its groups
            sees A or B alone.
        reg: added to the diagonals, at least 0.
        embeddings: the names of adapters that keep their gradients, as PEFT's embeddings do.

    Raises:
        AdapterError: from ``update``, no params were given, or they hold A or B alone.

    Source: Riemannian preconditioned LoRA, arXiv 2402.02347; PEFT 0.21.2
        ``create_riemannian_optimizer``.

    >>> adapters = {"w": Adapter(jnp.eye(3, 2), 2 * jnp.eye(2, 4), scale=1.0)}
    >>> scaled = riemannian(optax.sgd(1.0), reg=1.0)
    >>> updates, _ = scaled.update(adapters, scaled.init(adapters), adapters)
    >>> round(float(updates["w"].a[0, 0]), 6), float(updates["w"].b[0, 0])
    (-0.2, -1.0)
    """

    def precondition(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(path: str, gradient: Adapter, adapter: Adapter) -> Adapter:
            return gradient if path in embeddings else _preconditioned(gradient, adapter, reg)

        return map_pairs(one, updates, params), state

    first = optax.GradientTransformation(lambda params: optax.EmptyState(), precondition)
    return optax.chain(first, inner)


def freeze(inner: optax.GradientTransformation, *parts: str) -> optax.GradientTransformation:
    """Train all but these parts of every adapter: ``"a"``, ``"b"``. Their updates are zero.

    ``inner`` does not see them: it keeps no moments for them and they do not decay. LoRA-FA
    freezes A, MiCA freezes B.

    >>> adapters = {"w": Adapter(jnp.ones((3, 2)), jnp.ones((2, 4)), scale=1.0)}
    >>> only_a = freeze(optax.sgd(1.0), "b")
    >>> updates, _ = only_a.update(adapters, only_a.init(adapters), adapters)
    >>> float(updates["w"].a[0, 0]), float(updates["w"].b[0, 0])
    (-1.0, 0.0)
    """

    def labels(adapters: Any) -> Any:
        return labelled(
            adapters, lambda _, field, __: "frozen" if field in (*parts, *_FIXED) else "trained"
        )

    groups: dict[Hashable, optax.GradientTransformation] = {
        "trained": inner,
        "frozen": optax.set_to_zero(),
    }
    return optax.partition(groups, labels)


def _projected(_: str, gradient: Adapter, adapter: Adapter) -> Adapter:
    a, g = _down(adapter.a, adapter), _up(gradient.b, adapter)
    whole = _damped_inverse(a.swapaxes(1, 2) @ a, _FA_DAMPING) @ g
    return replace(gradient, b=_like(whole / jnp.asarray(adapter.scale, g.dtype) ** 2, gradient.b))


def _preconditioned(gradient: Adapter, adapter: Adapter, reg: Number) -> Adapter:
    a, b = _down(adapter.a, adapter), _up(adapter.b, adapter)
    g_a = _down(gradient.a, adapter) @ _damped_inverse(b @ b.swapaxes(1, 2), reg)
    g_b = _damped_inverse(a.swapaxes(1, 2) @ a, reg) @ _up(gradient.b, adapter)
    return replace(gradient, a=_like(g_a, gradient.a), b=_like(g_b, gradient.b))


def _damped_inverse(gram: Float[Array, "s r r"], damping: Number) -> Float[Array, "s r r"]:
    """Return ``(G + damping·I)⁻¹``; directions below rounding are left out, as PEFT's pinv does."""
    r = gram.shape[-1]
    eye = jnp.eye(r, dtype=gram.dtype)
    return jnp.linalg.pinv(gram + damping * eye, rtol=r * float(jnp.finfo(gram.dtype).eps))


def _down(x: Array, adapter: Adapter) -> Float[Array, "s in r"]:
    """Return A or its gradient as one matrix for each stacked index, in float32 or wider."""
    stacked = math.prod(adapter.a.shape[: adapter.axes.count(STACKED)])
    return x.astype(accumulation_dtype(x.dtype)).reshape(stacked, -1, rank(adapter))


def _up(x: Array, adapter: Adapter) -> Float[Array, "s r out"]:
    """Return B or its gradient likewise."""
    stacked = math.prod(adapter.a.shape[: adapter.axes.count(STACKED)])
    return x.astype(accumulation_dtype(x.dtype)).reshape(stacked, rank(adapter), -1)


def _like(x: Array, gradient: Array) -> Array:
    return x.reshape(gradient.shape).astype(gradient.dtype)


def _stuck(name: str, entry: Any) -> list[str]:
    if not isinstance(entry, Adapter):
        return []
    if entry.scale is None:
        return [f"{name}: got no scale, put it in with rescale(adapters, scales)"]
    if is_number(entry.scale) and not entry.scale:
        return [f"{name}: scale got 0, by whose square the gradient is divided"]
    # Under a transformation there are no values to look at.
    known = isinstance(entry.a, jax.Array | np.ndarray) and not isinstance(entry.a, Tracer)
    return [f"{name}: got A = 0, which stays so"] if known and not np.asarray(entry.a).any() else []


def _group(embeddings: Collection[str], path: str, field: str, leaf: Any) -> str:
    if field in _FIXED:
        return "fixed"
    if field == "value":
        name = paths.leaf_name(path)
        vector = leaf.ndim < 2 or name in paths.BIAS_NAMES or name == "scale"
        return "vector" if vector else "a"
    if field == "values":  # of rows
        return "a"
    if path in embeddings:
        return "embedding"
    if field == "bias":
        return "vector"
    return "a" if field == "a" else "b"


def _times(rate: Rate, ratio: Number) -> Rate:
    return (lambda step: ratio * rate(step)) if callable(rate) else ratio * rate
