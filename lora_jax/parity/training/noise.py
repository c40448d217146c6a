"""``noise_floor``: how far one framework is from itself when only the order of its sums changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...core.errors import ParityError
from ..sides import jax_side
from ..sides.jax_order import reordered
from ..tensors import Tensors, flatten
from ..verdicts import UNIT_ROUNDOFF, norm, rel_l2

SIDES = ("jax", "torch")


def noise_floor(
    fn: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    side: str = "jax",
    wrt: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    seed: int = 0,
) -> dict[str, float]:
    """Return how much the order of summation alone changes each output and gradient.

    ``sqrt(mean over seeds of ‖y_seed − y‖² / ‖y‖²)``. Where JAX and PyTorch compute the same, the
    distance between them is of this size: in float32 their difference is one of order.

    Args:
        fn: a JAX function, or PyTorch's of tensors; takes the inputs as keywords.
        inputs: numpy arrays or nested containers of them by keyword.
        side: ``"jax"`` or ``"torch"``.
        wrt: the names of the inputs to derive by; by default all of floating dtype.
        seeds: one run in another order for each.
        seed: of the cotangents that the outputs are multiplied with.

    Returns:
        A number for each output and each gradient ``d<name>``; 0 where no sum was reordered.

    Raises:
        ParityError: no such side, or no seeds.

    >>> x, w = np.linspace(-1, 1, 600, dtype="f4").reshape(2, 300), np.ones((300, 4), "f4") / 3
    >>> floor = noise_floor(lambda x, w: x @ w, {"x": x, "w": w})
    >>> 0 < floor["y"] < 1e-5, list(floor)
    (True, ['y', 'dw', 'dx'])
    """
    if side not in SIDES or not seeds:
        raise ParityError(f"got side {side!r} and seeds {tuple(seeds)}, wanted one of {SIDES}")
    leaves = jax_side.leaves(inputs) if side == "jax" else flatten(inputs)
    floating = [name for name, leaf in leaves.items() if str(leaf.dtype) in UNIT_ROUNDOFF]
    run = partial(_RUNS[side], fn, inputs, floating if wrt is None else list(wrt))
    rng = np.random.default_rng(seed)
    outputs = _RUNS[side](fn, inputs, (), None, None)
    cotangents = {n: rng.integers(-2, 3, y.shape).astype(y.dtype) for n, y in outputs.items()}
    plain = {n: value.astype(np.float64) for n, value in run(cotangents, None).items()}
    others = [run(cotangents, order) for order in seeds]

    def floor(name: str) -> float:
        if not norm(plain[name]):
            return 0.0
        return float(np.sqrt(np.mean([rel_l2(one[name], plain[name]) ** 2 for one in others])))

    return {name: floor(name) for name in plain}


def _jax(fn: Any, inputs: Any, wrt: Any, cotangents: Any, order: int | None) -> Tensors:
    around = None if order is None else partial(reordered, seed=order)
    return jax_side.run(fn, inputs, wrt, cotangents, around=around)


def _torch(fn: Any, inputs: Any, wrt: Any, cotangents: Any, order: int | None) -> Tensors:
    from ..sides import torch_order, torch_side

    if order is None:
        return torch_side.run(fn, inputs, wrt, cotangents)
    with torch_order.Reordered(order):
        return torch_side.run(fn, inputs, wrt, cotangents)


_RUNS: dict[str, Callable[..., Tensors]] = {"jax": _jax, "torch": _torch}
