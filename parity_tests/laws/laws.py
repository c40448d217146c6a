"""The laws of the rewriter, as functions of a subject. See docs/architecture.md."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoraConfig, Plan, lora, merge, plan
from lora_jax.core import delta, paths
from lora_jax.core.config import lora_config
from lora_jax.core.errors import AdapterError, ConfigError, PlanError
from lora_jax.rewrite.frugality import compiled, sizes_of, weight_sized

# How far two evaluations of one model may be apart, by what it computes in: outputs, gradients.
# "single" are models that do not run with x64 at all, so that there is no float64 result.
BOUNDS = {"double": (1e-13, 1e-12), "single": (1e-5, 1e-5), "half": (2e-2, 4e-2)}


class Subject(Protocol):
    """What the laws need of a subject.

    ``axes`` is what planning must read off each target, by the name that targets it; ``count``
    how many parameters they are, ``sites`` how many uses each has; ``options`` go into the
    configuration. ``materialized`` ones form ``W + AB``; JAX cannot map those over adapters that
    are not ``vmaps``.
    """

    axes: Mapping[str, str]
    r: int
    dense_gradient: bool
    materialized: bool
    vmaps: bool
    options: Mapping[str, Any]

    @property
    def precision(self) -> str: ...

    @property
    def count(self) -> int: ...

    def sites_of(self, name: str) -> int: ...

    def build(self, dtype: Any) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
        """Return the function, its parameters in this dtype, and its other arguments."""
        ...


def planned(subject: Subject, dtype=np.float32):
    fn, params, args = subject.build(dtype)
    config = LoraConfig(
        r=subject.r, lora_alpha=4, target_modules=list(subject.axes), **subject.options
    )
    return plan(fn, params, config, *args), fn, params, args


def random_adapters(subject: Subject, dtype=np.float32):
    """A and B both away from zero, so that a wrong path cannot hide."""
    found, fn, params, args = planned(subject, dtype)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, dtype), found.abstract()
    )
    return adapters, fn, params, args


def relative(got, wanted) -> float:
    got, wanted = (
        np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(t)])
        for t in (got, wanted)
    )
    assert np.linalg.norm(wanted) > 0, "vacuous: the wanted value is zero"
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def loss(fn, *args):
    outs = [out for out in jax.tree.leaves(fn(*args)) if jnp.issubdtype(out.dtype, jnp.inexact)]
    # Some models keep a part of their outputs in float32.
    with jax.numpy_dtype_promotion("standard"):
        return sum(jnp.sum(jnp.sin(out)) for out in outs)


@contextlib.contextmanager
def wide(subject: Subject) -> Iterator[Any]:
    """Give the widest dtype that the subject runs in, and x64 for it."""
    double = subject.precision != "single"
    with jax.enable_x64(double):
        yield np.float64 if double else np.float32


def on_arrays(fn, *args):
    """Return ``fn`` of the arrays among its arguments alone, and these, as a list.

    Equinox models have leaves that are none.
    """
    leaves, tree = jax.tree.flatten(args)
    places = [n for n, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

    def of_arrays(arrays):
        whole = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            whole[place] = array
        return fn(*jax.tree.unflatten(tree, whole))

    return of_arrays, [leaves[place] for place in places]


def jit(fn):
    """``jax.jit`` for arguments with leaves that are no arrays."""

    def call(*args):
        of_arrays, arrays = on_arrays(fn, *args)
        return jax.jit(of_arrays)(arrays)

    return call


@contextlib.contextmanager
def quick_compilation():
    """Compile plainly what runs once: float64 results differ by 1e-16 and arrive sooner."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def identity(subject: Subject) -> None:
    found, fn, params, args = planned(subject)
    adapters = found.init(jax.random.key(0))
    with jax.disable_jit(), quick_compilation():
        base, adapted = fn(params, *args), lora(fn)(params, adapters, *args)
    for one, two in zip(jax.tree.leaves(base), jax.tree.leaves(adapted), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    assert relative(jit(lora(fn))(params, adapters, *args), jit(fn)(params, *args)) <= 1e-6


def merging(subject: Subject) -> None:
    with wide(subject) as dtype:
        adapters, fn, params, args = random_adapters(subject, dtype)
        plain, got = jit(fn), jit(lora(fn))(params, adapters, *args)
        wanted = plain(merge(params, adapters), *args)
        assert relative(wanted, plain(params, *args)) > 1e-2, "vacuous: the delta is too small"
        assert relative(got, wanted) <= BOUNDS[subject.precision][0]


def gradient(subject: Subject) -> None:
    with wide(subject) as dtype:
        adapters, fn, params, args = random_adapters(subject, dtype)
        got = jit(
            lambda params, adapters, *args: jax.grad(
                lambda a: loss(lambda: lora(fn)(params, a, *args))
            )(adapters)
        )(params, adapters, *args)
        merged = merge(params, adapters)
        targets = {path: paths.flatten(merged)[path] for path in map(paths.parameter_of, adapters)}
        frozen = paths.flatten(params)
        whole = jit(
            lambda merged, targets, *args: jax.grad(
                lambda leaves: loss(lambda: fn(paths.replace(merged, leaves), *args))
            )(targets)
        )(merged, targets, *args)
        bound = BOUNDS[subject.precision][1]
        for path, adapter in adapters.items():
            weight = paths.parameter_of(path)
            _, pull = jax.vjp(partial(delta.merged, frozen[weight]), adapter)
            (wanted,) = pull(whole[weight])
            assert relative(got[path].a, wanted.a) <= bound
            assert relative(got[path].b, wanted.b) <= bound
            if adapter.magnitude is not None:
                assert relative(got[path].magnitude, wanted.magnitude) <= bound


def frugality(subject: Subject) -> None:
    """The step computes nothing weight-sized beyond what the base's input gradient does."""
    adapters, fn, params, args = random_adapters(subject)

    def step(adapters, params, *args):
        return jax.grad(lambda a: loss(lora(fn), params, a, *args))(adapters)

    def base(params, *args):
        of_arrays, arrays = on_arrays(lambda *args: loss(fn, params, *args), *args)
        smooth = [n for n, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.inexact)]

        def of_smooth(chosen):
            return of_arrays([chosen.get(n, x) for n, x in enumerate(arrays)])

        return jax.grad(of_smooth)({n: arrays[n] for n in smooth})

    sizes = weight_sizes(params, adapters)
    added = Counter(computed(sizes, step, adapters, params, *args))
    added -= Counter(computed(sizes, base, params, *args))
    assert bool(added) == (subject.dense_gradient or subject.materialized), added


