"""BERT with a classification head, its parameter paths being transformers' own names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

from ..core.errors import AssetError, ConfigError, DataError, raise_all
from ..core.io import lfs_pointers
from ..core.io.intake import parse_json, read_bytes
from .packing import Packing, Unpacked, packing

Layout = Packing | Unpacked

TokenIds = Int[Array | np.ndarray, "b t"]
TokenTypes = Int[Array | np.ndarray, "#b #t"]


def exact_gelu(x: Inexact[Array, "*n"]) -> Inexact[Array, "*n"]:
    """Return ``x·(1 + erf(x/√2))/2``, as PyTorch computes it.

    ``jax.nn.gelu(approximate=False)`` goes through ``erfc``, which costs more on a CPU.

    >>> bool(jnp.allclose(exact_gelu(jnp.array([-1.0, 2.0])), jnp.array([-0.1586553, 1.9544997])))
    True
    """
    return 0.5 * x * (1.0 + lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": exact_gelu,
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}
"""The values of ``hidden_act`` that are supported; transformers' ``gelu`` is the exact one."""

# Above the sizes of every model: more is no size, and products of it overflow.
_LARGEST, _HUGE = 1 << 24, 1e30

_SUPPORTED = {
    "model_type": ("bert",),
    "hidden_act": tuple(ACTIVATIONS),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}


@dataclass(frozen=True)
class BertConfig:
    """The fields of transformers' ``config.json`` that decide what BERT computes.

    Raises:
        ConfigError: a field has the wrong type or is out of range; all are listed.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        raise_all(ConfigError, "this BERT configuration cannot be used", _problems(vars(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BertConfig:
        """Read transformers' fields, ignoring those that do not change the forward pass.

        Raises:
            ConfigError: fields that are missing, badly typed or ask for what is not supported.
        """
        missing = [
            f"{field.name}: missing"
            for field in fields(cls)
            if field.default is MISSING and field.name not in values
        ]
        problems = missing + _problems(values)
        raise_all(ConfigError, "this BERT configuration cannot be used", problems)
        given: dict[str, Any] = {
            # JSON may write 1.0 as 1.
            field.name: float(value) if field.type == "float" else value
            for field in fields(cls)
            if (value := values.get(field.name, MISSING)) is not MISSING
        }
        return cls(**given)

    @classmethod
    def from_file(cls, path: str | Path) -> BertConfig:
        """Read a ``config.json``.

        Raises:
            AssetError: the file is missing, unreadable or not a JSON object.
            ConfigError: as in ``from_dict``, naming the file.
        """
        try:
            return cls.from_dict(read_json(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


class BertLayer(nn.Module):
    """One transformer block: self-attention and a two-layer MLP, each with a post-norm.

    With ``first_only`` it computes the output of the first token alone, which still attends to
    every token.
    """

    config: BertConfig
    first_only: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*tokens d"], bias: Float[Array, "b 1 1 t"], layout: Layout
    ) -> Array:
        """Return the block's output.

        Args:
            x: tokens as ``layout`` packs them.
            bias: added to the attention scores.
            layout: between packed tokens and (b, t).
        """
        c, dense, norm = self.config, _dense(self.config), _layer_norm(self.config)
        # The first tokens alone are (b, 1, d), never packed.
        own = Unpacked() if self.first_only else layout
        asking = layout.spread(x)[:, :1] if self.first_only else x

        def heads(name: str, tokens: Array, layout: Layout) -> Array:
            projected = dense(c.hidden_size, name=f"attention.self.{name}")(tokens)
            return _split_heads(layout.spread(projected), c)

        query, key, value = (
            heads("query", asking, own),
            heads("key", x, layout),
            heads("value", x, layout),
        )
        mixed = own.pack(_merge_heads(_attend(query, key, value, bias)))
        mixed = dense(c.hidden_size, name="attention.output.dense")(mixed)
        x = norm(name="attention.output.LayerNorm")(mixed + asking)
        wide = dense(c.intermediate_size, name="intermediate.dense")(x)
        narrow = dense(c.hidden_size, name="output.dense")(ACTIVATIONS[c.hidden_act](wide))
        return norm(name="output.LayerNorm")(narrow + x)


class BertEmbeddings(nn.Module):
    """The sum of word, type and position embeddings, normalised."""

    config: BertConfig

    @nn.compact
    def __call__(self, input_ids: TokenIds, token_type_ids: TokenTypes) -> Float[Array, "b t d"]:
        """Embed the ids; ``token_type_ids`` may be (1, 1) to give one type to every token."""
        c = self.config
        embed = partial(
            nn.Embed,
            features=c.hidden_size,
            embedding_init=nn.initializers.normal(c.initializer_range),
        )
        positions = jnp.arange(input_ids.shape[1])
        x = embed(c.vocab_size, name="word_embeddings")(input_ids)
        x = x + embed(c.type_vocab_size, name="token_type_embeddings")(token_type_ids)
        x = x + embed(c.max_position_embeddings, name="position_embeddings")(positions)
        return _layer_norm(c)(name="LayerNorm")(x)


class BertEncoder(nn.Module):
    """The stack of layers; with ``first_only`` the last one computes the first token alone."""

    config: BertConfig
    first_only: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*tokens d"], bias: Float[Array, "b 1 1 t"], layout: Layout
    ) -> Array:
        """Return the last layer's output; the arguments are those of ``BertLayer``."""
        last = self.config.num_hidden_layers - 1
        for i in range(self.config.num_hidden_layers):
            first_only = self.first_only and i == last
            x = BertLayer(self.config, first_only, name=f"layer.{i}")(x, bias, layout)
        return x


