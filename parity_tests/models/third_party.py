"""Models that nobody here wrote, unmodified and tiny: one constructor and one row each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import transformers

from parity_tests.models.model_subjects import Built, Model, drawn, normal, tokens

# The same for all, so that what one model compiles op by op serves the next.
N, T, D, HEADS, FFN, VOCABULARY = 2, 5, 12, 3, 20, 23


def flax_model(cls: str, config: Any, dtype: Any, **options: Any) -> tuple[Any, Any]:
    """Return one of transformers' Flax models and random parameters for it."""
    model = getattr(transformers, cls)(config, dtype=dtype, _do_init=False, **options)
    return model, drawn(model.params_shape_tree, dtype)


def gpt2(dtype: Any) -> Built:
    model, params = gpt2_model(dtype)
    ids = tokens(N, T, vocabulary=VOCABULARY)
    return lambda p, ids: model(ids, params=p).logits, params, (ids,)


def gpt2_cached(dtype: Any) -> Built:
    """Tokens into an empty cache, then one more with the cache that this returned."""
    model, params = gpt2_model(dtype)
    shapes = jax.eval_shape(lambda: model.init_cache(N, T + 1))
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def fn(params: Any, ids: Any, cache: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(T + 1), (N, T + 1))
        options = dict(params=params, attention_mask=jnp.ones((N, T + 1), jnp.int32))

        def call(part: Any, cache: Any) -> Any:
            where = dict(position_ids=positions[:, part], past_key_values=cache)
            return model(ids[:, part], **where, **options)

        first = call(slice(0, T), cache)
        step = call(slice(T, T + 1), first.past_key_values)
        return jnp.concatenate([first.logits, step.logits], 1), step.past_key_values

    return fn, params, (tokens(N, T + 1, vocabulary=VOCABULARY), cache)


def gpt2_model(dtype: Any) -> tuple[Any, Any]:
    config = transformers.GPT2Config(
        n_embd=D, n_inner=FFN, n_head=HEADS, n_layer=1, n_positions=8, vocab_size=VOCABULARY
    )
    return flax_model("FlaxGPT2LMHeadModel", config, dtype)


def bert(dtype: Any) -> Built:
    config = transformers.BertConfig(
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        vocab_size=VOCABULARY,
        max_position_embeddings=8,
    )
    model, params = flax_model("FlaxBertForSequenceClassification", config, dtype)
    mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ids = tokens(N, T, vocabulary=VOCABULARY)
    return lambda p, ids, mask: model(ids, mask, params=p).logits, params, (ids, mask)


