"""Level 1 of dropout: the mask that JAX drew is given to PyTorch, which must compute the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..reports.checks import Check
from ..tensors import Tensors
from ..verdicts import UNIT_ROUNDOFF, TensorVerdict, Vacuous, judge
from . import lora_oracle
from .cases import ALPHA, SHAPES, random_case
from .lora_oracle import Case

RATE = 0.3
SHAPE = SHAPES[1]


@functools.cache
def rewriter() -> Callable[..., Any]:
    """Return ``x @ w + bias`` under the rewriter, compiled."""
    import jax

    from ... import Adapter, lora

    def fn(params: Any, x: Any) -> Any:
        return x @ params["kernel"] + params["bias"]

    @functools.partial(jax.jit, static_argnames="scale")
    def step(pair: Any, params: Any, x: Any, seed: Any, *, scale: float) -> Any:
        adapter = Adapter(pair["dA"], pair["dB"], scale, dropout=RATE)
        return lora(fn)(params, {"kernel": adapter}, x, dropout_key=jax.random.key(seed))

    return step


@functools.cache
def lora_dense() -> Callable[..., Any]:
    """Return ``linen.LoRADense``, whose key comes from the rng ``"dropout"``, compiled."""
    import jax

    from ... import linen

    @functools.partial(jax.jit, static_argnames="scale")
    def step(pair: Any, params: Any, x: Any, seed: Any, *, scale: float) -> Any:
        config: Any = dict(r=len(pair["dB"]), lora_alpha=scale * len(pair["dB"]))
        features = params["kernel"].shape[1]
        layer = linen.LoRADense(features, lora_dropout=RATE, deterministic=False, **config)
        variables = {"params": params, "lora": {"lora_a": pair["dA"], "lora_b": pair["dB"]}}
        return layer.apply(variables, x, rngs={"dropout": jax.random.key(seed)})

    return step


SIDES = {"rewriter": rewriter, "LoRADense": lora_dense}


def masked(side: str, seed: int) -> Iterator[TensorVerdict]:
    """Hold y and its gradients to PEFT's layer with the same mask."""
    case = random_case(SHAPE, seed)
    lora_oracle.refuse_vacuous(case)
    got, kept = _run(SIDES[side](), case, seed)
    share, deviation = kept.mean(), (RATE * (1 - RATE) / kept.size) ** 0.5
    if not abs(share - (1 - RATE)) < 5 * deviation:
        raise AssertionError(f"dropout of {RATE} keeps {share:.3f} of the input")
    if kept.all() or not kept.any():
        raise Vacuous("the mask keeps everything or nothing")
    mask = (kept / (1 - RATE)).astype(np.float32)
    truth, cond = _truth(case, kept / (1 - RATE))
    reference = _pefts(case, mask)
    for name, value in truth.items():
        unit = UNIT_ROUNDOFF["float32"]
        yield judge(name, got[name], reference[name], value, unit_roundoff=unit, cond=cond[name])


def _run(fn: Callable[..., Any], case: Case, seed: int) -> tuple[Tensors, NDArray[np.bool_]]:
    """Return y, dx, dA, dB and which elements of x were kept."""
    import jax
    import jax.numpy as jnp

    pair = {"dA": jnp.asarray(case.a), "dB": jnp.asarray(case.b)}
    params = {"kernel": jnp.asarray(case.w), "bias": jnp.asarray(case.bias)}

    def outputs(pair: Any, x: Any) -> Any:
        return fn(pair, params, x, np.uint32(seed), scale=case.scale)

    y, pull = jax.vjp(outputs, pair, jnp.asarray(case.x))
    gradients, dx = pull(jnp.asarray(case.g))
    found = {name: np.asarray(v) for name, v in {"y": y, "dx": dx, **gradients}.items()}
    # With W = 0 and A and B the identity, the output is what dropout left of an input of ones.
    size = case.x.shape[1]
    eye = {"dA": jnp.eye(size), "dB": jnp.eye(size)}
    nothing = {"kernel": jnp.zeros((size, size)), "bias": jnp.zeros(size)}
    left = fn(eye, nothing, jnp.ones(case.x.shape), np.uint32(seed), scale=1.0)
    return found, np.asarray(left) != 0


def _truth(case: Case, mask: NDArray[np.float64]) -> tuple[Tensors, dict[str, float]]:
    """Return the sum of the base layer and a low-rank one of the dropped-out input."""
    wide = {name: getattr(case, name).astype(np.float64) for name in ("x", "w", "bias", "a", "b")}
    base = Case(**wide, g=case.g.astype(np.float64), scale=0.0)
    path = Case(
        x=wide["x"] * mask,
        w=np.zeros_like(wide["w"]),
        bias=np.zeros_like(wide["bias"]),
        a=wide["a"],
        b=wide["b"],
        g=base.g,
        scale=case.scale,
    )

    def added(of: Callable[[Case], Tensors]) -> Tensors:
        first, second = of(base), of(path)
        return second | {
            "y": first["y"] + second["y"],
            "dx": first["dx"] + second["dx"] * mask,
        }

    truth, sums = added(lora_oracle.truth), added(lora_oracle.majorant)
    return truth, {n: float(np.linalg.norm(sums[n]) / np.linalg.norm(truth[n])) for n in truth}


def _pefts(case: Case, mask: NDArray[np.float32]) -> Tensors:
    import torch

    from . import torch_layers

    side = functools.partial(_with_mask, torch.from_numpy(mask))
    return torch_layers.side(side)(case, ALPHA)


def _with_mask(mask: Any, linear: Any, case: Case, *options: Any) -> Any:
    import torch

    from .torch_layers import peft_linear

    class Injected(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x * mask

    found = peft_linear(linear, case, *options)
    found[0].lora_dropout["default"] = Injected()
    return found


CHECKS = tuple(
    Check(f"{side}/peft dropout", 1, partial(masked, side), ("torch", "peft")) for side in SIDES
)
