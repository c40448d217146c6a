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
from lora_jax.peft.names import tables as tables
from lora_jax.peft.names.naming import Fused, Names, stacked
from parity_tests.models.model_subjects import normal, tokens
from parity_tests.models.third_party import clip_as_it_was, flax_model

N, T, D, HEADS, FFN, VOCABULARY = 2, 5, 12, 3, 20, 23
IDS = tokens(N, T, vocabulary=VOCABULARY)
IMAGES = normal(N, 3, 8, 8, dtype=jnp.float32)
SOUND = normal(N, 4, 10, dtype=jnp.float32)


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
    """A row: how the twins are made, their names, what is adapted by its names on either side.

    A fused one comes back from a file with the same ``ΔW``, but of another rank.
    """

    name: str
    make: Callable[[], Twins]
    names: Names
    targets: tuple[str, ...]
    torch_targets: tuple[str, ...]
    patterns: Mapping[str, int]
    torch_patterns: Mapping[str, int]
    fused: bool = False

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


def transformers_twins(cls: str, config: Any, field: str = "logits", **options: Any) -> Twins:
    """One of transformers' Flax models, and its PyTorch namesake with the same weights."""
    config.attn_implementation = "eager"
    with clip_as_it_was(), jax.numpy_dtype_promotion("standard"):
        model, params = flax_model(f"Flax{cls}", config, jnp.float32)
    twin = getattr(transformers, cls)(config).eval()
    with warnings.catch_warnings():
        # It makes tensors of JAX's arrays, which it then only reads.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        load_flax_weights_in_pytorch_model(twin, jax.tree.map(np.array, params))
    inputs = IMAGES if "ViT" in cls else SOUND if "Whisper" in cls else IDS
    if config.is_encoder_decoder:
        options = dict(decoder_input_ids=IDS[:, ::-1])
    theirs = {name: torch.tensor(np.array(value)) for name, value in options.items()}

    @clip_as_it_was()
    def fn(params: Any, inputs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return getattr(model(inputs, params=params, **options), field)

    def run(wrapped: Any) -> Any:
        with torch.no_grad():
            return getattr(wrapped(torch.tensor(np.array(inputs)), **theirs), field).numpy()

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


def mistral() -> Twins:
    return transformers_twins("MistralForCausalLM", transformers.MistralConfig(**grouped()))


def gemma() -> Twins:
    return transformers_twins("GemmaForCausalLM", transformers.GemmaConfig(**grouped()))


def grouped() -> dict[str, Any]:
    return text(num_key_value_heads=1, head_dim=D // HEADS)


def whisper() -> Twins:
    stacks: dict[str, Any] = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in dict(layers=1, attention_heads=HEADS, ffn_dim=FFN).items()
    }
    config = transformers.WhisperConfig(
        d_model=D,
        vocab_size=VOCABULARY,
        num_mel_bins=4,
        max_source_positions=5,
        max_target_positions=8,
        pad_token_id=0,
        decoder_start_token_id=1,
        **stacks,
    )
    return transformers_twins("WhisperForConditionalGeneration", config)


def clip() -> Twins:
    config = transformers.CLIPConfig(
        text_config=text(eos_token_id=VOCABULARY - 1),
        vision_config=sizes(image_size=8, patch_size=4),
        projection_dim=6,
    )
    return transformers_twins("CLIPModel", config, "logits_per_image", pixel_values=IMAGES)


class ResBlock(torch.nn.Module):
    """OpenCLIP's block."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(D), torch.nn.LayerNorm(D)
        self.attn = torch.nn.MultiheadAttention(D, HEADS, batch_first=True)
        layers = dict(c_fc=torch.nn.Linear(D, FFN), c_proj=torch.nn.Linear(FFN, D))
        self.mlp = torch.nn.ModuleDict(layers)

    def forward(self, x: Any) -> Any:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


class OpenClip(torch.nn.Module):
    """OpenCLIP's image tower, to its last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = torch.nn.Module()
        self.visual.conv1 = torch.nn.Conv2d(3, D, 4, 4, bias=False)
        self.visual.class_embedding = torch.nn.Parameter(torch.zeros(D))
        self.visual.positional_embedding = torch.nn.Parameter(torch.zeros(5, D))
        self.visual.ln_pre = torch.nn.LayerNorm(D)
        self.visual.transformer = torch.nn.Module()
        blocks = torch.nn.ModuleList(ResBlock() for _ in range(2))
        self.visual.transformer.resblocks = blocks

    def forward(self, images: Any) -> Any:
        own: Any = self.visual
        x = own.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([own.class_embedding.expand(N, 1, D), x], 1) + own.positional_embedding
        x = own.ln_pre(x)
        for block in own.transformer.resblocks:
            x = block(x)
        return x


def open_clip() -> Twins:
    """transformers' Flax image tower, its weights moved to OpenCLIP by hand."""
    config = transformers.CLIPVisionConfig(**sizes(image_size=8, patch_size=4))
    with clip_as_it_was(), jax.numpy_dtype_promotion("standard"):
        model, params = flax_model("FlaxCLIPVisionModel", config, jnp.float32)
    own = params["vision_model"]

    def dense(one: Any, name: str) -> dict[str, Any]:
        return {f"{name}.weight": one["kernel"].T, f"{name}.bias": one["bias"]}

    def norm(one: Any, name: str) -> dict[str, Any]:
        return {f"{name}.weight": one["scale"], f"{name}.bias": one["bias"]}

    state = {
        "conv1.weight": own["embeddings"]["patch_embedding"]["kernel"].transpose(3, 2, 0, 1),
        "class_embedding": own["embeddings"]["class_embedding"],
        "positional_embedding": own["embeddings"]["position_embedding"]["embedding"],
    } | norm(own["pre_layrnorm"], "ln_pre")
    for n, layer in own["encoder"]["layers"].items():
        parts = [layer["self_attn"][f"{p}_proj"] for p in "qkv"]
        block = f"transformer.resblocks.{n}"
        state |= {
            f"{block}.attn.in_proj_weight": jnp.concatenate([p["kernel"].T for p in parts]),
            f"{block}.attn.in_proj_bias": jnp.concatenate([p["bias"] for p in parts]),
        }
        state |= dense(layer["self_attn"]["out_proj"], f"{block}.attn.out_proj")
        state |= dense(layer["mlp"]["fc1"], f"{block}.mlp.c_fc")
        state |= dense(layer["mlp"]["fc2"], f"{block}.mlp.c_proj")
        state |= norm(layer["layer_norm1"], f"{block}.ln_1")
        state |= norm(layer["layer_norm2"], f"{block}.ln_2")
    twin = OpenClip().eval()
    tensors = {f"visual.{name}": torch.tensor(np.array(one)) for name, one in state.items()}
    twin.load_state_dict(tensors)

    @clip_as_it_was()
    def fn(params: Any, images: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return model(images, params=params).last_hidden_state

    return Twins(fn, params, IMAGES, twin, lambda model: plain_run(model, IMAGES))


def plain_run(model: Any, inputs: Any) -> Any:
    with torch.no_grad():
        out = model(torch.tensor(np.array(inputs)))
    return (out if isinstance(out, torch.Tensor) else out.logits).numpy()


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


def llama_fused() -> Twins:
    """Layers on the kernels' second axis; query, key and value one kernel, and gate and up."""
    config, plain = llama_config(), llama()
    layers = plain.params["model"]["layers"]
    head = D // HEADS

    def both(*where: str) -> Any:
        def one(n: str) -> Any:
            return functools.reduce(lambda tree, key: tree[key], where, layers[n])

        return jnp.stack([one("0"), one("1")], 1)

    attention = {name: both("self_attn", f"{name}_proj", "kernel") for name in "qkvo"}
    qkv = [attention[name] for name in "qkv"]
    mlp = [both("mlp", f"{name}_proj", "kernel") for name in ("gate", "up")]
    params = dict(
        token_embedder=dict(embedding=plain.params["model"]["embed_tokens"]["embedding"]),
        decoder=dict(
            layers=dict(
                self_attention=dict(
                    qkv_proj=dict(kernel=jnp.concatenate(qkv, 2)),
                    out=dict(kernel=attention["o"]),
                ),
                mlp=dict(
                    wi=dict(kernel=jnp.concatenate(mlp, 2)),
                    wo=dict(kernel=both("mlp", "down_proj", "kernel")),
                ),
                pre=dict(scale=both("input_layernorm", "weight")),
                post=dict(scale=both("post_attention_layernorm", "weight")),
            ),
            norm=plain.params["model"]["norm"],
        ),
        head=dict(kernel=plain.params["lm_head"]["kernel"]),
    )

    def unfused(own: Any) -> Any:
        qkv = own["self_attention"]["qkv_proj"]["kernel"]
        ends = {"q": (0, HEADS), "k": (HEADS, HEADS + 1), "v": (HEADS + 1, HEADS + 2)}
        split = {
            f"{name}_proj": dict(kernel=qkv[:, start * head : stop * head])
            for name, (start, stop) in ends.items()
        }
        wi = own["mlp"]["wi"]["kernel"]
        return dict(
            self_attn=split | dict(o_proj=own["self_attention"]["out"]),
            mlp=dict(
                gate_proj=dict(kernel=wi[:, :FFN]),
                up_proj=dict(kernel=wi[:, FFN:]),
                down_proj=own["mlp"]["wo"],
            ),
            input_layernorm=dict(weight=own["pre"]["scale"]),
            post_attention_layernorm=dict(weight=own["post"]["scale"]),
        )

    def fn(params: Any, ids: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(T), (N, T))
        layer, own = FlaxLlamaDecoderLayer(config), params["decoder"]["layers"]

        with jax.numpy_dtype_promotion("standard"):
            moved = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), own)

            def scanned(h: Any, one: Any) -> tuple[Any, None]:
                mask = jnp.ones((N, T), jnp.int32)
                return layer.apply({"params": unfused(one)}, h, mask, positions)[0], None

            h = params["token_embedder"]["embedding"][ids]
            h = jax.lax.scan(scanned, h, moved)[0]
            h = FlaxLlamaRMSNorm(config).apply({"params": params["decoder"]["norm"]}, h)
            return h @ params["head"]["kernel"]

    return Twins(fn, params, plain.inputs, plain.model, plain.run)