def purity(subject: Subject) -> None:
    """Nothing that was given changes, and op by op the values are those of the compiled call."""
    with wide(subject) as dtype:
        adapters, fn, params, args = random_adapters(subject, dtype)
        before = {path: np.array(leaf) for path, leaf in _arrays(params).items()}
        plain = lora(fn)(params, adapters, *args)
        merge(params, adapters)
        jax.tree.map(np.testing.assert_array_equal, _arrays(params), before)
        compiled_one = jit(lora(fn))(params, adapters, *args)
        assert relative(compiled_one, plain) <= BOUNDS[subject.precision][0]


def transforms(subject: Subject) -> None:
    with wide(subject) as dtype:
        adapters, fn, params, args = random_adapters(subject, dtype)

        def over(adapters):
            return lora(fn)(params, adapters, *args)

        # Compiled whole: op by op, as ``purity`` runs it, every operation is a compilation.
        plain, (bound, _) = jax.jit(over)(adapters), BOUNDS[subject.precision]
        assert relative(jax.jit(jax.checkpoint(over))(adapters), plain) <= bound
        two = jax.tree.map(lambda leaf: np.stack([leaf, -2 * leaf]), adapters)
        if not subject.vmaps:
            with pytest.raises(NotImplementedError):  # JAX's own: the base has none either
                jax.vmap(over)(two)
            return
        many = jax.jit(jax.vmap(over))(two)
        assert relative(jax.tree.map(lambda leaf: leaf[0], many), plain) <= bound