class BertModel(nn.Module):
    """BERT's encoder and pooler (Devlin et al., 2019, https://arxiv.org/abs/1810.04805).

    Joining a parameter's path with dots gives its name in transformers' state dict, but for
    the leaf: ``kernel`` (transposed), ``scale`` and ``embedding`` are torch's ``weight``.
    The model is deterministic: it has no dropout. With ``first_only`` the hidden states that it
    returns are those of the first token, all that the pooler reads.
    """

    config: BertConfig
    first_only: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        token_type_ids: TokenTypes | None = None,
        places: Int[Array | np.ndarray, "n"] | None = None,
    ) -> tuple[Float[Array, "b _ d"], Float[Array, "b d"]]:
        """Return the last hidden states and ``tanh(pooler(first token))``.

        Args:
            input_ids: token ids (b, t).
            attention_mask: 1 for tokens, 0 for padding, which no token attends to.
            token_type_ids: sentence numbers; 0 for every token when not given.
            places: what ``packing.token_places`` returns for the mask, to compute the tokens
                alone; the hidden states of padding are then zero. Every token when not given.

        Raises:
            DataError: there are more tokens than position embeddings.
        """
        c = self.config
        if input_ids.shape[1] > c.max_position_embeddings:
            raise DataError(
                f"input_ids: got {input_ids.shape[1]} tokens in a row, wanted at most "
                f"{c.max_position_embeddings}, the model's position embeddings; truncate the texts"
            )
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, 1), jnp.int32)
        layout = packing(input_ids.shape, places)
        x = layout.pack(BertEmbeddings(c, name="embeddings")(input_ids, token_type_ids))
        bias = _attention_bias(attention_mask, x.dtype)
        x = BertEncoder(c, self.first_only, name="encoder")(x, bias, layout)
        if not self.first_only:
            x = layout.spread(x)
        return x, nn.tanh(_dense(c)(c.hidden_size, name="pooler.dense")(x[:, 0]))


