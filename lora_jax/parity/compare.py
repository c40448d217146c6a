"""``compare``: the same function in JAX and in PyTorch, tensor by tensor, against the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import paths
from ..core.errors import ParityError, raise_all
from ..core.shown_text import listed
from . import tensors as names
from .sides import jax_side
from .tensors import Mapped, Tensors
from .verdicts import UNIT_ROUNDOFF, TensorVerdict, Verdict, judge, norm, rel_l2, worst

# Roundings in the chain of operations behind one output or gradient.
CHAIN = 32.0

# Two float64 runs of the same mathematics agree to this, whatever the order of their sums.
AGREEMENT = 1e-10

# Further apart than this, float32 inside a float64 run is not the reason.
ISLAND = 1e-5

# A tensor that is smaller than this beside the largest of its kind is zero but for rounding.
ZERO = 1e-12

Oracle = Callable[[Tensors, Tensors], Mapping[str, NDArray[Any]]]
"""From the inputs in float64 and the cotangents to the true outputs and gradients, by name."""


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Args:
        tensors: a verdict for every output and every gradient, outputs first.
        agreement: how far apart the two frameworks' float64 runs are, by tensor.
        islands: the operations of either framework that stay narrower than float64 there.
    """

    tensors: tuple[TensorVerdict, ...]
    agreement: Mapping[str, float]
    islands: Mapping[str, Sequence[str]]

    @property
    def verdict(self) -> Verdict:
        """The worst of all verdicts."""
        return worst(self.tensors)

    @property
    def ok(self) -> bool:
        """Whether every tensor is ``EXACT`` or ``ORDER_ONLY``."""
        return self.verdict.ok

    def raise_for_verdict(self) -> None:
        """Raise ``AssertionError`` with every tensor whose verdict is not one to ship with."""
        bad = [str(one) for one in self.tensors if not one.verdict.ok]
        if bad or not self.tensors:
            raise AssertionError("\n".join(["jax and torch differ:", *bad]))

    def __str__(self) -> str:
        return "\n".join(map(str, self.tensors))


