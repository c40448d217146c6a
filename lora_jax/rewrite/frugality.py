"""``frugality``: what a gradient step over the adapters costs, and what it should.

With one frozen matrix of N values a token costs 2N FLOPs forwards and 2N for the input's
gradient: 4N. Training it in full takes 2N more for ``dW``, and merging it before the product
computes ``W + s·A·B``. The report shows whether any of that is in the compiled program.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ..core import lowrank
from ..core import token_rows as rows
from ..core.adapter import IN, OUT, STACKED, Adapter, Adapters, Rows, check_fit, pick, rank
from ..core.contractions import smaller_formed
from ..core.errors import PlanError
from .flops import count
from .interpret import Record
from .planning.plan import _survey
from .sites import LOOKUP, Site
from .trace import Traced, trace
from .transform import apply, reject_unused

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Frugality:
    """The FLOPs of one gradient step over the adapters. Printing it shows a table.

    Args:
        flops: of the step, as XLA counts the program before it optimises it.
        forward: of the function without adapters.
        input_gradient: of carrying the gradient back to the first adapted weight, without
            adapters and without any ``dW``, except an author's own.
        low_rank: what the products with A and B must cost: ``2·rows·r·(in + out)`` forwards and
            twice that backwards. For narrow weights it is much beside ``in·out``.
        floor: ``4·rows·in·out`` over the products of all matrices, adapted or not.
        weight_sized: every compiled instruction that computes something of an adapted weight's
            size and that the function without adapters does not compute, such as
            ``add[64,48]``: a merged weight, a ``dW``, a zero for it.
        notes: what the figures do not cover.
    """

    flops: int
    forward: int
    input_gradient: int
    low_rank: int
    floor: int
    weight_sized: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def expected(self) -> int:
        """What the step should cost: forward, input gradient and low-rank products."""
        return self.forward + self.input_gradient + self.low_rank

    @property
    def excess(self) -> float:
        """The share that the step costs beyond what is expected."""
        return self.flops / self.expected - 1

    @property
    def over_floor(self) -> float:
        """The step's cost in units of 4N a token."""
        return self.flops / self.floor if self.floor else math.inf

    def __str__(self) -> str:
        rows = {
            "base, forward": self.forward,
            "base, input gradient": self.input_gradient,
            "low-rank products": self.low_rank,
            "expected": self.expected,
            "step": self.flops,
            "floor, 4N a token": self.floor,
        }
        base = self.forward + self.input_gradient
        needed, beyond = (100 * part / base for part in (self.low_rank, self.flops - self.expected))
        lines = [f"{name:<20}  {flops:>20,} FLOPs" for name, flops in rows.items()]
        return "\n".join(
            [
                *lines,
                "",
                f"over the base's own {base:,} FLOPs: needed by the low-rank products "
                f"{needed:+.2f} %, beyond it {beyond:+.2f} %",
                f"the step costs {100 * self.excess:+.2f} % of what is expected, "
                f"and {self.over_floor:.3f} of the floor",
                f"weight-sized: {', '.join(self.weight_sized) or 'nothing'}",
                *self.notes,
            ]
        )


