"""The same weights in JAX and in PyTorch, under names that a table connects."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.modeling_flax_pytorch_utils import load_flax_weights_in_pytorch_model
from transformers.models.llama.modeling_flax_llama import FlaxLlamaDecoderLayer, FlaxLlamaRMSNorm

from lora_jax import Plan
from lora_jax import naming_tables as tables
from lora_jax.naming import Names, stacked
from parity_tests.model_subjects import normal, tokens
from parity_tests.third_party import clip_as_it_was, flax_model

N, T, D, HEADS, FFN, VOCABULARY = 2, 5, 12, 3, 20, 23
IDS = tokens(N, T, vocabulary=VOCABULARY)
IMAGES = normal(N, 3, 8, 8, dtype=jnp.float32)


@dataclass(frozen=True)
class Twins:
    """One model twice.

    Args:
        fn: of ``(params, inputs)``, to logits.
        params: its parameters.
        inputs: an example.
        model: the PyTorch model.
        run: it on the same inputs.
    """

    fn: Callable[[Any, Any], Any]
    params: Any
    inputs: Any
    model: torch.nn.Module
    run: Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class Family:
    """A row: how the twins are made, their names, what is adapted by its names on either side."""

    name: str
    make: Callable[[], Twins]
    names: Names
    targets: tuple[str, ...]
    torch_targets: tuple[str, ...]
    patterns: Mapping[str, int]
    torch_patterns: Mapping[str, int]

    def __str__(self) -> str:
        return self.name


@functools.cache
def twins(family: Family) -> Twins:
    return family.make()


def relative(got: Any, wanted: Any) -> float:
    got, wanted = (np.asarray(one, np.float64) for one in (got, wanted))
    assert got.shape == wanted.shape
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def random_adapters(found: Plan, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 3, leaf.dtype), found.abstract()
    )


def transformers_twins(cls: str, config: Any) -> Twins:
    """One of transformers' Flax models, and its PyTorch namesake with the same weights."""
    config.attn_implementation = "eager"
    with clip_as_it_was(), jax.numpy_dtype_promotion("standard"):
        model, params = flax_model(f"Flax{cls}", config, jnp.float32)
    twin = getattr(transformers, cls)(config).eval()
    with warnings.catch_warnings():
        # It makes tensors of JAX's arrays, which it then only reads.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        load_flax_weights_in_pytorch_model(twin, jax.tree.map(np.array, params))
    inputs, options = (IMAGES, {}) if "ViT" in cls else (IDS, {})
    if config.is_encoder_decoder:
        options = dict(decoder_input_ids=IDS[:, ::-1])
    theirs = {name: torch.tensor(np.array(value)) for name, value in options.items()}

    @clip_as_it_was()
    def fn(params: Any, inputs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return model(inputs, params=params, **options).logits

    def run(wrapped: Any) -> Any:
        with torch.no_grad():
            return wrapped(torch.tensor(np.array(inputs)), **theirs).logits.numpy()

    return Twins(fn, params, inputs, twin, run)


def sizes(**others: Any) -> dict[str, Any]:
    return dict(
        hidden_size=D, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=FFN
    ) | (others)


def text(**others: Any) -> dict[str, Any]:
    return sizes(vocab_size=VOCABULARY, max_position_embeddings=8, **others)


def gpt2() -> Twins:
    config = transformers.GPT2Config(
        n_embd=D, n_inner=FFN, n_head=HEADS, n_layer=2, n_positions=8, vocab_size=VOCABULARY
    )
    return transformers_twins("GPT2LMHeadModel", config)


def bert() -> Twins:
    return transformers_twins("BertForSequenceClassification", transformers.BertConfig(**text()))


def t5() -> Twins:
    config = transformers.T5Config(
        d_model=D,
        d_kv=D // HEADS,
        num_heads=HEADS,
        d_ff=FFN,
        num_layers=1,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    return transformers_twins("T5ForConditionalGeneration", config)


def bart() -> Twins:
    stacks: dict[str, Any] = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in dict(layers=1, attention_heads=HEADS, ffn_dim=FFN).items()
    }
    config = transformers.BartConfig(
        d_model=D, vocab_size=VOCABULARY, max_position_embeddings=8, **stacks
    )
    return transformers_twins("BartForConditionalGeneration", config)


def vit() -> Twins:
    return transformers_twins("ViTForImageClassification", vit_config())


def vit_config() -> Any:
    return transformers.ViTConfig(**sizes(image_size=8, patch_size=4))


def llama_config() -> Any:
    return transformers.LlamaConfig(**text(num_key_value_heads=1, head_dim=D // HEADS))


def llama() -> Twins:
    return transformers_twins("LlamaForCausalLM", llama_config())


def llama_stacked() -> Twins:
    """Llama's layers in one ``lax.scan`` over stacked kernels, axes ``"sio"``."""
    config, plain = llama_config(), llama()
    layers = plain.params["model"]["layers"]
    params = dict(
        embed=plain.params["model"]["embed_tokens"]["embedding"],
        layers=jax.tree.map(lambda *leaves: jnp.stack(leaves), layers["0"], layers["1"]),
        norm=plain.params["model"]["norm"],
        head=plain.params["lm_head"]["kernel"],
    )

    def fn(params: Any, ids: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(T), (N, T))
        layer = FlaxLlamaDecoderLayer(config)

        def step(h: Any, own: Any) -> tuple[Any, None]:
            mask = jnp.ones((N, T), jnp.int32)
            return layer.apply({"params": own}, h, mask, positions)[0], None

        with jax.numpy_dtype_promotion("standard"):
            h = jax.lax.scan(step, params["embed"][ids], params["layers"])[0]
            h = FlaxLlamaRMSNorm(config).apply({"params": params["norm"]}, h)
            return h @ params["head"]

    return Twins(fn, params, plain.inputs, plain.model, plain.run)


class Vit(nn.Module):
    """A ViT with the names of google-research/vision_transformer, its heads kept apart."""

    @nn.compact
    def __call__(self, images: Any) -> Any:
        x = nn.Conv(D, (4, 4), (4, 4), name="embedding")(images.transpose(0, 2, 3, 1))
        x = x.reshape(N, -1, D)
        cls = self.param("cls", nn.initializers.normal(), (1, 1, D))
        x = jnp.concatenate([jnp.broadcast_to(cls, (N, 1, D)), x], 1)
        x = Encoder(name="Transformer")(x)
        return nn.Dense(2, name="head")(x[:, 0])


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, 5, D))
        for n in range(2):
            x = Block(name=f"encoderblock_{n}")(x)
        return nn.LayerNorm(1e-12, name="encoder_norm")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.LayerNorm(1e-12, name="LayerNorm_0")(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="MultiHeadDotProductAttention_1")(y, y)
        return x + Mlp(name="MlpBlock_3")(nn.LayerNorm(1e-12, name="LayerNorm_2")(x))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.gelu(nn.Dense(FFN, name="Dense_0")(x), approximate=False)
        return nn.Dense(D, name="Dense_1")(h)


def vit_flax() -> Twins:
    """The weights of transformers' Flax ViT, moved by hand and not by the table."""
    plain, module = vit(), Vit()
    vit_ = plain.params["vit"]

    def heads(own: Any) -> Any:
        return dict(kernel=own["kernel"].reshape(D, HEADS, -1), bias=own["bias"].reshape(HEADS, -1))

    def block(own: Any) -> Any:
        attention = {name: heads(one) for name, one in own["attention"]["attention"].items()}
        out = own["attention"]["output"]["dense"]
        attention["out"] = out | dict(kernel=out["kernel"].reshape(HEADS, -1, D))
        return dict(
            LayerNorm_0=own["layernorm_before"],
            LayerNorm_2=own["layernorm_after"],
            MultiHeadDotProductAttention_1=attention,
            MlpBlock_3=dict(Dense_0=own["intermediate"]["dense"], Dense_1=own["output"]["dense"]),
        )

    layers = vit_["encoder"]["layer"]
    params = dict(
        embedding=vit_["embeddings"]["patch_embeddings"]["projection"],
        cls=vit_["embeddings"]["cls_token"],
        Transformer={f"encoderblock_{n}": block(layers[n]) for n in layers}
        | dict(
            pos_embedding=vit_["embeddings"]["position_embeddings"],
            encoder_norm=vit_["layernorm"],
        ),
        head=plain.params["classifier"],
    )

    def fn(params: Any, images: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return module.apply({"params": params}, images)

    return Twins(fn, params, plain.inputs, plain.model, plain.run)


def same(
    name: str, make: Any, table: Any, targets: tuple[str, ...], patterns: Mapping[str, int]
) -> Family:
    return Family(name, make, table, targets, targets, patterns, patterns)


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STACKED = stacked(
    {
        name.replace("{model:model.|}", ""): "model." + torch.replace("{model}", "")
        for name, torch in tables.LLAMA.items()
        if "layers" in name
    }
)

ALL = [
    same("gpt2", gpt2, tables.GPT2, ("c_attn", "c_proj", "c_fc"), {"c_attn": 3}),
    same(
        "bert",
        bert,
        tables.BERT,
        ("query", "value", "dense"),
        {"layer.1.attention.self.query": 3, "pooler.dense": 1},
    ),
    same("t5", t5, tables.T5, ("q", "v", "wi", "wo"), {"decoder.*q": 3}),
    same("bart", bart, tables.BART, ("q_proj", "v_proj", "fc1", "fc2"), {"decoder.*fc1": 3}),
    same("vit", vit, tables.VIT, ("query", "dense", "projection"), {"1.output.dense": 3}),
    same("llama", llama, tables.LLAMA, LLAMA, {"layers.0.*(up|down)_proj": 3}),
    Family(
        "llama, stacked",
        llama_stacked,
        STACKED,
        ("self_attn.q_proj", "self_attn.o_proj", "down_proj"),
        ("self_attn.q_proj", "self_attn.o_proj", "down_proj"),
        {"q_proj": 3},
        {"q_proj": 3},
    ),
    Family(
        "vit, heads apart",
        vit_flax,
        tables.VIT_FLAX,
        ("query", "value", "out", "Dense_0", "Dense_1", "embedding"),
        ("query", "value", "dense", "projection"),
        {"encoderblock_1.*Dense_1": 3},
        {"layer.1.output.dense": 3},
    ),
]