def compare(
    jax_fn: Callable[..., Any],
    torch_fn: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    oracle: Oracle | None = None,
    mapping: Mapped | None = None,
    outputs: Mapping[str, names.To | str] | None = None,
    wrt: Sequence[str] | None = None,
    exact: bool = False,
    seed: int = 0,
) -> Comparison:
    """Hold a JAX function and its PyTorch twin to each other: outputs, and gradients of each input.

    Both run in the inputs' own dtype, and both again in float64. If the float64 runs agree, the
    mathematics are the same and they are the truth; the runs in the inputs' dtype are then held to
    ``relL2(jax) ≤ 2 · relL2(torch) + u · cond``. If they do not, the functions differ, and only
    an ``oracle`` can say which is wrong.

    Args:
        jax_fn: takes the inputs as keywords; returns an array or a pytree of arrays.
        torch_fn: the same for tensors. ``torch_side.ModuleFn`` makes a module one.
        inputs: numpy arrays or pytrees of them by keyword, weights included.
        oracle: the truth, in numpy; from both float64 runs where it leaves a tensor out.
        mapping: PyTorch's names and layouts by JAX's, where they differ (see ``To``), as a
            mapping or a function; mapped names are keywords of ``torch_fn``.
        outputs: PyTorch's names and layouts of the outputs by JAX's, where they differ.
        wrt: the paths of the inputs to derive by; by default all of floating dtype.
        exact: whether every sum is exact (see ``exact_inputs``), so that only equality will do.
        seed: of the cotangents that the outputs are multiplied with.

    Returns:
        A verdict for every output and every gradient; ``d<path>`` is an input's.

    Raises:
        ParityError: names or shapes of the two sides do not fit; lists them all.

    >>> import jax.numpy as jnp, torch
    >>> x, w = np.linspace(-1, 1, 12, dtype="f4").reshape(3, 4), np.eye(4, 5, dtype="f4")
    >>> inputs = {"x": x, "w": w}
    >>> found = compare(lambda x, w: jnp.tanh(x @ w), lambda x, w: torch.tanh(x @ w), inputs)
    >>> [one.name for one in found.tensors], found.ok
    (['y', 'dw', 'dx'], True)
    """
    leaves = jax_side.leaves(inputs)
    names.check(mapping, list(leaves))
    floating = [path for path, leaf in leaves.items() if is_floating(leaf)]
    wrt = floating if wrt is None else list(wrt)
    _check_wrt(wrt, floating)
    theirs = _Theirs(torch_fn, inputs, leaves, mapping, outputs or {}, wrt)
    cotangents = _draw(jax_side.shapes(jax_fn, inputs), seed)
    ours = jax_side.run(jax_fn, inputs, wrt, cotangents)
    got = theirs.run(cotangents)
    _check_names(ours, got)
    in_wide = jax_side.runner(jax_fn, inputs, wrt, cotangents, wide=True)
    wide = in_wide(inputs)
    wide_torch = theirs.run(cotangents, wide=True)
    known = dict(oracle(_wide(leaves), _wide(cotangents))) if oracle else {}
    unit = max(UNIT_ROUNDOFF[str(leaves[path].dtype)] for path in floating)
    moved = in_wide(_perturbed(inputs, leaves, unit, seed))
    sizes = _sizes(wide_torch)
    agreement = {n: rel_l2(wide[n], wide_torch[n], sizes[n] or norm(wide_torch[n])) for n in ours}
    islands = {"jax": jax_side.islands(jax_fn, inputs), "torch": theirs.islands()}

    def one(name: str) -> TensorVerdict:
        size, truth = sizes[name], known.get(name, wide_torch[name])
        if name not in known and agreement[name] > AGREEMENT:
            seen = TensorVerdict(
                name, Verdict.MISMATCH, shape=ours[name].shape, dtype=str(ours[name].dtype)
            )
            return _disagreeing(seen, agreement[name], islands)
        cond = max(1.0, rel_l2(moved[name], wide[name], size or norm(wide[name])) / unit)
        return judge(
            name,
            ours[name],
            got[name],
            truth,
            unit_roundoff=unit,
            cond=CHAIN * cond,
            exact=exact,
            size=size,
        )

    return Comparison(tuple(map(one, ours)), agreement, islands)


@dataclass(frozen=True)
class _Theirs:
    """PyTorch's side, under JAX's names."""

    fn: Callable[..., Any]
    inputs: Mapping[str, Any]
    leaves: Tensors
    mapping: Mapped | None
    outputs: Mapping[str, names.To | str]
    wrt: Sequence[str]

    @property
    def to(self) -> dict[str, names.To]:
        return {path: names.to(self.mapping, path) for path in self.leaves}

    @property
    def given(self) -> dict[str, Any]:
        to = self.to
        renamed = {path for path in self.leaves if to[path] != names.To(path)}
        kept: dict[str, Any] = _without(self.inputs, renamed)
        return kept | {to[path].name: to[path].there(self.leaves[path]) for path in renamed}

    def islands(self) -> list[str]:
        from .sides import torch_side

        return torch_side.islands(self.fn, self.given)

    def run(self, cotangents: Tensors, *, wide: bool = False) -> Tensors:
        # Here, so that the package imports without PyTorch.
        from .sides import torch_side

        to = self.to
        said = {ours: names.to(self.outputs, ours) for ours in cotangents}
        seeds = {said[ours].name: said[ours].there(g) for ours, g in cotangents.items()}
        wrt = [to[path].name for path in self.wrt]
        got = torch_side.run(self.fn, self.given, wrt, seeds, wide=wide)
        result = {
            ours: _back(one, got.pop(one.name), cotangents[ours])
            for ours, one in said.items()
            if one.name in got
        }
        for path in self.wrt:
            gradient = got.pop(f"d{to[path].name}")
            result[f"d{path}"] = to[path].back(gradient, self.leaves[path].shape)
        return result | got


