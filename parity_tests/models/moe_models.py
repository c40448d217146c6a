"""Mixtures of experts, tiny: transformers' models, and Mixtral's and Qwen's without a hidden shape.

Transformers gathers the tokens of each expert, whose number depends on the data, so that JAX
cannot trace it. ``Dense`` blocks let every expert see every token and weight what it says by the
router, with the same parameters under the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from parity_tests.models.test_torch_front import DECODER, NEXT, Model


def dense(block: Any, hidden: torch.Tensor, normalised: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the experts of a block say of ``(tokens, hidden)``, and the router's scores."""
    scores = block.gate(hidden)
    weights = F.softmax(scores, dim=1, dtype=torch.float)
    values, chosen = torch.topk(weights, block.top_k, dim=-1)
    if normalised:
        values = values / values.sum(dim=-1, keepdim=True)
    values = torch.zeros_like(weights).scatter(1, chosen, values).to(hidden.dtype)
    said = torch.stack([expert(hidden) for expert in block.experts], dim=1)
    return (said * values[:, :, None]).sum(dim=1), scores


class DenseMixtralBlock(MixtralSparseMoeBlock):
    """Mixtral's block with every expert at every token."""

    def forward(self, hidden_states: torch.Tensor) -> Any:
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        out, scores = dense(self, hidden, normalised=True)
        return out.reshape(hidden_states.shape), scores


class DenseQwen2MoeBlock(Qwen2MoeSparseMoeBlock):
    """Qwen2-MoE's block with every expert at every token."""

    def forward(self, hidden_states: torch.Tensor) -> Any:
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        out, scores = dense(self, hidden, self.norm_topk_prob)
        gate = torch.sigmoid(self.shared_expert_gate(hidden))
        return (out + gate * self.shared_expert(hidden)).reshape(hidden_states.shape), scores


DENSE: Mapping[type, type] = {
    MixtralSparseMoeBlock: DenseMixtralBlock,
    Qwen2MoeSparseMoeBlock: DenseQwen2MoeBlock,
}


def densely_routed(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module with dense blocks in it: the same parameters under the same names."""
    for part in module.modules():
        part.__class__ = DENSE.get(type(part), type(part))
    return module


ROUTED = dict(num_experts_per_tok=2)
EXPERTS = ROUTED | dict(num_local_experts=3, intermediate_size=11)
ATTENTION = ("q_proj", "v_proj")
STACKS = ("experts.down_proj", "experts.gate_up_proj")

MODELS = {
    "mixtral": Model(
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        DECODER | EXPERTS,
        (*ATTENTION, "gate", "w1", "w2", "w3"),
        NEXT,
        readable=densely_routed,
    ),
    "qwen2_moe": Model(
        transformers.Qwen2MoeForCausalLM,
        transformers.Qwen2MoeConfig,
        DECODER
        | ROUTED
        | dict(
            hidden_size=24,
            head_dim=8,
            num_experts=3,
            moe_intermediate_size=11,
            shared_expert_intermediate_size=12,
        ),
        (*ATTENTION, "gate", "up_proj", "down_proj"),
        NEXT,
        readable=densely_routed,
    ),
    "gpt_oss": Model(
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        DECODER | EXPERTS,
        ATTENTION,
        NEXT,
        parameters=STACKS,
    ),
    "llama4": Model(
        transformers.Llama4ForCausalLM,
        transformers.Llama4TextConfig,
        DECODER
        | EXPERTS
        | dict(intermediate_size_mlp=13, interleave_moe_layer_step=1, attention_chunk_size=8192),
        (*ATTENTION, "shared_expert.up_proj"),
        NEXT,
        parameters=STACKS,
    ),
}
