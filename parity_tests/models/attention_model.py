"""An encoder with PyTorch's ``nn.MultiheadAttention``, both layouts of the batch, as a model."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from lora_jax.peft.keys import HALVED
from parity_tests.models.test_torch_front import CLASS, TEXT, D, F, H, Model, T, V


class Block(nn.Module):
    """Attention to itself and an MLP, as CLIP has them; keys that are padding are masked."""

    def __init__(self, *, batch_first: bool):
        super().__init__()
        self.batch_first = batch_first
        self.norm_1, self.norm_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.MultiheadAttention(D, H, batch_first=batch_first)
        self.fc1, self.fc2 = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.norm_1(x)
        y = y if self.batch_first else y.transpose(0, 1)
        y = self.attn(y, y, y, key_padding_mask=mask, need_weights=not self.batch_first)[0]
        x = x + (y if self.batch_first else y.transpose(0, 1))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm_2(x))))


class Encoder(nn.Module):
    """Two blocks, and a query that attends to their output: query and key differ."""

    def __init__(self, config: Any):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.query = nn.Parameter(torch.randn(1, T, D))
        blocks = nn.ModuleList(Block(batch_first=n == 0) for n in range(2))
        self.encoder = nn.ModuleDict({"layers": blocks})
        self.pool = nn.ModuleDict({"attn": nn.MultiheadAttention(D, H, batch_first=True)})
        self.classifier = nn.Linear(D, 5)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
        x, mask = self.embed(input_ids), attention_mask == 0
        layers: Any = self.encoder["layers"]
        for layer in layers:
            x = layer(x, mask)
        query = self.query.expand(x.shape)
        x = self.pool["attn"](query, x, x, key_padding_mask=mask, need_weights=False)[0]
        logits = self.classifier(x.mean(1))
        loss: Any = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits)


MHA = Model(Encoder, SimpleNamespace, {}, ("attn", "fc2"), TEXT | CLASS, saved=("classifier",))


def once(gradients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return our gradients, in the file's layout, as PEFT forms them for ``out_proj``.

    PEFT computes ``W + 2s·BA`` and differentiates one of the two, so that A's is half of the true
    one; B's is half, too, and the file's layout already halves a B once more than that.
    """
    factor = {f"{HALVED}.lora_A.weight": 0.5, f"{HALVED}.lora_B.weight": 2.0}
    return {
        key: value * np.float32(next((f for end, f in factor.items() if key.endswith(end)), 1))
        for key, value in gradients.items()
    }
