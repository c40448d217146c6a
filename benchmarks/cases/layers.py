"""One linear layer with LoRA, forward and backward: over shapes, ranks, precisions and tokens.

The layers without LoRA start from the merged weight ``W + s·A·B``, so their y and dx are those of
the others. ``frozen`` is no peer but the lower bound: it has no dA and dB. Full fine-tuning has
dW, from which dA and dB follow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from ..case import Case, Contestant, Work
from ..contestants import layer_jax, layer_peers, layer_torch
from ..contestants.common import jax_settings, torch_settings
from ..contestants.layer import Layer

JAX, FLAX = ("jax", "jaxlib"), ("jax", "jaxlib", "flax")

Settings = Callable[[], Mapping[str, str]]
Setup = Callable[[Layer], Work]

CONTESTANTS: tuple[tuple[str, Setup, tuple[str, ...], Settings], ...] = (
    ("lora_jax", layer_jax.rewritten, JAX, jax_settings),
    ("LoRADense", layer_jax.lora_dense, FLAX, jax_settings),
    ("LoRALinear", layer_jax.lora_linear, FLAX, jax_settings),
    ("frozen", layer_jax.frozen, JAX, jax_settings),
    ("full (JAX)", layer_jax.full, JAX, jax_settings),
    ("full (PyTorch)", layer_torch.full, ("torch",), torch_settings),
    *(
        (f"{name} {how}", functools.partial(setup, compiled=compiled), packages, torch_settings)
        for name, setup, packages in (
            ("lora_torch_ref", layer_torch.reference, ("torch",)),
            ("PEFT", layer_torch.peft, ("peft", "torch")),
        )
        for how, compiled in (("eager", False), ("compiled", True))
    ),
    ("flax.nnx.LoRA", layer_peers.flax_nnx, FLAX, jax_settings),
    ("qwix", layer_peers.qwix, ("qwix", *FLAX), jax_settings),
    ("quax", layer_peers.quax, ("quax", "equinox", *JAX), jax_settings),
    ("keras", layer_peers.keras, ("keras", *JAX), jax_settings),
)
LACKS = {"frozen": ("dA", "dB")}

# In float32 sums are taken in another order: those of 4096 products differ by up to 6e-7. In
# bfloat16 an element of W + s·A·B, x·A or y is rounded to 8 bits, here or there: up to 4e-3.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}

SMALL, SQUARE, LARGE = (512, 576, 1536), (512, 4096, 4096), (2048, 4096, 4096)
TOKENS = (1, 8, 64, 512, 4096)
RANKS = (4, 16, 64, 256)

# Steps that take this many FLOPs get half of the rounds.
LONG = 5 * 10**10


def layers() -> Iterator[Layer]:
    """Yield every layer that is a case."""
    both = Layer(*SQUARE, r=16)
    for shape in (SMALL, SQUARE, LARGE):
        for dtype in TOLERANCE:
            yield from (Layer(*shape, 16, dtype, backward) for backward in (False, True))
    others = [r for r in RANKS if r != both.r]
    for shape in (SMALL, SQUARE):
        yield from (Layer(*shape, r) for r in others)
    yield from (replace(both, r=r, backward=False) for r in (4, 256))
    yield from (replace(both, r=256, dtype="bfloat16"), Layer(*LARGE, 256))
    one = Layer(*SMALL, r=16)
    for backward in (False, True):
        others = [tokens for tokens in TOKENS if tokens != one.tokens]
        yield from (replace(one, tokens=tokens, backward=backward) for tokens in others)


def case(layer: Layer) -> Case:
    """Return the case of a layer."""
    work = "forward + backward" if layer.backward else "forward"
    precision = "float32" if layer.dtype == "float32" else f"{layer.dtype} with float32 A and B"
    group, sizes = _group(layer)
    return Case(
        name=(
            f"layer_{'fb' if layer.backward else 'f'}_"
            f"{layer.tokens}x{layer.inputs}x{layer.outputs}_r{layer.r}_{layer.dtype}"
        ),
        title=(
            f"{work} of one linear layer with LoRA, {layer.tokens} tokens, {layer.inputs} to "
            f"{layer.outputs}, r={layer.r}, {precision}"
        ),
        contestants=tuple(
            Contestant(
                name, functools.partial(setup, layer), packages, settings, LACKS.get(name, ())
            )
            for name, setup, packages, settings in CONTESTANTS
        ),
        tolerance=TOLERANCE[layer.dtype],
        needed=layer.needed,
        sizes=sizes,
        group=group,
        # A second step shows that none adds up what the first one left.
        checked=2,
        same=True,
        rounds=10 if layer.needed.flops > LONG else 20,
    )


def _group(layer: Layer) -> tuple[str, Mapping[str, int]]:
    """Return the group and the sizes: by tokens, or by rank, in float32."""
    work = "" if layer.backward else ", forward"
    shape = (layer.inputs, layer.outputs)
    if layer.dtype == "float32" and shape == SMALL[1:] and layer.r == 16:
        return f"layer tokens{work}", {"tokens": layer.tokens}
    if layer.dtype == "float32" and (layer.tokens, *shape) == SQUARE:
        return f"layer rank{work}", {"rank": layer.r}
    return "", {}


def cases() -> tuple[Case, ...]:
    """Return the cases."""
    return tuple(map(case, layers()))
