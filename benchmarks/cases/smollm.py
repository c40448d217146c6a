"""A decoder of SmolLM2's shape with random weights: forward, training step, compiling.

``lora_jax`` runs the plain decoder of ``decoder`` through the rewriter, its layers as a scan and
unrolled; PEFT runs transformers' Llama. All start from the same weights and adapters and see the
same tokens; nothing is dropped.

A training step's results are the loss, the adapters after it and AdamW's running mean of their
gradients: Adam moves an element by the sign of its gradient at first, so an element whose gradient
is rounding may move the other way, while the mean shows the gradients themselves.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..case import Case, Contestant, Work, as_arrays
from ..contestants.common import jax_settings, torch_settings
from . import smollm_jax, smollm_model, smollm_torch
from .decoder import Sizes
from .smollm_model import SMOLLM2, Task

JAX = partial(Contestant, packages=("jax", "jaxlib", "optax"), settings=jax_settings)
TORCH = partial(Contestant, packages=("peft", "torch", "transformers"), settings=torch_settings)

all_logits = partial(smollm_jax.training, loss=smollm_jax.all_logits)

# By dtype. In float32 rounding in another order, through all layers and back. In bfloat16 every
# result is rounded to 2^-9 of itself, and the two sides round in other places.
TOLERANCES = {"float32": 3e-4, "bfloat16": 1e-1}


def step_case(sizes: Sizes = SMOLLM2, dtype: str = "float32") -> Case:
    """Return the training step: the whole of it, with AdamW."""
    task = Task(sizes, dtype)
    return Case(
        name=f"smollm_step_{dtype}",
        title=f"one AdamW step of {task}{'' if dtype == 'float32' else ', adapters in float32'}",
        contestants=(
            JAX("lora_jax scan", partial(smollm_jax.training, task, scan=True)),
            JAX("lora_jax unrolled", partial(smollm_jax.training, task, scan=False)),
            JAX("lora_jax scan, all logits", partial(all_logits, task, scan=True)),
            TORCH("PEFT eager", partial(smollm_torch.training, task)),
            TORCH("PEFT compiled", partial(smollm_torch.training, task, compile=True)),
        ),
        tolerance=TOLERANCES[dtype],
        needed=smollm_model.needed(task, frozen=2, low_rank=3),
        checked=3,
        warm_up=1,
        rounds=10,
    )


def forward_case(sizes: Sizes = SMOLLM2) -> Case:
    """Return the forward pass to all logits; the last token's are compared."""
    task = Task(sizes)
    return Case(
        name="smollm_forward",
        title=f"all logits of {task}",
        contestants=(
            JAX("lora_jax scan", partial(smollm_jax.forward, task, scan=True)),
            JAX("lora_jax unrolled", partial(smollm_jax.forward, task, scan=False)),
            TORCH("PEFT eager", partial(smollm_torch.forward, task)),
            TORCH("PEFT compiled", partial(smollm_torch.forward, task, compile=True)),
        ),
        tolerance=TOLERANCES["float32"],
        needed=smollm_model.needed(task, frozen=1, low_rank=1),
        checked=2,
        warm_up=1,
        rounds=10,
    )


def full_case(sizes: Sizes = SMOLLM2) -> Case:
    """Return LoRA's step beside full fine-tuning's, which starts from the merged weights.

    After the first step they are different models, so its loss alone is compared.
    """
    task = Task(sizes)
    return Case(
        name="smollm_step_full",
        title=f"one AdamW step of {task}, beside training all weights; first losses compared",
        contestants=(
            JAX("lora_jax scan", partial(_loss_alone, task)),
            JAX("full fine-tuning, JAX", partial(smollm_jax.full, task)),
            TORCH("full fine-tuning, PyTorch", partial(smollm_torch.full, task)),
        ),
        tolerance=TOLERANCES["float32"],
        checked=1,
        same=True,
        warm_up=1,
        rounds=10,
    )


def compile_case(sizes: Sizes = SMOLLM2) -> Case:
    """Return the way from a function to its first loss: tracing, compiling and one step.

    ``compile_seconds`` has the compiler's part alone, for those who can compile ahead of time.
    """
    task = Task(sizes)
    return Case(
        name="smollm_compile",
        title=f"compiling the training step of {task}, and taking it once",
        contestants=(
            JAX("lora_jax scan", partial(smollm_jax.compiling, task, scan=True)),
            JAX("lora_jax unrolled", partial(smollm_jax.compiling, task, scan=False)),
            TORCH("PEFT compiled", partial(smollm_torch.compiling, task)),
        ),
        tolerance=TOLERANCES["float32"],
        checked=1,
        same=True,
        warm_up=0,
        # Minutes each for some.
        rounds=3,
        memory=False,
    )


def cases() -> tuple[Case, ...]:
    """Return the cases."""
    return (
        forward_case(),
        step_case(),
        step_case(dtype="bfloat16"),
        full_case(),
        compile_case(),
    )


def _loss_alone(task: Task) -> Work:
    return replace(smollm_jax.training(task, scan=True), read=as_arrays)