def planning(subject: Subject) -> None:
    found, *_ = planned(subject)
    named = {leaf.path: _name(subject, leaf.path) for leaf in found.adapted}
    assert set(named.values()) == set(subject.axes)
    assert len(named) == subject.count
    for leaf in found.adapted:
        name = named[leaf.path]
        assert (leaf.axes, leaf.sites) == (subject.axes[name], subject.sites_of(name)), leaf
        assert leaf.dense_gradient == subject.dense_gradient
        assert bool(leaf.materialized) == subject.materialized


# What a configuration may add.
KINDS = {
    "plain": {},
    "all-linear": dict(target_modules="all-linear"),
    "formed": dict(on_unsupported="materialize"),
    "DoRA": dict(use_dora=True),
    "bias": dict(lora_bias=True),
}


def agreement(subject: Subject) -> None:
    """What planning accepts the call does, and what planning refuses the call refuses."""
    fn, params, args = subject.build(np.float32)
    plain, *_ = planned(subject)
    for kind, added in KINDS.items():
        fields = dict(r=subject.r, lora_alpha=4, target_modules=list(subject.axes))
        try:
            config = LoraConfig(**fields | dict(subject.options) | added)
        except ConfigError:  # one option that the other forbids
            continue
        try:
            adapters = plan(fn, params, config, *args).abstract()
        except PlanError:
            if kind == "all-linear":  # which may have found nothing to adapt
                continue
            with pytest.raises((PlanError, AdapterError)):
                trace_call(fn, params, _as_if(plain, config), args)
        else:
            trace_call(fn, params, adapters, args)


def _as_if(found: Plan, config: LoraConfig) -> dict[str, Any]:
    """Return adapters as a plan would make them that had not refused."""
    kinds = dict(dora=config.use_dora, biased=config.lora_bias, columns=None)
    rows = [dataclasses.replace(leaf, **kinds) for leaf in found.adapted]
    return {
        row.name: row.adapter(
            jnp.zeros(row.a_shape),
            jnp.zeros(row.b_shape),
            magnitude=jnp.zeros(row.magnitude_shape) if row.dora else None,
            bias=jnp.zeros(row.bias_shape) if row.biased else None,
        )
        for row in rows
    }


def trace_call(fn, params, adapters, args) -> None:
    """Trace the call on shapes, and the call under ``jit`` with an argument that is static."""
    of_arrays, arrays = on_arrays(lora(fn), params, adapters, *args)
    jax.eval_shape(of_arrays, arrays)
    if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves((params, args))):
        return

    def moded(params, args, mode):
        assert mode == "train"
        return fn(params, *args)

    jax.jit(lora(moded), static_argnums=3).trace(params, adapters, args, "train")
    jax.jit(lora(moded), static_argnames="mode").trace(params, adapters, args, mode="train")


ALL = [identity, merging, gradient, frugality, purity, transforms, planning, agreement]


def _arrays(params) -> dict[str, Any]:
    return {path: x for path, x in paths.flatten(params).items() if hasattr(x, "dtype")}


def _name(subject: Subject, path: str) -> str:
    """Return the name that targets this path."""
    spelled = (path.replace("/", "."), paths.module_of(path))
    return next(n for n in subject.axes if any(lora_config.matches([n], s) for s in spelled))


def weight_sizes(params, adapters) -> list[tuple[int, ...]]:
    """Return the sizes of every adapted weight, and of one step of a stack of them."""
    leaves = paths.flatten(params)
    return [
        sizes
        for name, adapter in adapters.items()
        for sizes in sizes_of(tuple(leaves[paths.parameter_of(name)].shape), adapter.axes)
    ]


def computed(sizes, step, *args) -> list[str]:
    """Return every compiled instruction that computes something of these sizes."""
    return weight_sized(compiled(*on_arrays(step, *args)), sizes)