class NeoxBlock(nn.Module):
    """GPT-NeoX's layer without its rotary embedding; the kernels of attention are apart."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.LayerNorm(1e-5, name="input_layernorm")(x)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        attention = nn.MultiHeadDotProductAttention(HEADS, name="attention")(y, y, mask=mask)
        y = nn.LayerNorm(1e-5, name="post_attention_layernorm")(x)
        h = nn.gelu(nn.Dense(FFN, name="dense_h_to_4h")(y), approximate=False)
        return x + attention + nn.Dense(D, name="dense_4h_to_h")(h)


class Neox(nn.Module):
    @nn.compact
    def __call__(self, ids: Any) -> Any:
        x = nn.Embed(VOCABULARY, D, name="embed_in")(ids)
        for n in range(2):
            x = NeoxBlock(name=f"layers_{n}")(x)
        x = nn.LayerNorm(1e-5, name="final_layer_norm")(x)
        return nn.Dense(VOCABULARY, use_bias=False, name="embed_out")(x)


def neox() -> Twins:
    """The weights of transformers' GPT-NeoX, moved by hand and not by the table."""
    config = transformers.GPTNeoXConfig(**text(rotary_pct=0.0, attn_implementation="eager"))
    torch.manual_seed(0)
    twin = transformers.GPTNeoXForCausalLM(config).eval()
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = {name: jnp.asarray(one.detach().numpy()) for name, one in twin.named_parameters()}

    def own(name: str, kind: str) -> Any:
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        weight = weight if kind != "kernel" else weight.T
        return {kind: weight} | ({} if bias is None else {"bias": bias})

    params: dict[str, Any] = dict(
        embed_in=own("gpt_neox.embed_in", "embedding"),
        final_layer_norm=own("gpt_neox.final_layer_norm", "scale"),
        embed_out=own("embed_out", "kernel"),
    )
    head = D // HEADS
    for n in range(2):
        layer = f"gpt_neox.layers.{n}"
        weight = state[f"{layer}.attention.query_key_value.weight"].reshape(HEADS, 3, head, D)
        bias = state[f"{layer}.attention.query_key_value.bias"].reshape(HEADS, 3, head)
        attention = {
            name: dict(kernel=weight[:, m].transpose(2, 0, 1), bias=bias[:, m])
            for m, name in enumerate(("query", "key", "value"))
        }
        out = own(f"{layer}.attention.dense", "kernel")
        attention["out"] = out | dict(kernel=out["kernel"].reshape(HEADS, head, D))
        params[f"layers_{n}"] = dict(
            attention=attention,
            input_layernorm=own(f"{layer}.input_layernorm", "scale"),
            post_attention_layernorm=own(f"{layer}.post_attention_layernorm", "scale"),
            dense_h_to_4h=own(f"{layer}.mlp.dense_h_to_4h", "kernel"),
            dense_4h_to_h=own(f"{layer}.mlp.dense_4h_to_h", "kernel"),
        )

    def fn(params: Any, ids: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return Neox().apply({"params": params}, ids)

    return Twins(fn, params, IDS, twin, lambda model: plain_run(model, IDS))


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

_NEOX = "gpt_neox.layers.{n}"
NEOX = {
    "layers_{n}.attention.{p:query|key|value}": Fused(
        f"{_NEOX}.attention.query_key_value", order="heads"
    ),
    "layers_{n}.attention.out": f"{_NEOX}.attention.dense",
    "layers_{n}.{p:dense_h_to_4h|dense_4h_to_h}": f"{_NEOX}.mlp.{{p}}",
    "embed_in": "gpt_neox.embed_in",
    "embed_out": "embed_out",
}
LLAMA_FUSED = {
    "decoder.layers.self_attention.qkv_proj": Fused(
        "model.layers.{}.self_attn.{p:q_proj|k_proj|v_proj}", widths=(HEADS, 1, 1)
    ),
    "decoder.layers.self_attention.out": "model.layers.{}.self_attn.o_proj",
    "decoder.layers.mlp.wi": Fused("model.layers.{}.mlp.{p:gate_proj|up_proj}"),
    "decoder.layers.mlp.wo": "model.layers.{}.mlp.down_proj",
}

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
    same("clip", clip, tables.CLIP, ("q_proj", "v_proj", "fc1"), {"text_model.*q_proj": 3}),
    same("whisper", whisper, tables.WHISPER, ("q_proj", "fc1"), {"decoder.*fc1": 3}),
    same("mistral", mistral, tables.LLAMA, LLAMA, {"layers.0.*down_proj": 3}),
    same("gemma", gemma, tables.LLAMA, LLAMA, {"layers.1.*q_proj": 3}),
    Family(
        "open_clip",
        open_clip,
        tables.OPEN_CLIP,
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1"),
        ("attn", "c_fc", "c_proj"),
        {"fc1": 3},
        {"resblocks.1.attn": 3},
        fused=True,
    ),
    Family(
        "neox, heads interleaved",
        neox,
        NEOX,
        ("query", "value", "dense_h_to_4h"),
        ("query_key_value", "dense", "dense_4h_to_h"),
        {"query": 3},
        {"layers.1.attention.query_key_value": 3},
        fused=True,
    ),
    Family(
        "llama, stacked and fused",
        llama_fused,
        LLAMA_FUSED,
        ("qkv_proj", "out", "wi", "wo"),
        ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        {"wi": 3},
        {"q_proj": 3},
        fused=True,
    ),
]
