"""``LeafPlan``: what LoRA does to one parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...core import paths
from ...core.adapter import (
    IN,
    OUT,
    Adapter,
    Rows,
    a_shape,
    b_shape,
    magnitude_shape,
    part_shape,
    rows_shape,
)

TRAINED = "trained in full"


@dataclass(frozen=True)
class LeafPlan:
    """The decision for one parameter.

    Args:
        path: where it is.
        shape: its shape.
        why: ``"adapted"``, ``"trained in full"``, or the reason why it stays frozen.
        r: the rank; 0 unless adapted.
        scale: the adapter's scale.
        axes: the adapter's ``axes``, read from the primitives that use the weight.
        sites: how many primitives use the weight.
        dense_gradient: an author's own derivative forms the full ``dW`` of this weight.
        primitives: the primitives that use the weight, each once.
        window: the axes that slide over the input, as those of a convolution's kernel do.
        groups: how many groups of channels a convolution keeps apart.
        materialized: why ``W + s·A·B`` is formed; empty where it is not.
        columns: the range of the first ``o`` axis that is adapted; None for all of it.
        dora: whether DoRA's magnitude is trained beside A and B.
        biased: whether a bias is trained beside A and B.
        rows: the rows that are trained as they are; empty for none.
        masked: whether the adapter acts on a part of the tokens only, as an aLoRA does.
        owner: the module by whose name patterns mean it, where that is not its own: that of
            PyTorch's attention for its ``out_proj``.
    """

    path: str
    shape: tuple[int, ...]
    why: str = ""
    r: int = 0
    scale: float | int = 0.0
    axes: str = ""
    sites: int = 0
    dense_gradient: bool = False
    primitives: tuple[str, ...] = ()
    window: frozenset[int] = frozenset()
    groups: int = 1
    materialized: str = ""
    columns: tuple[int, int] | None = None
    dora: bool = False
    biased: bool = False
    rows: tuple[int, ...] = ()
    masked: bool = False
    owner: str = ""

    @property
    def module(self) -> str:
        """The module by whose name the configuration's patterns mean the parameter."""
        return self.owner or paths.module_of(self.path)

    @property
    def name(self) -> str:
        """The adapter's name: the path, and the range of columns if there is one."""
        return paths.part_name(self.path, self.columns)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of the part of the parameter that is adapted."""
        return part_shape(self.shape, self.axes, self.columns)

    @property
    def looked_up(self) -> bool:
        """Whether the weight's rows are looked up, as those of an embedding are."""
        return "gather" in self.primitives

    @property
    def tied(self) -> bool:
        """Whether its rows are looked up and another product uses it, as with a tied head."""
        return self.looked_up and len(self.primitives) > 1

    @property
    def row_axis(self) -> int:
        """The axis that ``rows`` count along: what an embedding sums over, what a head keeps."""
        return self.axes.index(IN if self.looked_up else OUT)

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """The shape of the values of ``rows``."""
        return rows_shape(self.shape, self.row_axis, len(self.rows))

    def with_rows(self, values: Any) -> Rows:
        """Return the rows that these values are."""
        return Rows(values, self.rows, self.axes, self.row_axis)

    @property
    def adapted(self) -> bool:
        """Whether the parameter gets A and B."""
        return self.r > 0

    @property
    def a_shape(self) -> tuple[int, ...]:
        """The shape of A."""
        return a_shape(self.part_shape, self.axes, self.r)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """The shape of B."""
        return b_shape(self.part_shape, self.axes, self.r)

    @property
    def magnitude_shape(self) -> tuple[int, ...]:
        """The shape of DoRA's magnitude."""
        return magnitude_shape(self.shape, self.axes)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """The shape of the adapter's bias."""
        return magnitude_shape(self.shape, self.axes)

    def adapter(
        self,
        a: Any,
        b: Any,
        dropout: int | float = 0.0,
        magnitude: Any = None,
        bias: Any = None,
    ) -> Adapter:
        """Return the adapter that this A and B are, with DoRA's magnitude or a bias."""
        formed, fixed = bool(self.materialized), (self.scale, self.axes, dropout)
        return Adapter(a, b, *fixed, formed, self.columns, magnitude, bias, self.masked)

    @property
    def trained(self) -> int:
        """How many values are trained for this parameter."""
        if self.adapted:
            magnitude = math.prod(self.magnitude_shape) if self.dora else 0
            bias = math.prod(self.bias_shape) if self.biased else 0
            return math.prod(self.a_shape) + math.prod(self.b_shape) + magnitude + bias
        if self.rows:
            return math.prod(self.rows_shape)
        return math.prod(self.shape) if self.why == TRAINED else 0
