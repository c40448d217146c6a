"""Level 1 beyond linear layers: what there is, and how its numbers are drawn. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..tensors import Tensors
from .lora_oracle import Case
from .lowering import Lowered, gathered, windows

ALPHA = 16


@dataclass(frozen=True)
class Kind:
    """A layer with one low-rank pair.

    Args:
        name: of the kind.
        op: ``"linear"``, ``"embedding"``, ``"conv"`` or ``"experts"``.
        x: shape of the input; of the ids for an embedding.
        weight: shape of W as PyTorch holds it.
        axes: a letter for each axis of W, as in ``Adapter.axes``.
        torch: the PyTorch side: ``"peft"``, or ``"formula"`` where PEFT computes another one.
        options: ``stride``, ``padding`` and ``dilation`` of a convolution.
        dora: whether it has a magnitude.
        rank: r.
    """

    name: str
    op: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    axes: str
    torch: str = "peft"
    options: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dora: bool = False
    rank: int = 6

    def __str__(self) -> str:
        return self.name

    @property
    def fan_in(self) -> int:
        """The size of what is summed over."""
        sizes = zip(self.axes, self.weight, strict=True)
        return int(np.prod([size for axis, size in sizes if axis == "i"]))

    @property
    def out(self) -> int:
        """The number of outputs."""
        return self.weight[self.axes.index("o")]

    @property
    def biased(self) -> bool:
        """Whether the layer has a bias."""
        return self.op not in ("embedding", "experts")


@dataclass(frozen=True)
class Drawn:
    """The numbers of one run of a kind.

    Args:
        kind: what they are for.
        x: the input, as the layer takes it.
        lowered: the same layer as linear ones, whose W, A, B, m and g are the numbers.
    """

    kind: Kind
    x: NDArray[Any]
    lowered: Lowered

    @property
    def scale(self) -> float:
        """The scale of the low-rank path."""
        return self.lowered.cases[0].scale

    @property
    def weight(self) -> NDArray[Any]:
        """W, as PyTorch holds it."""
        w = np.stack([case.w for case in self.lowered.cases])
        return (w if self.kind.axes[-1] == "o" else w.swapaxes(1, 2)).reshape(self.kind.weight)

    @property
    def cotangent(self) -> NDArray[Any]:
        """The cotangent of y in the layer's own layout."""
        g = np.concatenate([case.g for case in self.lowered.cases])
        if self.kind.op != "conv":
            return g.reshape(*self._rows_shape, self.kind.out)
        return np.moveaxis(g.reshape(*self._rows_shape, self.kind.out), -1, 1)

    def rows(self, y: NDArray[Any]) -> NDArray[Any]:
        """Return y, which is in the layer's own layout, as rows of outputs."""
        return (np.moveaxis(y, 1, -1) if self.kind.op == "conv" else y).reshape(-1, self.kind.out)

    @property
    def _rows_shape(self) -> tuple[int, ...]:
        if self.kind.op != "conv":
            return self.x.shape if self.kind.op == "embedding" else self.x.shape[:-1]
        return (self.x.shape[0], *positions(self.kind))


def positions(kind: Kind) -> tuple[int, ...]:
    """Return how often a convolution is applied along each axis.

    >>> positions(KINDS["Conv1d"])
    (6,)
    """
    sizes = zip(kind.x[2:], kind.weight[2:], *geometry(kind), strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)


def geometry(kind: Kind) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return stride, padding and dilation of a convolution."""
    n = len(kind.weight) - 2
    defaults = {"stride": (1,) * n, "padding": (0,) * n, "dilation": (1,) * n}
    stride, padding, dilation = ({**defaults, **kind.options}[name] for name in defaults)
    return stride, padding, dilation


def random_draw(kind: Kind, seed: int) -> Drawn:
    """Return float32 normals, with alpha 16 and DoRA's magnitude beside the norm."""
    rng = np.random.default_rng(seed)

    def normal(std: float, *shape: int) -> NDArray[Any]:
        return (std * rng.standard_normal(shape)).astype(np.float32)

    # A row of an embedding is looked up, not summed over.
    std = 1.0 if kind.op == "embedding" else kind.fan_in**-0.5
    r = kind.rank
    numbers = {
        "w": lambda: normal(std, kind.fan_in, kind.out),
        "bias": lambda: normal(1.0, kind.out),
        "a": lambda: normal(std, kind.fan_in, r),
        "b": lambda: normal(0.3, r, kind.out),
        "m": lambda: rng.uniform(0.5, 2.0, kind.out).astype(np.float32),
        "g": lambda rows: normal(1.0, rows, kind.out),
        "x": lambda: normal(1.0, *kind.x),
    }
    return _drawn(kind, rng, numbers, ALPHA / r)


