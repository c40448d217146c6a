"""Names in JAX and in PyTorch, one table a family: BERT, BART, ViT, CLIP, Whisper, Llama.

``lora_jax.peft.names.naming`` explains the patterns. The Flax models of ``transformers`` have
PyTorch's module names; their tables refuse what is not of the family, and ``stacked(TABLE)`` is
for their layers stacked. A table holds names and no values: a model whose kernels are permuted or
scaled against PyTorch's, as Llama's in Meta's order of RoPE are, needs more than a table.
"""

from __future__ import annotations

from .naming import Fused


def _same(*patterns: str) -> dict[str, str]:
    """Return rows whose two sides are the same names."""
    plain = {}
    for pattern in patterns:
        fields = [part.split("}")[0] for part in pattern.split("{")[1:]]
        torch = pattern
        for field in fields:
            torch = torch.replace(f"{{{field}}}", f"{{{field.split(':')[0]}}}")
        plain[pattern] = torch
    return plain


GPT2 = _same(
    "{model:transformer.|}{p:wte|wpe|ln_f}",
    "{model:transformer.|}h.{layer}.{p:attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj|ln_1|ln_2}",
    "{model:transformer.|}h.{layer}.{p:crossattention.q_attn|crossattention.c_attn}",
    "{model:transformer.|}h.{layer}.{p:crossattention.c_proj|ln_cross_attn}",
    "lm_head",
)

BERT = _same(
    "{model:bert.|}embeddings.{p:word|position|token_type}_embeddings",
    "{model:bert.|}embeddings.LayerNorm",
    "{model:bert.|}encoder.layer.{layer}.attention.self.{p:query|key|value}",
    "{model:bert.|}encoder.layer.{layer}.{p:attention.output.|output.|}{q:dense|LayerNorm}",
    "{model:bert.|}encoder.layer.{layer}.intermediate.dense",
    "{model:bert.|}pooler.dense",
    "{p:classifier|qa_outputs|cls.seq_relationship}",
    "cls.predictions.{p:transform.dense|transform.LayerNorm|decoder}",
)

T5 = _same(
    "{p:shared|lm_head}",
    "{side:encoder|decoder}.embed_tokens",
    "{side:encoder|decoder}.final_layer_norm",
    "{side:encoder|decoder}.block.{layer}.layer.{n}.{a:Self|EncDec}Attention.{p:q|k|v|o}",
    "{side:encoder|decoder}.block.{layer}.layer.{n}.SelfAttention.relative_attention_bias",
    "{side:encoder|decoder}.block.{layer}.layer.{n}.DenseReluDense.{p:wi|wi_0|wi_1|wo}",
    "{side:encoder|decoder}.block.{layer}.layer.{n}.layer_norm",
)

BART = _same(
    "{model:model.|}shared",
    "{model:model.|}{side:encoder|decoder}.embed_{p:tokens|positions}",
    "{model:model.|}{side:encoder|decoder}.{p:layernorm_embedding|layer_norm}",
    "{model:model.|}{side:encoder|decoder}.layers.{layer}.{a:self_attn|encoder_attn}"
    ".{p:q_proj|k_proj|v_proj|out_proj}",
    "{model:model.|}{side:encoder|decoder}.layers.{layer}.{p:fc1|fc2}",
    "{model:model.|}{side:encoder|decoder}.layers.{layer}"
    ".{p:self_attn|encoder_attn|final}_layer_norm",
    "lm_head",
    "classification_head.{p:dense|out_proj}",
)

VIT = _same(
    "{model:vit.|}embeddings.patch_embeddings.projection",
    "{model:vit.|}encoder.layer.{layer}.attention.attention.{p:query|key|value}",
    "{model:vit.|}encoder.layer.{layer}.{p:attention.output|intermediate|output}.dense",
    "{model:vit.|}encoder.layer.{layer}.layernorm_{p:before|after}",
    "{model:vit.|}layernorm",
    "{model:vit.|}pooler.dense",
    "classifier",
)

