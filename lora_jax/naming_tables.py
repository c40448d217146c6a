"""Tables of names for ``names=…`` of ``save_pretrained`` and ``load_pretrained``, one a family.

``lora_jax.naming`` explains the patterns. The Flax models of ``transformers`` have PyTorch's module
names; their tables refuse what is not of the family, and ``stacked(TABLE)`` is for their layers
stacked.
"""

from __future__ import annotations


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
