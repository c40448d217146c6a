"""PyTorch's side of the whole models: tiny random models of transformers, and PEFT on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import peft
import torch
import transformers

from ..tensors import Tensors

B, T, V, D, F, H, L = 2, 7, 41, 21, 37, 3, 2
IDS = np.random.default_rng(0).integers(0, V, (B, T))
MASK = (np.arange(T) < [[5], [T]]).astype(np.int32)
TEXT = dict(input_ids=IDS, attention_mask=MASK)
NEXT = TEXT | dict(labels=np.where(MASK, IDS, -100))
CLASS = dict(labels=np.array([3, 1]))
IMAGE = dict(pixel_values=np.random.default_rng(0).normal(size=(B, 3, 10, 15)).astype(np.float32))
COMMON = dict(attn_implementation="eager", initializer_range=0.3)
LAYERS = dict(hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H)
DECODER = LAYERS | dict(vocab_size=V, num_key_value_heads=1, head_dim=10, use_cache=False)


@dataclass(frozen=True)
class Model:
    """A transformers model with a random configuration, and what is done to it.

    Args:
        readable: makes the module one that JAX can trace, where it is not.
        parameters: what ``target_parameters`` may name.
    """

    model: Callable[[Any], Any]
    config: Callable[..., Any]
    sizes: Mapping[str, Any]
    targets: tuple[str, ...]
    batch: Mapping[str, np.ndarray]
    saved: tuple[str, ...] | None = None
    conv1d: bool = False
    readable: Callable[[Any], Any] = lambda module: module
    parameters: tuple[str, ...] = ()

    def make(self) -> Any:
        """Return the model with its random weights, the same at every call."""
        torch.manual_seed(0)
        return self.model(self.config(**self.sizes, **COMMON))

    def peft_load(self, directory: Any, **kwargs: Any) -> Any:
        """Return PEFT's model with an adapter read from a directory."""
        with warnings.catch_warnings():
            if self.conv1d:
                # PEFT finds out by itself that GPT-2 keeps its weights as (in, out), and says so.
                warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
            return peft.PeftModel.from_pretrained(self.make(), directory, **kwargs).eval()


LLAMA = Model(
    transformers.LlamaForCausalLM,
    transformers.LlamaConfig,
    DECODER,
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    NEXT,
)

MODELS = {
    "llama": LLAMA,
    "qwen3": Model(
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        DECODER | dict(tie_word_embeddings=True),
        ("q_proj", "v_proj", "down_proj"),
        NEXT,
    ),
    "bert": Model(
        transformers.BertForSequenceClassification,
        transformers.BertConfig,
        LAYERS | dict(vocab_size=V, num_labels=5),
        ("query", "value"),
        TEXT | CLASS,
        saved=("classifier",),
    ),
    "gpt2": Model(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        dict(vocab_size=V, n_embd=D, n_inner=F, n_layer=L, n_head=H, use_cache=False),
        ("c_attn", "c_proj", "c_fc"),
        NEXT,
        conv1d=True,
    ),
    "vit": Model(
        transformers.ViTForImageClassification,
        transformers.ViTConfig,
        LAYERS | dict(image_size=(10, 15), patch_size=5, num_labels=5),
        ("query", "value", "intermediate.dense"),
        IMAGE | CLASS,
    ),
}

DEEP_LLAMA = replace(LLAMA, sizes=DECODER | dict(num_hidden_layers=8))


def outputs(model: Any, batch: Mapping[str, Any], mode: Any = nullcontext) -> Tensors:
    """Return PyTorch's loss and logits."""
    return copied(forward(model, batch, mode))


def outputs_and_gradients(model: Any, batch: Mapping[str, Any], mode: Any = nullcontext) -> Tensors:
    """Return PyTorch's loss and logits, and the gradient of every trained tensor by PEFT's name."""
    out = forward(model, batch, mode)
    out["loss"].backward()
    trained: dict[str, Any] = trainable(model)
    return copied(out | {name: p.grad for name, p in trained.items()})


def forward(
    model: Any, batch: Mapping[str, Any], mode: Any = nullcontext
) -> dict[str, torch.Tensor]:
    """Return the loss and logits, in the dtype of the model's parameters."""
    dtype = next(model.parameters()).dtype
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    with mode():
        out = model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()})
    return {"loss": out.loss, "logits": out.logits}


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return what PEFT trains, by the names of its file."""
    said_otherwise = {
        ".modules_to_save.default": "",
        ".default": "",
        "lora_magnitude_vector.weight": "lora_magnitude_vector",
    }

    def in_file(name: str) -> str:
        for inside, outside in said_otherwise.items():
            name = name.replace(inside, outside)
        return name

    return {in_file(n): p for n, p in model.named_parameters() if p.requires_grad}


def copied(values: Mapping[str, torch.Tensor]) -> Tensors:
    """Return tensors as numpy arrays of their own."""
    return {name: value.detach().numpy().copy() for name, value in values.items()}