CLIP = _same(
    "text_model.embeddings.{p:token|position}_embedding",
    "vision_model.embeddings.{p:patch|position}_embedding",
    "{side:text|vision}_model.encoder.layers.{layer}.self_attn.{p:q_proj|k_proj|v_proj|out_proj}",
    "{side:text|vision}_model.encoder.layers.{layer}.{p:mlp.fc1|mlp.fc2|layer_norm1|layer_norm2}",
    "text_model.final_layer_norm",
    "vision_model.{p:pre_layrnorm|post_layernorm}",
    "{p:text|visual}_projection",
)

WHISPER = _same(
    "{model:model.|}encoder.conv{n}",
    "{model:model.|}{side:encoder|decoder}.embed_{p:tokens|positions}",
    "{model:model.|}{side:encoder|decoder}.layer_norm",
    "{model:model.|}{side:encoder|decoder}.layers.{layer}.{a:self_attn|encoder_attn}"
    ".{p:q_proj|k_proj|v_proj|out_proj}",
    "{model:model.|}{side:encoder|decoder}.layers.{layer}.{p:fc1|fc2}",
    "{model:model.|}{side:encoder|decoder}.layers.{layer}"
    ".{p:self_attn|encoder_attn|final}_layer_norm",
    "proj_out",
)

# Mistral, Gemma and their kin have Llama's names.
LLAMA = _same(
    "{model:model.|}{p:embed_tokens|norm}",
    "{model:model.|}layers.{layer}.self_attn.{p:q_proj|k_proj|v_proj|o_proj}",
    "{model:model.|}layers.{layer}.mlp.{p:gate_proj|up_proj|down_proj}",
    "{model:model.|}layers.{layer}.{p:input|post_attention}_layernorm",
    "lm_head",
)

# The ViT of google-research/vision_transformer, whose attention kernels keep the heads apart, to
# the one of transformers. The second LayerNorm's number skips the MLP's there.
_BLOCK = "Transformer.encoderblock_{layer}"
_LAYER = "vit.encoder.layer.{layer}"
VIT_FLAX = {
    "embedding": "vit.embeddings.patch_embeddings.projection",
    f"{_BLOCK}.MultiHeadDotProductAttention_1.{{p:query|key|value}}": (
        f"{_LAYER}.attention.attention.{{p}}"
    ),
    f"{_BLOCK}.MultiHeadDotProductAttention_1.out": f"{_LAYER}.attention.output.dense",
    f"{_BLOCK}.MlpBlock_3.Dense_0": f"{_LAYER}.intermediate.dense",
    f"{_BLOCK}.MlpBlock_3.Dense_1": f"{_LAYER}.output.dense",
    f"{_BLOCK}.LayerNorm_0": f"{_LAYER}.layernorm_before",
    f"{_BLOCK}.LayerNorm_2": f"{_LAYER}.layernorm_after",
    "Transformer.encoder_norm": "vit.layernorm",
    "head": "classifier",
}

# transformers' Flax CLIP to OpenCLIP, whose attention is PyTorch's nn.MultiheadAttention.
_SIDES = {"vision_model": "visual.", "text_model": ""}
OPEN_CLIP: dict[str, str | Fused] = {
    f"{side}.encoder.layers.{{layer}}.{jax}": torch
    for side, own in _SIDES.items()
    for jax, torch in {
        "self_attn.{p:q_proj|k_proj|v_proj}": Fused(
            f"{own}transformer.resblocks.{{layer}}.attn.in_proj_weight"
        ),
        "self_attn.out_proj": f"{own}transformer.resblocks.{{layer}}.attn.out_proj",
        "mlp.fc1": f"{own}transformer.resblocks.{{layer}}.mlp.c_fc",
        "mlp.fc2": f"{own}transformer.resblocks.{{layer}}.mlp.c_proj",
        "layer_norm{n:1|2}": f"{own}transformer.resblocks.{{layer}}.ln_{{n}}",
    }.items()
} | {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
}
