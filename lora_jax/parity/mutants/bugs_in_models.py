"""Bugs in what an adapted model computes: scale, patterns, products, loops, dropout, DoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax

from ...core import contractions, delta, flax_layer, lowrank
from ...core.adapter import OUT, Adapter
from ...core.config import lora_config
from ...rewrite import registry, transform, weight
from ...rewrite.interpret import Call
from .gate import Mutant
from .planting import entry, instead


def _path(change: Callable[[Any, Any, Adapter], tuple[Any, Any, Adapter]]) -> Callable[[], Any]:
    """Return what changes y, x or the adapter of every product that the rewriter forms."""

    def wrong(right: Any, y: Any, x: Any, adapter: Adapter, **static: Any) -> Any:
        return right(*change(y, x, adapter), **static)

    return instead(lowrank, "_add_dot", wrong)


def _scale(wrong: Callable[[Any, int, float], float]) -> Callable[[], Any]:
    return instead(lora_config, "scale", lambda right, config, r, alpha: wrong(config, r, alpha))


def _pattern_of(name: str, value: Any) -> Callable[[], Any]:
    return instead(
        lora_config,
        "rank_and_alpha",
        lambda right, c, module: right(replace(c, **{name: value}), module),
    )


def _last_hit(right: Any, patterns: Any, module: str, default: Any) -> Any:
    return right(dict(reversed(patterns.items())), module, default)


def _lost_path(right: Any, adapters: Any) -> Any:
    found = right(adapters)
    if len(found) > 1:
        del found[max(found)]
    return found


def _dropped_base(right: Any, call: Call, lhs: Any, rhs: Any) -> Any:
    key = call.record.dropout_key
    if key is None or not isinstance(rhs, weight.LoraWeight) or rhs.planning:
        return right(call, lhs, rhs)
    kept, _ = call.dropped(lhs, rhs, weight.adapter_at(rhs, [0]))
    return right(call, kept / (1 - rhs.dropout), rhs)


def _undetached(right: Any, w: Any, adapter: Adapter) -> Any:
    if adapter.magnitude is None:
        return None
    return jnp.expand_dims(adapter.magnitude / delta.dora_norm(w, adapter), 0)


def _undilated(right: Any, x: Any, adapter: Any, spec: Any, groups: Any, options: Any) -> Any:
    same = {"rhs_dilation": (1,), "padding": ((1, 1),)}
    return right(x, adapter, spec, groups, dict(options) | same)


def _turned_window(right: Any, x: Any, adapter: Any, *rest: Any) -> Any:
    return right(x, replace(adapter, a=adapter.a[::-1]), *rest)


def _stack(change: Callable[[Any], Any]) -> Callable[[], Any]:
    """Return what changes the stacked A and B that a scan runs over."""

    def wrong(right: Any, one: Any) -> Any:
        base, a, b, *rest = right(one)
        return (base, a, b, *rest) if a is None else (base, change(a), change(b), *rest)

    return instead(weight, "split", wrong)


def _entering(change: Callable[[Adapter], Adapter]) -> Callable[[], Any]:
    """Return what changes every adapter before it enters the function."""

    def wrong(right: Any, path: str, base: Any, adapter: Adapter) -> Any:
        return right(path, base, change(adapter))

    return instead(transform, "enter", wrong)


def _other_head(adapter: Adapter) -> Adapter:
    if adapter.axes.count(OUT) < 2:
        return adapter
    return replace(adapter, b=jnp.flip(adapter.b, axis=adapter.b.ndim - 2))


def _transposed_square(adapter: Adapter) -> Adapter:
    a, b = adapter.a, adapter.b
    square = adapter.axes == "io" and a.shape == b.shape[::-1]
    return replace(adapter, a=b.T, b=a.T) if square else adapter


def _shifted_columns(right: Any, adapters: Any, shape: Any) -> Adapter:
    whole = right(adapters, shape)
    if all(one.columns is None for one in adapters):
        return whole
    return replace(whole, b=jnp.roll(whole.b, 1, axis=-1))


def _kept_at_p(right: Any, x: Any, adapter: Adapter, key: Any) -> Any:
    kept, scaled = right(x, replace(adapter, dropout=1 - adapter.dropout), key)
    return kept, replace(scaled, scale=adapter.scale)


_stop = lax.stop_gradient


MODEL = (
    Mutant("alpha for alpha/r", "scale = alpha", _scale(lambda c, r, alpha: alpha)),
    Mutant("root for everyone", "scale = alpha/√r", _scale(lambda c, r, alpha: alpha / r**0.5)),
    Mutant("rslora ignored", "scale = alpha/r with use_rslora", _scale(lambda c, r, a: a / r)),
    Mutant("scale off by 1e-5", "scale = 1.00001·alpha/r", _scale(lambda c, r, a: 1.00001 * a / r)),
    Mutant(
        "scale squared", "s² for s", instead(lowrank, "scaled", lambda f, x, ad: f(f(x, ad), ad))
    ),
    Mutant(
        "scale in bfloat16",
        "s is rounded to bfloat16",
        instead(lowrank, "scaled", lambda f, x, ad: x * jnp.bfloat16(ad.scale).astype(x.dtype)),
    ),
    Mutant(
        "bias scaled",
        "y = s·(xW + b) + s·xAB in a layer",
        instead(flax_layer, "add_low_rank", lambda f, y, x, ad, **k: f(y * ad.scale, x, ad, **k)),
    ),
    # patterns
    Mutant("rank pattern ignored", "r for every module", _pattern_of("rank_pattern", {})),
    Mutant("alpha pattern ignored", "alpha for every module", _pattern_of("alpha_pattern", {})),
    Mutant(
        "last pattern wins", "later patterns first", instead(lora_config, "_first_hit", _last_hit)
    ),
    Mutant(
        "pattern as an ending",
        "`q` means `sub_q`, too",
        instead(lora_config, "suffixed", lambda f, pattern: rf".*({pattern})$"),
    ),
    Mutant(
        "pattern as a prefix",
        "patterns need not reach the end",
        instead(lora_config, "suffixed", lambda f, pattern: rf"(.*\.)?({pattern})"),
    ),
    # the product
    Mutant(
        "one path dropped",
        "the last adapter is not put in",
        instead(transform, "_parts", _lost_path),
    ),
    Mutant(
        "no gradient of A",
        "A is constant",
        _path(lambda y, x, ad: (y, x, replace(ad, a=_stop(ad.a)))),
    ),
    Mutant(
        "no gradient of B",
        "B is constant",
        _path(lambda y, x, ad: (y, x, replace(ad, b=_stop(ad.b)))),
    ),
    Mutant(
        "no gradient through the path",
        "x is constant in xAB",
        _path(lambda y, x, ad: (y, _stop(x), ad)),
    ),
    Mutant(
        "no gradient through the base", "xW is constant", _path(lambda y, x, ad: (_stop(y), x, ad))
    ),
    Mutant(
        "rows mixed",
        "the path of row n has x of row n − 1",
        _path(lambda y, x, ad: (y, jnp.roll(x, 1, 0), ad)),
    ),
    Mutant(
        "path in bfloat16",
        "x is rounded before A",
        _path(lambda y, x, ad: (y, x.astype("bfloat16").astype(x.dtype), ad)),
    ),
    Mutant(
        "path applied twice",
        "y + 2s·xAB",
        _path(lambda y, x, ad: (y, x, replace(ad, b=2 * ad.b))),
    ),
    Mutant("square transposed", "BᵀAᵀ for AB where it fits", _entering(_transposed_square)),
    Mutant("heads exchanged", "B of head n meets head H − n", _entering(_other_head)),
    Mutant(
        "columns off by one",
        "a range of columns is moved by one",
        instead(delta, "joined", _shifted_columns),
    ),
    Mutant(
        "tied delta doubled",
        "a lookup adds 2ΔW",
        instead(contractions, "take", lambda f, *args: 2 * f(*args)),
    ),
    Mutant(
        "tied delta lost",
        "a lookup adds nothing",
        instead(contractions, "take", lambda f, *args: 0 * f(*args)),
    ),
    # loops, windows, groups
    Mutant(
        "stacked layers reversed", "layer n has the pair of L − n", _stack(lambda one: one[::-1])
    ),
    Mutant(
        "one layer for all",
        "every layer has the pair of the first",
        _stack(lambda one: jnp.broadcast_to(one[:1], one.shape)),
    ),
    Mutant("dilation dropped", "A's window is dense", instead(contractions, "conv", _undilated)),
    Mutant(
        "window turned", "A's window is reversed", instead(contractions, "conv", _turned_window)
    ),
    Mutant(
        "experts exchanged",
        "a group has the pair of another",
        instead(
            contractions,
            "ragged_dot",
            lambda f, x, ad, *rest: f(x, replace(ad, a=ad.a[::-1], b=ad.b[::-1]), *rest),
        ),
    ),
    # dropout
    Mutant(
        "1/(1 − p) missing",
        "kept inputs are not scaled",
        instead(lowrank, "drop", lambda f, x, ad, key: (f(x, ad, key)[0], ad)),
    ),
    Mutant(
        "kept with probability p", "keep and drop exchanged", instead(lowrank, "drop", _kept_at_p)
    ),
    Mutant(
        "nothing dropped",
        "dropout is off in training",
        instead(lowrank, "drop", lambda f, x, ad, key: (x, ad)),
    ),
    Mutant(
        "dropout on the base path",
        "the frozen product drops, too",
        entry(registry.RULES, "dot_general", _dropped_base),
    ),
    # DoRA
    Mutant(
        "norm over all axes",
        "one norm for all outputs",
        instead(
            delta, "dora_norm", lambda f, w, ad: jnp.sqrt(jnp.mean(f(w, ad) ** 2)) + 0 * f(w, ad)
        ),
    ),
    Mutant("norm not detached", "‖W + sAB‖ gets a gradient", instead(delta, "gain", _undetached)),
    Mutant(
        "norm of W alone",
        "‖W‖ for ‖W + sAB‖",
        instead(delta, "dora_norm", lambda f, w, ad: f(w, replace(ad, b=0 * ad.b))),
    ),
    Mutant(
        "norm not squared",
        "m/√‖V‖ for m/‖V‖",
        instead(delta, "dora_norm", lambda f, w, ad: jnp.sqrt(f(w, ad))),
    ),
    # what cannot be seen
    Mutant(
        "scale before the cast",
        "s·x for x·s",
        instead(lowrank, "scaled", lambda f, x, ad: ad.scale * x),
        equivalent="multiplication commutes in floating point, too",
    ),
    Mutant(
        "norm detached twice",
        "a second stop_gradient",
        instead(delta, "dora_norm", lambda f, w, ad: _stop(f(w, ad))),
        equivalent="the norm is a constant already",
    ),
)