def frugality(
    fn: Callable[..., Any], params: Any, adapters: Adapters, *args: Any, **kwargs: Any
) -> Frugality:
    """Report what a gradient step of ``lora(fn)(params, adapters, *args)`` costs.

    The step differentiates the sum of the outputs, which is the output itself where ``fn``
    returns a loss. Programs are compiled and read; none is run.

    Steps of a scan are all counted, where XLA's own figure has one. A ``while`` loop, whose
    number of steps is unknown, counts as one step, and of a ``cond`` the dearest branch counts;
    notes say so.

    Args:
        fn: any JAX function whose first argument is a pytree of parameters.
        params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
        adapters: likewise, as ``plan.abstract()`` makes them.
        *args: example arguments of ``fn``.
        **kwargs: example keyword arguments.

    Raises:
        AdapterError: an adapter fits no parameter.
        PlanError: ``fn`` returns nothing that could be differentiated, or uses an adapted weight
            in a way that has no rule.

    >>> import jax.numpy as jnp
    >>> from lora_jax import LoraConfig, plan
    >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
    >>> params = {"up": jnp.ones((64, 48)), "down": jnp.ones((48, 32))}
    >>> x = jnp.ones((128, 64))
    >>> adapters = plan(fn, params, LoraConfig(r=4, target_modules=["down"]), x).abstract()
    >>> report = frugality(fn, params, adapters, x)
    >>> report.floor, report.low_rank, abs(report.excess) < 0.05
    (2359296, 245760, True)
    >>> report.weight_sized
    ()
    """
    check_fit(params, adapters)
    traced, record = trace(fn, params, args, kwargs), _survey(fn, params, args, kwargs)
    reject_unused(record, adapters)
    leaves = {path: traced.operands[n] for n, path in enumerate(traced.paths)}
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    low_rank = {path: x for path, x in adapters.items() if isinstance(x, Adapter)}
    low_rank |= {
        path: jax.eval_shape(rows.pair, leaves[path], x)
        for path, x in adapters.items()
        if isinstance(x, Rows)
    }
    trained = {n: traced.operands[n] for n, path in enumerate(traced.paths) if path in adapters}

    def adapted(adapters: Adapters, operands: list[Any]) -> Any:
        return _total(apply(Record(), traced, operands, adapters))

    def plain(chosen: Mapping[int, Any], operands: list[Any]) -> Any:
        values = [chosen.get(n, value) for n, value in enumerate(operands)]
        return _total(core.jaxpr_as_fun(traced.closed)(*values))

    step, base, notes = jax.value_and_grad(adapted), jax.value_and_grad(plain), set[str]()
    forward = count(plain, {}, traced.operands)
    # What training these weights in full costs, less their own gradients.
    own = _products(record, low_rank, dense=False)
    input_gradient = count(base, trained, traced.operands) - 2 * own - forward
    # A depthwise kernel's change is formed, being smaller than what would be formed without it.
    large = {
        path: adapter
        for path, adapter in low_rank.items()
        if not any(_takes_delta(s, rank(adapter)) for s in record.sites.get(path, {}).values())
    }
    sizes = _sizes(shapes, large)
    added = Counter(weight_sized(compiled(step, dict(adapters), traced.operands), sizes))
    fed = _fed(traced, trained)
    added -= Counter(weight_sized(compiled(base if fed else plain, fed, traced.operands), sizes))
    return Frugality(
        count(step, dict(adapters), traced.operands, notes=notes),
        forward,
        input_gradient,
        _low_rank(record, low_rank),
        4 * _products(record, record.sites),
        tuple(sorted(added.elements())),
        tuple(sorted(notes | _ambiguous(record, shapes, low_rank))),
    )


def compiled(fn: Callable[..., Any], *operands: Any) -> str:
    """Return the optimised program of ``fn(*operands)``, as XLA writes it."""
    return jax.jit(fn).lower(*operands).compile().as_text() or ""