def exact_draw(kind: Kind, seed: int) -> Drawn:
    """Return small integers and the scale 1/2: every order of summation is exact."""
    rng = np.random.default_rng(seed)

    def integers(*shape: int) -> NDArray[Any]:
        return rng.integers(-1, 2, shape).astype(np.float32)

    numbers = {
        "w": lambda: integers(kind.fan_in, kind.out),
        "bias": lambda: integers(kind.out),
        "a": lambda: integers(kind.fan_in, kind.rank),
        "b": lambda: integers(kind.rank, kind.out),
        "g": lambda rows: integers(rows, kind.out),
        "x": lambda: integers(*kind.x),
    }
    return _drawn(kind, rng, numbers, 0.5)


def _drawn(kind: Kind, rng: Any, numbers: Mapping[str, Any], scale: float) -> Drawn:
    reads = None
    if kind.op == "embedding":
        x = rng.integers(0, kind.fan_in, kind.x).astype(np.int32)
        inputs = [np.eye(kind.fan_in, dtype=np.float32)[x.ravel()]]
    else:
        x = numbers["x"]()
        inputs = list(x) if kind.op == "experts" else [x.reshape(-1, kind.x[-1])]
    if kind.op == "conv":
        reads = windows(kind.x, kind.weight[2:], *geometry(kind))
        inputs = [gathered(x, reads)]

    def case(rows: NDArray[Any]) -> Case:
        w, bias, a, b = (numbers[name]() for name in ("w", "bias", "a", "b"))
        bias = bias if kind.biased else np.zeros_like(bias)
        m = numbers["m"]() if kind.dora else None
        return Case(rows, w, bias, a, b, numbers["g"](len(rows)), scale, m)

    return Drawn(kind, x, Lowered(tuple(map(case, inputs)), reads, x.shape))


def _table() -> dict[str, Kind]:
    strided = {"stride": (2, 1), "padding": (1, 2)}
    plain = (
        Kind("Conv1D of transformers", "linear", (5, 17), (17, 11), "io"),
        Kind("Embedding", "embedding", (3, 5), (29, 11), "io"),
        Kind(
            "Conv1d",
            "conv",
            (2, 5, 11),
            (7, 5, 3),
            "oii",
            "peft",
            {"stride": (2,), "padding": (1,)},
        ),
        Kind("Conv2d", "conv", (2, 4, 7, 6), (9, 4, 3, 2), "oiii", "peft", strided),
    )
    dora = tuple(
        Kind(f"DoRA {k.name}", k.op, k.x, k.weight, k.axes, k.torch, k.options, True)
        for k in (Kind("Linear", "linear", (5, 17), (11, 17), "oi"), *plain)
    )
    own = (
        Kind("DoRA Linear, reference", "linear", (5, 17), (11, 17), "oi", "reference", dora=True),
        Kind(
            "Conv2d dilated",
            "conv",
            (2, 4, 9, 8),
            (9, 4, 3, 2),
            "oiii",
            "formula",
            strided | {"dilation": (2, 3)},
        ),
        Kind("experts", "experts", (3, 5, 17), (3, 17, 11), "sio", "formula"),
    )
    return {kind.name: kind for kind in (*plain, *own, *dora)}


KINDS = _table()


def gradients(drawn: Drawn, found: Mapping[str, Any]) -> Tensors:
    """Return a side's tensors as ``lowering.truth`` lays them out; an embedding has no dx."""
    y = {"y": drawn.rows(np.asarray(found["y"]))}
    rest = {name: np.asarray(value) for name, value in found.items() if name != "y"}
    if drawn.kind.op == "experts":
        rest["dx"] = rest["dx"].reshape(-1, drawn.kind.fan_in)
    return y | rest