class BertForSequenceClassification(nn.Module):
    """BERT with a linear classifier on the pooled first token; deterministic, no dropout."""

    config: BertConfig
    num_labels: int

    @nn.compact
    def __call__(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds,
        token_type_ids: TokenTypes | None = None,
        places: Int[Array | np.ndarray, "n"] | None = None,
    ) -> Float[Array, "b labels"]:
        """Return ``classifier(pooled)``; the arguments are those of ``BertModel``."""
        bert = BertModel(self.config, first_only=True, name="bert")
        _, pooled = bert(input_ids, attention_mask, token_type_ids, places)
        return _dense(self.config)(self.num_labels, name="classifier")(pooled)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        AssetError: it is missing, unreadable, not UTF-8, not JSON or not an object.
    """
    lfs_pointers.refuse(Path(path), AssetError)
    try:
        values = parse_json(read_bytes(path))
    except OSError as error:
        raise AssetError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise AssetError(f"{path} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(values, dict):
        raise AssetError(f"{path}: got a JSON {type(values).__name__}, wanted an object")
    return values


def _dense(config: BertConfig) -> partial[nn.Dense]:
    return partial(nn.Dense, kernel_init=nn.initializers.normal(config.initializer_range))


def _layer_norm(config: BertConfig) -> partial[nn.LayerNorm]:
    # E[x²] − E[x]² cancels for activations far from zero; torch computes E[(x − E[x])²]
    return partial(nn.LayerNorm, epsilon=config.layer_norm_eps, use_fast_variance=False)


def _attention_bias(mask: TokenIds, dtype: Any) -> Float[Array, "b 1 1 t"]:
    return jnp.where(mask[:, None, None, :] > 0, jnp.zeros((), dtype), jnp.finfo(dtype).min)


def _split_heads(x: Float[Array, "b t d"], config: BertConfig) -> Float[Array, "b h t e"]:
    b, t, d = x.shape
    heads = config.num_attention_heads
    return x.reshape(b, t, heads, d // heads).swapaxes(1, 2)


def _merge_heads(x: Float[Array, "b h t e"]) -> Float[Array, "b t d"]:
    b, h, t, e = x.shape
    return x.swapaxes(1, 2).reshape(b, t, h * e)


def _attend(
    query: Float[Array, "b h q e"],
    key: Float[Array, "b h k e"],
    value: Float[Array, "b h k e"],
    bias: Float[Array, "b 1 1 k"],
) -> Float[Array, "b h q e"]:
    """``softmax(Q·Kᵀ/√e + bias)·V``, heads ahead of tokens, which XLA runs fastest on CPU.

    The sums of the softmax divide the (q, e) result, not the (q, k) weights.
    """
    scores = jnp.einsum("bhqe,bhke->bhqk", query / math.sqrt(query.shape[-1]), key) + bias
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return jnp.einsum("bhqk,bhke->bhqe", weights, value) / weights.sum(axis=-1, keepdims=True)


def _typed(values: tuple[Any, ...]) -> list[tuple[type, Any]]:
    return [(type(value), value) for value in values]


def _problems(values: Mapping[str, Any]) -> list[str]:
    problems = []
    for field in fields(BertConfig):
        if field.name not in values:
            continue
        value, kind = values[field.name], field.type
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind == "int" and not (number and isinstance(value, int) and value >= 0):
            problems.append(f"{field.name}: got {value!r}, wanted a whole number")
        elif kind == "int" and value == 0 and field.name != "pad_token_id":
            problems.append(f"{field.name}: got 0, wanted at least 1")
        elif kind == "int" and value > _LARGEST:
            problems.append(f"{field.name}: got {value}, wanted at most {_LARGEST:,}")
        elif kind == "float" and not (number and 0 < value < _HUGE):
            problems.append(f"{field.name}: got {value!r}, wanted a positive number")
    for name, supported in _SUPPORTED.items():
        if name in values and (type(values[name]), values[name]) not in _typed(supported):
            wanted = " or ".join(map(repr, supported))
            problems.append(f"{name}: got {values[name]!r}, wanted {wanted}")
    size, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if not problems and size is not None and heads is not None and size % heads:
        problems.append(f"hidden_size: got {size}, wanted a multiple of {heads} attention heads")
    return problems