def _back(to: names.To, theirs: NDArray[Any], ours: NDArray[Any]) -> NDArray[Any]:
    """Return PyTorch's output in JAX's layout; as it is where its shape is another one."""
    fits = to.there(ours).shape == theirs.shape
    return to.back(theirs, ours.shape) if fits else theirs


def _check_wrt(wrt: Sequence[str], floating: Sequence[str]) -> None:
    raise_all(
        ParityError,
        "these inputs cannot be derived by",
        (f"{path}: not an input of floating dtype" for path in wrt if path not in floating),
    )
    if not floating:
        raise ParityError("inputs: got none of floating dtype, so there is nothing to derive by")
    if not wrt:
        held = ", ".join(listed(floating))
        raise ParityError(f"wrt: got no path, wanted some of {held}; without wrt it is all of them")


def _check_names(ours: Tensors, theirs: Tensors) -> None:
    problems = [f"{name}: of JAX's alone" for name in ours.keys() - theirs.keys()]
    problems += [f"{name}: of PyTorch's alone" for name in theirs.keys() - ours.keys()]
    problems += [
        f"{name}: jax {ours[name].shape}, torch {theirs[name].shape}"
        for name in ours.keys() & theirs.keys()
        if ours[name].shape != theirs[name].shape
    ]
    raise_all(ParityError, "the outputs do not correspond (see outputs=)", sorted(problems))


def _disagreeing(
    seen: TensorVerdict, apart: float, islands: Mapping[str, Sequence[str]]
) -> TensorVerdict:
    """Return the verdict on a tensor of which the float64 runs make two different ones."""
    narrow = [f"{side}: {op}" for side, found in islands.items() for op in found]
    if narrow and apart < ISLAND:
        why = (
            f"the float64 runs agree to {apart:.1e} only, since a part of them is narrower, so "
            f"they are no truth: give an oracle, or patch these: {'; '.join(narrow[:6])}"
        )
        return replace(seen, verdict=Verdict.VACUOUS, why=why)
    why = f"in float64 jax and torch differ by {apart:.1e}: they compute different functions"
    return replace(seen, why=why)


def _draw(outputs: Mapping[str, Any], seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    return {n: rng.integers(-2, 3, y.shape).astype(y.dtype) for n, y in outputs.items()}


def _perturbed(inputs: Mapping[str, Any], leaves: Tensors, unit: float, seed: int) -> Any:
    """Return the inputs in float64, every floating one off by one rounding."""
    rng = np.random.default_rng(seed)
    wide = _wide(leaves)
    off = {
        path: value * (1 + unit * rng.choice((-1.0, 1.0), value.shape))
        for path, value in wide.items()
        if is_floating(value)
    }
    return paths.replace(inputs, {**wide, **off})


def _sizes(truth: Tensors) -> dict[str, float | None]:
    """Return what errors of a tensor that is zero but for rounding are measured in."""
    largest = max(map(norm, truth.values()), default=0.0)
    floor = ZERO * largest
    return {n: largest if 0 < largest and norm(v) < floor else None for n, v in truth.items()}


def _wide(leaves: Mapping[str, Any]) -> Tensors:
    return {n: v.astype(np.float64) if is_floating(v) else v for n, v in leaves.items()}


def _without(tree: Any, gone: set[str], prefix: str = "") -> Any:
    if not isinstance(tree, Mapping):
        return tree
    paths = {key: f"{prefix}{key}" for key in tree}
    kept = {
        key: _without(child, gone, f"{paths[key]}.")
        for key, child in tree.items()
        if paths[key] not in gone
    }
    return {key: child for key, child in kept.items() if not isinstance(child, Mapping) or child}


def is_floating(value: Any) -> bool:
    """Tell whether an array is of a dtype that rounds."""
    return str(np.asarray(value).dtype) in UNIT_ROUNDOFF
