"""JAX's side of a comparison: outputs and gradients of a function, as numpy by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util

from ...core import paths
from ..tensors import Tensors


def leaves(inputs: Any) -> Tensors:
    """Return the arrays of any pytree as numpy, by the path of each."""
    return {path: np.asarray(leaf) for path, leaf in paths.flatten(inputs).items()}


def run(
    fn: Callable[..., Any],
    inputs: Mapping[str, Any],
    wrt: Sequence[str] = (),
    cotangents: Mapping[str, Any] | None = None,
    *,
    wide: bool = False,
    jit: bool = True,
    around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Tensors:
    """Return every floating output of ``fn(**inputs)``, and the gradient of ``Σ⟨g, output⟩``.

    Args:
        fn: takes the inputs as keywords and returns an array or a pytree of arrays.
        inputs: arrays or pytrees of them by keyword.
        wrt: the paths of the inputs to derive by; their gradients are named ``d<path>``.
        cotangents: g of every output; None for outputs alone.
        wide: whether to run in float64, floating inputs cast to it.
        jit: whether to compile; op by op otherwise.
        around: transforms the function of outputs and gradients, as ``jax_order.reordered`` does.

    Returns:
        numpy arrays by name; one array alone is called ``"y"``.
    """
    return runner(fn, inputs, wrt, cotangents, wide=wide, jit=jit, around=around)(inputs)


def runner(
    fn: Callable[..., Any],
    inputs: Mapping[str, Any],
    wrt: Sequence[str] = (),
    cotangents: Mapping[str, Any] | None = None,
    *,
    wide: bool = False,
    jit: bool = True,
    around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Callable[[Mapping[str, Any]], Tensors]:
    """Return ``run`` as a function of inputs like these, compiled once for all of them."""

    def step(given: Any, seeds: Mapping[str, Any] | None) -> tuple[Any, Any]:
        def outputs(derived: Mapping[str, Any]) -> dict[str, Any]:
            return _named(fn(**paths.replace(inputs, {**given, **derived})))

        derived = {path: given[path] for path in wrt}
        if seeds is None:
            return outputs(derived), {}
        found, pull = jax.vjp(outputs, derived)
        return found, pull({n: seeds[n].astype(found[n].dtype) for n in found})[0]

    whole = around(step) if around else step
    compiled = jax.jit(whole) if jit else whole

    def run(inputs: Mapping[str, Any]) -> Tensors:
        with _precision(wide):
            given = {path: jnp.asarray(_cast(leaf, wide)) for path, leaf in leaves(inputs).items()}
            seeds = None
            if cotangents is not None:
                seeds = {name: jnp.asarray(_cast(g, wide)) for name, g in cotangents.items()}
            found, gradients = compiled(given, seeds)
            return {name: np.asarray(value) for name, value in found.items()} | {
                f"d{path}": np.asarray(gradients[path]) for path in wrt if cotangents is not None
            }

    return run


def shapes(fn: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every floating output of ``fn(**inputs)``, which is not run."""
    given = paths.replace(inputs, leaves(inputs))
    return jax.eval_shape(lambda given: _named(fn(**given)), given)


def islands(fn: Callable[..., Any], inputs: Mapping[str, Any]) -> list[str]:
    """Return the operations that stay narrower than float64 when the inputs are float64.

    A model that casts to float32 inside, as normalisations and rotary embeddings do, has no
    float64 run that could be a truth.

    >>> islands(lambda x: jnp.sin(x.astype("float32")), {"x": np.ones(2)})
    ['convert_element_type to float32 (...)', 'sin to float32 (...)']
    """
    with _precision(wide=True):
        given = {path: jnp.asarray(_cast(leaf, True)) for path, leaf in leaves(inputs).items()}
        closed = jax.make_jaxpr(lambda given: fn(**paths.replace(inputs, given)))(given)
    found: dict[str, None] = {}
    _narrow(closed.jaxpr, found)
    return list(found)


@contextmanager
def _precision(wide: bool) -> Iterator[None]:
    """Let float64 be float64, and meet what a function keeps in float32."""
    if not wide:
        yield
        return
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def _narrow(jaxpr: core.Jaxpr, found: dict[str, None]) -> None:
    for eqn in jaxpr.eqns:
        inner = [
            one
            for value in eqn.params.values()
            for one in jax.tree.leaves(value, is_leaf=_is_jaxpr)
        ]
        inner = [getattr(one, "jaxpr", one) for one in inner if _is_jaxpr(one)]
        for one in inner:
            _narrow(one, found)
        for var in () if inner else eqn.outvars:
            dtype = getattr(var.aval, "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 8:
                where = source_info_util.summarize(eqn.source_info)
                found[f"{eqn.primitive.name} to {dtype} ({where})"] = None


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _named(out: Any) -> dict[str, Any]:
    found = {name or "y": jnp.asarray(leaf) for name, leaf in paths.flatten(out).items()}
    return {n: leaf for n, leaf in found.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}


def _cast(value: Any, wide: bool) -> Any:
    value = np.asarray(value)
    return value.astype(np.float64) if wide and jnp.issubdtype(value.dtype, jnp.floating) else value