# Instructions that only move or rename what is already there.
_MOVES = {
    "parameter",
    "copy",
    "bitcast",
    "transpose",
    "reshape",
    "convert",
    "slice",
    "dynamic-slice",
    "get-tuple-element",
    "fusion",
    "call",
    "while",
    "tuple",
    "copy-start",
    "copy-done",
}
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?\S+ = \w+\[([\d,]*)\]\S* ([\w-]+)\(")


def weight_sized(program: str, shapes: Iterable[Iterable[int]]) -> list[str]:
    """Return every instruction of a compiled program that computes something of these sizes.

    Axes may come in any order, and axes of size 1 do not count.

    Args:
        program: see ``compiled``.
        shapes: of weights.

    >>> weight_sized("ROOT %sum = f32[3,2]{1,0} add(%a, %b)", [(2, 3)])
    ['add[3,2]']
    """
    sizes = {tuple(sorted(n for n in shape if n != 1)) for shape in shapes}
    found = []
    for line in program.splitlines():
        match = _INSTRUCTION.match(line)
        if match and match[2] not in _MOVES and match[1]:
            shape = tuple(sorted(int(n) for n in match[1].split(",") if n != "1"))
            if shape in sizes:
                found.append(f"{match[2]}[{match[1]}]")
    return found


def sizes_of(shape: Shape, axes: str) -> list[Shape]:
    """Return a weight's shape, and its shape in one step of a loop over its stacked axes.

    >>> sizes_of((6, 64, 48), "sio")
    [(6, 64, 48), (64, 48)]
    """
    return [shape, tuple(n for n, axis in zip(shape, axes, strict=True) if axis != STACKED)]


def _total(outs: Iterable[Any]) -> Any:
    """Return the sum of what can be differentiated of a function's outputs."""
    sums = [jnp.sum(out) for out in outs if jnp.issubdtype(out.dtype, jnp.floating)]
    if not sums:
        raise PlanError("the function returns nothing of a floating dtype to differentiate")
    wide = functools.reduce(lowrank.wider, (one.dtype for one in sums))
    return sum(one.astype(wide) for one in sums)


def _fed(traced: Traced, trained: Mapping[int, Any]) -> dict[int, Any]:
    """Return what the base is differentiated by, to see what its input gradient computes.

    These are the floating arguments, and the vectors among the frozen parameters: norms and
    biases lie all along the way of the gradient and have no matrix of their own.
    """
    return {
        n: operand
        for n, operand in enumerate(traced.operands)
        if jnp.issubdtype(operand.dtype, jnp.floating)
        and (n >= len(traced.paths) or (n not in trained and operand.ndim < 2))
    }


def _products(record: Record, paths: Iterable[str], *, dense: bool = True) -> int:
    """Return ``rows·in·out`` over these weights' products; ``dense`` for an author's ``dW`` too.

    A lookup multiplies nothing.
    """
    return sum(
        site.rows * site.work[0]
        for path in paths
        for site in record.sites.get(path, {}).values()
        if (dense or not site.dense_gradient) and site.primitive != LOOKUP
    )


def _low_rank(record: Record, adapters: Mapping[str, Adapter]) -> int:
    """Return the FLOPs of the products with A and B: ``2·rows·r·(in + out)``, three times."""
    return sum(
        6 * site.rows * _added(site, rank(adapter))
        for path, adapter in adapters.items()
        for site in record.sites.get(path, {}).values()
    )


def _added(site: Site, r: int) -> int:
    """Return how often a vector's numbers are multiplied with A's and B's at a site.

    A lookup has its row of A as it is. Each group of a convolution has x·A of its own; where it
    keeps no more channels than the rank, A·B is smaller than A for each group, and takes its place.
    """
    product, by_a, by_b = site.work
    if site.primitive == LOOKUP:
        return r * by_b
    return product if _takes_delta(site, r) else r * (site.groups * by_a + by_b)


def _takes_delta(site: Site, r: int) -> bool:
    return smaller_formed(site.groups, site.work[2], r)


def _ambiguous(
    record: Record, shapes: Mapping[str, Shape], adapters: Mapping[str, Adapter]
) -> set[str]:
    """Say which activations have the sizes of a weight, so that neither can be told by its size."""
    sizes = {tuple(sorted(size)) for size in _sizes(shapes, adapters)}
    return {
        f"{site.rows} rows of {width} values are as large as a weight: for a clear answer take "
        "another number of rows"
        for path in adapters
        for site in record.sites[path].values()
        for width in _in_and_out(shapes[path], site.letters)
        if tuple(sorted((site.rows, width))) in sizes
    }


def _sizes(shapes: Mapping[str, Shape], adapters: Mapping[str, Adapter]) -> set[Shape]:
    return {size for path, x in adapters.items() for size in sizes_of(shapes[path], x.axes)}


def _in_and_out(shape: Shape, letters: str) -> tuple[int, int]:
    return math.prod(pick(shape, letters, IN)), math.prod(pick(shape, letters, OUT))
