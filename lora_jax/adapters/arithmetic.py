"""Arithmetic on adapter trees, exact: scaling, adding, subtracting, renaming."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..core import paths
from ..core.adapter import Adapter, Adapters, Entry
from ..core.buffers import apart
from ..core.errors import AdapterError, raise_all
from .svd import concatenated, factors, misfits, pairs_of, scale_of, with_factors

HEADING = "these adapters cannot be combined"


def scale_by(adapters: Adapters, factor: float) -> dict[str, Adapter]:
    """Return adapters whose ``ΔW`` is ``factor`` times the old one; only the scale changes.

    So does what an adapter's bias adds.

    Raises:
        AdapterError: lists leaves trained in full, whose change is not known, and adapters
            without a scale.

    >>> import jax.numpy as jnp
    >>> adapters = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)}
    >>> scale_by(adapters, -0.5)["w"].scale
    -1.0
    """
    raise_all(AdapterError, HEADING, misfits([adapters], biases=True))
    scaled = {
        path: replace(one, scale=one.scale * factor)  # pyright: ignore[reportOptionalOperand]
        for path, one in pairs_of(adapters).items()
    }
    return apart(scaled, adapters)


def add(one: Adapters, other: Adapters) -> dict[str, Adapter]:
    """Return adapters with ``ΔW = ΔW₁ + ΔW₂``, exact: the ranks are concatenated.

    ``s₁A₁B₁ + s₂A₂B₂ = s·[(s₁/s)A₁ (s₂/s)A₂]·[B₁; B₂]``, with the larger scale for s. A path
    that only one of them adapts keeps its adapter. ``resize`` brings the rank down again.
    Biases are added, too.

    Args:
        one: adapters of a model.
        other: of the same model; paths, ranks and scales may differ.

    Raises:
        AdapterError: lists every path whose axes, shapes, columns or dtypes differ, and leaves
            trained in full.

    >>> import jax.numpy as jnp
    >>> pair = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)}
    >>> total = add(pair, pair)["w"]
    >>> total.a.shape, total.b.shape, total.scale
    ((3, 2), (2, 2), 2.0)
    """
    raise_all(AdapterError, HEADING, misfits([one, other], biases=True))
    ones, others = pairs_of(one), pairs_of(other)
    both = {path: _sum(ones[path], others[path]) for path in ones if path in others}
    return apart({**ones, **others, **both}, one, other)


def subtract(one: Adapters, other: Adapters) -> dict[str, Adapter]:
    """Return adapters with ``ΔW = ΔW₁ − ΔW₂``, exact: the ranks are concatenated.

    Raises:
        AdapterError: as ``add``.

    >>> import jax.numpy as jnp
    >>> from lora_jax.core.delta import delta
    >>> pair = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)}
    >>> float(abs(delta(subtract(pair, pair)["w"])).max())
    0.0
    """
    return add(one, scale_by(other, -1.0))


def rename(adapters: Adapters, names: Mapping[str, str] | Callable[[str], str]) -> dict[str, Entry]:
    """Return the same adapters under other parameter paths.

    Args:
        adapters: what is renamed.
        names: the new path of a path: a function, or a mapping; what the mapping does not name
            keeps its path. The range of columns in a name is kept.

    Raises:
        AdapterError: lists every name of the mapping that is no adapter's, and every new path
            that two adapters would get.

    >>> import jax.numpy as jnp
    >>> pair = Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)
    >>> list(rename({"a.w": pair, "b.w": pair}, {"a.w": "c.w"}))
    ['c.w', 'b.w']
    >>> list(rename({"a.w": pair}, lambda path: f"model.{path}"))
    ['model.a.w']
    """
    old = {name: paths.parameter_of(name) for name in adapters}
    problems = []
    if isinstance(names, Mapping):
        problems += [f"{name}: no such adapter" for name in names if name not in old.values()]
    new: dict[str, str] = {}
    for name, path in old.items():
        to = names.get(path, path) if isinstance(names, Mapping) else names(path)
        to += name.removeprefix(path)
        if to in new:
            problems.append(f"{to}: the new name of {new[to]} and of {name}")
        new[to] = name
    raise_all(AdapterError, "these adapters cannot be renamed so", problems)
    return apart({to: adapters[name] for to, name in new.items()}, adapters)


def _sum(one: Adapter, other: Adapter) -> Adapter:
    scales = scale_of(one), scale_of(other)
    # The larger one, so that no ratio overflows. ±1 or a power of two rounds nothing.
    scale = max(scales, key=abs)
    ratios = [own / scale if scale else 1.0 for own in scales]
    pairs = [
        (a * ratio, b) for ratio, (a, b) in zip(ratios, map(factors, (one, other)), strict=True)
    ]
    biases = [
        ratio * pair.bias
        for ratio, pair in zip(ratios, (one, other), strict=True)
        if pair.bias is not None
    ]
    total = with_factors(one, concatenated(pairs), scale)
    return replace(total, bias=sum(biases[1:], biases[0])) if biases else total