def t5(dtype: Any) -> Built:
    config = transformers.T5Config(
        d_model=D,
        d_kv=D // HEADS,
        num_heads=HEADS,
        d_ff=FFN,
        num_layers=1,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    with clip_as_it_was():
        model, params = flax_model("FlaxT5ForConditionalGeneration", config, dtype)
    fn, params, args = encoder_decoder(model, params, tokens(N, T, vocabulary=VOCABULARY))
    return clip_as_it_was()(fn), params, args


@contextlib.contextmanager
def clip_as_it_was() -> Iterator[None]:
    """Give ``jnp.clip`` the keyword ``a_max`` back, which jax 0.10 has dropped and T5 uses."""
    clip = jnp.clip
    with mock.patch.object(jnp, "clip", lambda x, a_max: clip(x, max=a_max)):
        yield


def bart(dtype: Any) -> Built:
    model, params = flax_model("FlaxBartForConditionalGeneration", bart_like("Bart"), dtype)
    return encoder_decoder(model, params, tokens(N, T, vocabulary=VOCABULARY))


def marian(dtype: Any) -> Built:
    config = bart_like("Marian", pad_token_id=1, decoder_start_token_id=1)
    model, params = flax_model("FlaxMarianMTModel", config, dtype)
    return encoder_decoder(model, params, tokens(N, T, vocabulary=VOCABULARY))


def whisper(dtype: Any) -> Built:
    config = bart_like(
        "Whisper",
        num_mel_bins=5,
        max_source_positions=T,
        max_target_positions=8,
        pad_token_id=0,
        decoder_start_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model, params = flax_model("FlaxWhisperForConditionalGeneration", config, dtype)
    return encoder_decoder(model, params, normal(N, 5, 2 * T, dtype=dtype))


def bart_like(name: str, **options: Any) -> Any:
    sizes = dict(
        d_model=D,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN,
        decoder_ffn_dim=FFN,
        vocab_size=VOCABULARY,
        max_position_embeddings=8,
    )
    return getattr(transformers, f"{name}Config")(**sizes | options)


def encoder_decoder(model: Any, params: Any, inputs: Any) -> Built:
    targets = tokens(N, T, vocabulary=VOCABULARY, seed=8)

    def fn(params: Any, inputs: Any, targets: Any) -> Any:
        return model(inputs, decoder_input_ids=targets, params=params).logits

    return fn, params, (inputs, targets)


def vit(dtype: Any) -> Built:
    config = transformers.ViTConfig(
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        image_size=8,
        patch_size=4,
    )
    model, params = flax_model("FlaxViTForImageClassification", config, dtype)
    images = normal(N, 3, 8, 8, dtype=dtype)
    return lambda p, images: model(images, params=p).logits, params, (images,)


def clip(dtype: Any) -> Built:
    sizes = dict(
        hidden_size=D, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=FFN
    )
    config = transformers.CLIPConfig(
        text_config=sizes
        | dict(vocab_size=VOCABULARY, max_position_embeddings=8, eos_token_id=VOCABULARY - 1),
        vision_config=sizes | dict(image_size=8, patch_size=4),
        projection_dim=D,
    )
    model, params = flax_model("FlaxCLIPModel", config, dtype)
    # The text's features are those of its end, which sees the tokens before.
    ids = tokens(N, T, vocabulary=VOCABULARY).at[:, -1].set(VOCABULARY - 1)
    images = normal(N, 3, 8, 8, dtype=dtype)

    def fn(params: Any, ids: Any, images: Any) -> Any:
        return model(ids, images, params=params).logits_per_text

    return fn, params, (ids, images)


def causal(name: str, dtype: Any, **options: Any) -> Built:
    """A decoder of the Llama family, or one that takes the same sizes."""
    sizes = dict(
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=D // HEADS,
        intermediate_size=FFN,
        vocab_size=VOCABULARY,
        max_position_embeddings=8,
    )
    config = getattr(transformers, f"{name}Config")(**sizes | options)
    model, params = flax_model(f"Flax{name}ForCausalLM", config, dtype)
    ids = tokens(N, T, vocabulary=VOCABULARY)
    return lambda p, ids: model(ids, params=p).logits, params, (ids,)


def llama(dtype: Any) -> Built:
    return causal("Llama", dtype)


def mistral(dtype: Any) -> Built:
    return causal("Mistral", dtype, sliding_window=3)


def gemma(dtype: Any) -> Built:
    return causal("Gemma", dtype, hidden_activation="gelu_pytorch_tanh")


def gpt_neo(dtype: Any) -> Built:
    config = transformers.GPTNeoConfig(
        hidden_size=D,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=HEADS,
        intermediate_size=FFN,
        window_size=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=8,
    )
    model, params = flax_model("FlaxGPTNeoForCausalLM", config, dtype)
    ids = tokens(N, T, vocabulary=VOCABULARY)
    return lambda p, ids: model(ids, params=p).logits, params, (ids,)


def haiku_mlp(dtype: Any) -> Built:
    return haiku(lambda x: hk.nets.MLP([FFN, 7, 5], name="mlp")(x), normal(N, D, dtype=dtype))


def haiku_lstm(dtype: Any) -> Built:
    def unrolled(x: Any) -> Any:
        cell = hk.LSTM(7)
        return hk.dynamic_unroll(cell, x, cell.initial_state(N))[0]

    return haiku(unrolled, normal(T, N, D, dtype=dtype))


def haiku_mobilenet(dtype: Any) -> Built:
    """Batch statistics are Haiku's state; the convolutions stay frozen, the head is adapted."""

    def net(x: Any) -> Any:
        return hk.nets.MobileNetV1((1, 2), (D, FFN), num_classes=5)(x, is_training=True)

    return haiku(net, normal(N, 8, 8, 3, dtype=dtype))


def haiku(net: Any, x: Any) -> Built:
    model = hk.transform_with_state(net)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    params, state = (drawn(tree, x.dtype) for tree in shapes)
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    return lambda p, state, x: model.apply(p, state, None, x), params, (state, x)


def equinox_gru(dtype: Any) -> Built:
    """The model is the parameters; its time loop closes over both weights."""
    model = drawn(eqx.nn.GRUCell(D, 7, key=jax.random.key(0)), dtype)

    def fn(model: Any, x: Any) -> Any:
        def step(h: Any, x: Any) -> tuple[Any, Any]:
            h = model(x, h)
            return h, h

        return jax.lax.scan(step, jnp.zeros(7, x.dtype), x)[1]

    return fn, model, (normal(T, D, dtype=dtype),)


def rows_of(*names: str, axes: str = "io") -> dict[str, str]:
    return dict.fromkeys(names, axes)


BART = rows_of("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LLAMA = rows_of("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPT2 = rows_of("c_attn", "c_fc", "c_proj", axes="oi")

ALL = [
    Model("gpt2", gpt2, GPT2, 4),
    # The cached step gives lax.dynamic_slice indices of two dtypes when x64 is on.
    Model("gpt2_cached", gpt2_cached, GPT2, 4, dict.fromkeys(GPT2, 2), precision="single"),
    Model("bert", bert, rows_of("query", "key", "value", "dense", "classifier"), 8),
    Model("t5", t5, rows_of("q", "k", "v", "o", "wi", "wo"), 16),
    Model("bart", bart, BART, 16),
    Model("marian", marian, BART, 16),
    Model("whisper", whisper, BART, 16),
    Model("vit", vit, rows_of("query", "key", "value", "dense", "classifier"), 7),
    Model("clip", clip, BART | rows_of("text_projection", "visual_projection"), 14),
    Model("llama", llama, LLAMA | rows_of("lm_head"), 8),
    Model("mistral", mistral, LLAMA, 7),
    Model("gemma", gemma, LLAMA, 7),
    Model("gpt_neo", gpt_neo, rows_of("q_proj", "k_proj", "v_proj", "out_proj", "c_fc"), 10),
    Model("haiku_mlp", haiku_mlp, rows_of("linear_0", "linear_1", "linear_2"), 3),
    Model("haiku_lstm", haiku_lstm, rows_of("linear"), 1),
    Model("haiku_mobilenet", haiku_mobilenet, rows_of("logits"), 1),
    Model("equinox_gru", equinox_gru, rows_of("weight_ih", "weight_hh", axes="oi"), 2),
]
