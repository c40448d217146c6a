"""Many adapters of one model at once: stacked to train together, selected to serve together.

Adapters are arguments, so ``jax.vmap`` over a stack of them is all that this takes. The frozen
weights are not mapped over: every product with one of them is one matmul of all rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Inexact, Int

from ..core import lowrank, paths
from ..core import token_rows as rows
from ..core.adapter import STACKED, Adapter, Adapters, Entry, Full, Rows, is_number, pytree, rank
from ..core.buffers import apart
from ..core.errors import AdapterError, raise_all
from ..core.serialization import register
from ..rewrite import signature
from ..rewrite.signature import is_array

NONE = -1  # the index of "no adapter"
AT_ONCE = 512  # the rows that fill a CPU, and whose results stay in its caches

Index = int | Int[Array | np.ndarray, "*batch"]


@register
@pytree
@dataclass(frozen=True)
class Stacked:
    """K adapters of one model on a new leading axis.

    Args:
        adapters: what is trained, every leaf ``(K, ...)``. Ranks are padded with zeros to the
            largest; the gradients of the padding are zero, so it stays zero. The scales are
            not here, where weight decay would move them: ``rescale`` puts them in.
        scales: the K scales of each path, which nothing trains.
        ranks: the K ranks of each path.
    """

    adapters: Adapters
    scales: Mapping[str, Any]
    ranks: tuple[tuple[str, tuple[int, ...]], ...] = field(metadata=dict(static=True))

    @property
    def size(self) -> int:
        """The number of adapters, K."""
        return jax.tree.leaves(dict(self.adapters))[0].shape[0]


def stack(adapters: Sequence[Adapters]) -> Stacked:
    """Return the adapters on a new leading axis; ranks and scales may differ.

    Train them with ``jax.vmap`` over ``stacked.adapters`` and ``stacked.scales``, with
    ``rescale`` inside the loss. Give each a seed, a batch or a learning rate of its own by
    mapping over that, too.

    Args:
        adapters: of one model, with the same paths, axes, shapes, dtypes and dropout.

    Raises:
        AdapterError: lists every way in which an adapter differs from the first.

    >>> def fn(params, x):
    ...     return x @ params["w"]
    >>> one = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)}
    >>> two = {"w": Adapter(jnp.ones((3, 4)), jnp.ones((4, 2)), scale=0.5)}
    >>> stacked = stack([one, two])
    >>> stacked.adapters["w"].a.shape, stacked.scales["w"].tolist(), stacked.ranks
    ((2, 3, 4), [2.0, 0.5], (('w', (1, 4)),))
    """
    raise_all(AdapterError, "these adapters cannot be stacked", _differences(adapters))
    stacked, scales, ranks = {}, {}, {}
    for path in adapters[0]:
        entries = [one[path] for one in adapters]
        pairs = [entry for entry in entries if isinstance(entry, Adapter)]
        if pairs:
            stacked[path] = _stack_pairs(pairs)
            scales[path] = _stack_scales([entry.scale for entry in pairs])
            ranks[path] = tuple(map(rank, pairs))
        else:
            stacked[path] = jax.tree.map(lambda *values: jnp.stack(values), *entries)
    return Stacked(stacked, scales, tuple(sorted(ranks.items())))


def unstack(stacked: Stacked) -> list[dict[str, Entry]]:
    """Return the adapters of a stack, each with its own ranks and scales again.

    >>> one = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)}
    >>> two = {"w": Adapter(jnp.ones((3, 4)), jnp.ones((4, 2)), scale=0.5)}
    >>> [(a["w"].a.shape, a["w"].scale) for a in unstack(stack([one, two]))]
    [((3, 1), 2.0), ((3, 4), 0.5)]
    """
    ranks = dict(stacked.ranks)

    def entry(path: str, k: int) -> Entry:
        one = jax.tree.map(lambda leaf: leaf[k], stacked.adapters[path])
        if not isinstance(one, Adapter):
            return one
        scale = stacked.scales[path][k]
        scale = scale if isinstance(scale, Tracer) else float(scale)
        return replace(_with_rank(one, ranks[path][k]), scale=scale)

    return [{path: entry(path, k) for path in stacked.adapters} for k in range(stacked.size)]


def rescale(adapters: Adapters, scales: Mapping[str, Any]) -> dict[str, Entry]:
    """Return the adapters with these scales, for use inside a loss that ``jax.vmap`` maps.

    Args:
        adapters: of a ``Stacked``, or one of them under ``jax.vmap``.
        scales: its scales, likewise.

    Raises:
        AdapterError: lists the paths of which one has an adapter and the other has not.

    >>> one = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)}
    >>> stacked = stack([one, one])
    >>> rescale(stacked.adapters, stacked.scales)["w"].scale.tolist()
    [2.0, 2.0]
    """
    pairs = {path for path, entry in adapters.items() if isinstance(entry, Adapter)}
    problems = [f"{path}: an adapter, but no scale" for path in pairs - scales.keys()]
    problems += [f"{path}: a scale, but no adapter" for path in scales.keys() - pairs]
    raise_all(AdapterError, "these scales are not those of the adapters", sorted(problems))
    whole = {
        path: replace(entry, scale=scales[path]) if isinstance(entry, Adapter) else entry
        for path, entry in adapters.items()
    }
    return apart(whole, adapters, scales)


def map_adapters(fn: Callable[..., Any], *, rows: int) -> Callable[..., Any]:
    """Return ``fn`` mapped over the leading axis of its arguments: adapters trained together.

    With few rows each, reading the frozen weights is most of a step, and ``jax.vmap`` reads them
    once for all. A CPU is filled by ``AT_ONCE`` rows: with more, ``jax.lax.map`` runs as many
    adapters at a time as have those together, in the memory that they need.

    Args:
        fn: of one adapter, such as a training step.
        rows: of one adapter's batch, as they meet a weight: examples times tokens.

    Raises:
        AdapterError: ``rows`` is below 1, or, when called, there is nothing to map over.

    >>> one = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)}
    >>> stacked = stack([one, one])
    >>> map_adapters(lambda adapters: adapters["w"].a.sum(), rows=4096)(stacked.adapters).tolist()
    [3.0, 3.0]
    """
    _check_rows("map_adapters", rows)

    @functools.wraps(fn)
    def mapped(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        if not leaves or not all(map(jnp.ndim, leaves)):
            raise AdapterError("map_adapters: wanted arguments whose arrays have a leading axis")
        return _mapped(fn, args, rows)

    return mapped


def select(stacked: Stacked, index: Index, params: Any = None) -> dict[str, Entry]:
    """Return one adapter of a stack, or one for each example of a batch.

    Args:
        stacked: K adapters.
        index: which one, a scalar; or ``(batch,)``, and every leaf gets that leading axis for
            ``per_example``. -1 is no adapter: A, B, the scale, DoRA's magnitude and a bias are
            zero, and the example gets the frozen model's output exactly. A traced index that is
            out of range is -1, too.
        params: the frozen parameters. Leaves and rows trained in full have their values from
            here where there is no adapter, so they are needed if there are such and the index
            may be -1, as a traced one may.

    Raises:
        AdapterError: an index is out of range, or ``params`` are needed and lack a leaf.

    >>> one = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)}
    >>> two = {"w": Adapter(jnp.ones((3, 4)), jnp.ones((4, 2)), scale=0.5)}
    >>> batch = select(stack([one, two]), jnp.array([1, 0, -1, 1]))
    >>> batch["w"].a.shape, batch["w"].scale.tolist()
    ((4, 3, 4), [0.5, 2.0, 0.0, 0.5])
    """
    size = stacked.size
    full = [path for path, entry in stacked.adapters.items() if not isinstance(entry, Adapter)]
    frozen = {} if params is None else paths.flatten(params)
    raise_all(AdapterError, "cannot select", _index_problems(index, size, full, frozen))
    index = jnp.asarray(index)
    present = (index >= 0) & (index < size)

    def take(values: Any) -> Array:
        values = jnp.asarray(values)
        return values.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)

    def entry(path: str, entry: Entry) -> Entry:
        if isinstance(entry, Full):
            value = take(entry.value)
            return Full(_where(present, value, frozen[path]) if path in frozen else value)
        if isinstance(entry, Rows):
            value = take(entry.values)
            if path in frozen:
                value = _where(present, value, rows.of(frozen[path], entry.indices, entry.axis))
            return replace(entry, values=value)
        scale = take(jnp.asarray(stacked.scales[path], float))
        return replace(jax.tree.map(take, entry), scale=scale)

    return {path: entry(path, each) for path, each in stacked.adapters.items()}


def per_example(adapted: Callable[..., Any], *, rows: int | None = None) -> Callable[..., Any]:
    """Return ``adapted`` with an adapter for each example: one batch, many adapters.

    Each example runs as a batch of one, so a function written for batches need not change.
    What it computes with the frozen weights is computed for all examples at once. Given ``rows``,
    a CPU takes as many at a time as have ``AT_ONCE`` rows: with more, what a product with the
    weights gives leaves the caches before the example's own addend meets it.

    Args:
        adapted: ``adapted(params, adapters, *args)``, such as ``lora(fn)``. Arrays in ``args``
            and in what it returns have the batch as their leading axis. What is no array, such as
            a flag, and keyword arguments are the same for all examples, but for ``dropout_key``,
            which is split, and ``active``, which has the batch as its leading axis, too.
        rows: of one example, as they meet a weight: its tokens.

    Raises:
        AdapterError: ``rows`` is below 1.

    >>> from lora_jax import lora
    >>> def fn(params, x):
    ...     return x @ params["w"]
    >>> one = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)}
    >>> two = {"w": Adapter(jnp.ones((3, 4)), jnp.ones((4, 2)), scale=0.5)}
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((3, 3))
    >>> batch = select(stack([one, two]), jnp.array([0, 1, -1]))
    >>> per_example(lora(fn))(params, batch, x)[:, 0].tolist()
    [9.0, 9.0, 3.0]
    """
    if rows is not None:
        _check_rows("per_example", rows)

    taken = signature.names_of(adapted, len(signature.OWN)) - {*signature.KEYWORDS}

    @functools.wraps(adapted)
    def batched(*given: Any, **named: Any) -> Any:
        params, adapters, args, kwargs, own = signature.arguments(given, named, taken)
        dropout_key, active = own["dropout_key"], own["active"]
        arrays, with_arrays = signature.parted(args, is_array)
        outputs: dict[str, Any] = {}

        def one(adapters: Adapters, arrays: list[Array], key: Any, active: Any) -> list[Array]:
            arrays, active = jax.tree.map(lambda value: value[None], (arrays, active))
            given = {"dropout_key": key, "active": active}
            options = kwargs | {name: value for name, value in given.items() if value is not None}
            outs = adapted(params, adapters, *with_arrays(arrays), **options)
            outs, outputs["rebuild"] = signature.parted(outs, is_array)
            return [jnp.squeeze(out, 0) for out in outs]

        size = jax.tree.leaves(dict(adapters))[0].shape[0]
        keys = None if dropout_key is None else jax.random.split(dropout_key, size)
        outs = _mapped(one, (adapters, arrays, keys, active), rows or 0)
        return outputs["rebuild"](outs)

    return batched


def _mapped(fn: Callable[..., Any], args: tuple[Any, ...], rows: int) -> Any:
    """Return ``fn`` mapped over the leading axes, on a CPU ``AT_ONCE`` rows at a time."""
    size = jax.tree.leaves(args)[0].shape[0]
    at_once = max(AT_ONCE // rows, 1) if rows and jax.default_backend() == "cpu" else size
    if at_once >= size:
        return jax.vmap(fn)(*args)
    return lax.map(lambda own: fn(*own), args, batch_size=at_once if at_once > 1 else None)


def _check_rows(name: str, rows: int) -> None:
    if rows < 1:
        raise AdapterError(f"{name}: rows is {rows}, wanted 1 or more")


def _stack_pairs(pairs: Sequence[Adapter]) -> Adapter:
    largest = max(map(rank, pairs))
    padded = [replace(_with_rank(pair, largest), scale=None) for pair in pairs]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)


def _stack_scales(scales: Sequence[Any]) -> Any:
    """Return the scales as one array; numbers keep all their digits for ``unstack``."""
    if all(map(is_number, scales)):
        return np.asarray(scales, np.float64)
    return jnp.stack([jnp.asarray(scale, float) for scale in scales])


def _with_rank(adapter: Adapter, r: int) -> Adapter:
    """Return the adapter padded with zeros, or cut, to this rank."""

    def resize(factor: Array, axis: int) -> Array:
        more = r - factor.shape[axis]
        if more <= 0:
            return lax.slice_in_dim(factor, 0, r, axis=axis)
        return jnp.pad(factor, [(0, more if n == axis else 0) for n in range(factor.ndim)])

    a, b = resize(adapter.a, adapter.a.ndim - 1), resize(adapter.b, adapter.axes.count(STACKED))
    return replace(adapter, a=a, b=b)


def _where(
    present: Bool[Array, "*batch"], value: Inexact[Array, "..."], frozen: Inexact[Array, "..."]
) -> Inexact[Array, "..."]:
    present = present.reshape(present.shape + (1,) * frozen.ndim)
    dtype = lowrank.wider(value.dtype, frozen.dtype)
    return jnp.where(present, value.astype(dtype), frozen.astype(dtype))


def _index_problems(
    index: Any, size: int, full: Sequence[str], frozen: Mapping[str, Any]
) -> Iterator[str]:
    traced = isinstance(index, Tracer)
    numbers = [] if traced else np.asarray(index).ravel().tolist()
    if wrong := sorted({n for n in numbers if not NONE <= n < size}):
        yield f"index: got {wrong}, wanted {NONE} (no adapter) to {size - 1}"
    if traced or NONE in numbers:
        yield from (
            f"{path}: trained in full, so an index of {NONE} needs its value from params"
            for path in full
            if path not in frozen
        )


def _differences(adapters: Sequence[Adapters]) -> Iterator[str]:
    """Yield what keeps the adapters from being stacked."""
    if not adapters or not adapters[0]:
        yield "got no adapter, wanted at least one"
        return
    first = adapters[0]
    for n, other in enumerate(adapters):
        for path in sorted(first.keys() ^ other.keys()):
            has, lacks = (0, n) if path in first else (n, 0)
            yield f"{path}: adapter {has} has it, adapter {lacks} does not"
        for path in sorted(first.keys() & other.keys()):
            got, wanted = _facts(other[path]), _facts(first[path])
            for name in wanted | got:
                if got.get(name) != wanted.get(name):
                    yield (
                        f"{path}: {name} of adapter {n} is {got.get(name)}, "
                        f"of adapter 0 {wanted.get(name)}"
                    )
            scale = getattr(other[path], "scale", 1.0)
            if scale is None or np.ndim(scale):
                got = "none" if scale is None else f"shape {np.shape(scale)}"
                yield f"{path}: scale of adapter {n}: got {got}, wanted a number"


def _facts(entry: Entry) -> dict[str, Any]:
    """Return what must be equal in all adapters of a stack: all but the rank and the scale."""
    if isinstance(entry, Full):
        return {"kind": "Full", "shape": entry.value.shape, "dtype": entry.value.dtype}
    if isinstance(entry, Rows):
        own = {"kind": "Rows", "shape": entry.values.shape, "dtype": entry.values.dtype}
        return own | {"indices": entry.indices, "axes": entry.axes, "axis": entry.axis}
    at = entry.axes.count(STACKED)
    return {
        "kind": "Adapter",
        "axes": entry.axes,
        "dropout": entry.dropout,
        "masked": entry.masked,
        "columns": entry.columns,
        "shape": (entry.a.shape[:-1], entry.b.shape[:at] + entry.b.shape[at + 1 :]),
        "dtype": (entry.a.dtype, entry.b.dtype),
        "magnitude": entry.magnitude is not None,
        "bias": entry.bias is not None,
    }
