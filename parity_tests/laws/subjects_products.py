"""Subjects of the laws: convolutions, lookups, ragged products, and parts of fused kernels."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from parity_tests.laws.subjects import B, D, E, F, H, K, Subject, T, V

C, N, G = 6, 10, 2  # channels, out channels, groups
IDS = np.random.default_rng(3).integers(0, V, (B, T), np.int32)
CHOICES = IDS[:, :2] % E  # two experts for each example
ROWS = np.array([4, 0, 7], np.int32)  # rows of each group of a ragged product


def conv(dimensions: str, **options):
    """Return ``x∗w`` for kernels with the window ahead of channels, as Flax has them."""
    options = dict(window_strides=(1,) * len(dimensions), padding="SAME") | options

    def fn(p, x):
        spec = (f"N{dimensions}C", f"{dimensions}IO", f"N{dimensions}C")
        return jnp.tanh(lax.conv_general_dilated(x, p["w"], dimension_numbers=spec, **options))

    return fn


def torch_conv(p, x):
    """PyTorch's layout: batch and channels first, kernels ``(out, in, *window)``."""
    return lax.conv_general_dilated(x, p["w"], (2, 1), [(1, 1), (2, 0)], rhs_dilation=(1, 2))


def conv_transpose(p, x):
    return lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def input_gradient(p, x):
    """A convolution and its own gradient, which reads the kernel the other way round."""
    return jax.grad(lambda x: jnp.sum(jnp.sin(conv("H")(p, x))))(x)


def embed(p, x):
    return jnp.tanh(jnp.take(p["w"], IDS, axis=0)) * x


def tied_embedding(p, x):
    return jnp.tanh(p["w"][IDS] * x) @ p["w"].T


def head_before_embedding(p, x):
    return jnp.sum(x @ p["w"].T) * p["w"][IDS]


def experts_by_index(p, x):
    return jnp.einsum("bd,bdf->bf", x, p["w"][IDS[:, 0] % E])


def one_at_a_time(p, ids):
    """Rows looked up as Equinox's models do: a scalar index, under ``vmap``."""
    return jax.vmap(jax.vmap(eqx.nn.Embedding(weight=p["w"])))(ids)


def one_row(p, x):
    """One row outside of ``vmap``, such as a decoder's last token, and the tied head."""
    token = jnp.argmax(x[0]) % V
    return jnp.tanh(p["w"][token] * x) @ p["w"].T


def rows_in_turn(p, x):
    """One row in each step of a loop, and a range of them that begins where the data says."""
    ids = jnp.argsort(x[:, 0])
    summed, seen = lax.scan(lambda h, i: (h + p["w"][i], jnp.sin(p["w"][i])), x[0], ids)
    return summed, seen, lax.dynamic_slice_in_dim(p["w"], ids[0], 3) * x[:3]


def padded(p, x):
    """An embedding whose padding token is a row of zeros."""
    return jnp.where((IDS == 0)[..., None], 0.0, p["w"][IDS]) * x


def windows(p, x):
    """Position embeddings that begin elsewhere in each example, some beyond the end."""
    starts = jnp.asarray(np.arange(B) * 4)
    taken = jax.vmap(lambda start: lax.dynamic_slice_in_dim(p["w"], start, T))(starts)
    return jnp.tanh(taken) * x


def experts_by_choices(p, x):
    """Each example has two experts, whose results are weighted and summed."""
    h = jnp.einsum("bd,bkdf->bkf", x, p["w"][CHOICES])
    return jnp.einsum("bkf,bkfd,bk->bd", jnp.tanh(h), p["v"][CHOICES], jax.nn.softmax(x[:, :2]))


def experts_one_at_a_time(p, x):
    """One expert for each example, under ``vmap``, of the second of the stacked layers."""
    return jax.vmap(lambda which, x: jnp.tanh(x @ p["w"][1, which]))(jnp.asarray(CHOICES[:, 0]), x)


def ragged(p, x):
    return jnp.tanh(lax.ragged_dot(x, p["w"], jnp.asarray(ROWS)))


def ragged_back(p, x):
    """The rows' gradient of a ragged product sums over the out axis."""
    return jax.grad(lambda x: jnp.sum(jnp.sin(lax.ragged_dot(x, p["w"], jnp.asarray(ROWS)))))(x)


def fused(p, x):
    q, k, v = jnp.split(x @ p["w"], 3, axis=-1)
    return jax.nn.softmax(q * k) * v


ALL = [
    Subject("conv_1d", conv("H"), {"w": (3, C, N)}, {"w": "iio"}, x=(B, T, C)),
    Subject(
        "conv_2d_strided",
        conv("HW", window_strides=(2, 1), padding="VALID"),
        {"w": (3, 2, C, N)},
        {"w": "iiio"},
        x=(B, 7, 8, C),
    ),
    Subject("conv_2d_torch", torch_conv, {"w": (N, C, 3, 2)}, {"w": "oiii"}, x=(B, C, 7, 8)),
    Subject(
        "conv_2d_groups",
        conv("HW", feature_group_count=G),
        {"w": (3, 2, C // G, N)},
        {"w": "iiio"},
        x=(B, 7, 8, C),
    ),
    Subject(
        "conv_depthwise",
        conv("HW", feature_group_count=C),
        {"w": (3, 2, 1, 2 * C)},
        {"w": "iiio"},
        x=(B, 7, 8, C),
    ),
    Subject(
        "conv_3d_dilated",
        conv("DHW", rhs_dilation=(1, 2, 1)),
        {"w": (2, 3, 2, C, N)},
        {"w": "iiiio"},
        x=(2, 5, 7, 4, C),
    ),
    Subject("conv_transpose", conv_transpose, {"w": (3, 2, C, N)}, {"w": "iiio"}, x=(B, 4, 5, C)),
    Subject(
        "conv_input_gradient", input_gradient, {"w": (3, C, N)}, {"w": "iio"}, x=(B, T, C), sites=2
    ),
    Subject("embedding", embed, {"w": (V, D)}, {"w": "io"}),
    Subject("embedding_tied_to_the_head", tied_embedding, {"w": (V, D)}, {"w": "io"}, sites=2),
    Subject("embedding_after_the_head", head_before_embedding, {"w": (V, D)}, {"w": "io"}, sites=2),
    Subject(
        "embedding_columns",
        lambda p, x: jnp.take(p["w"], IDS, axis=1).transpose(1, 2, 0) * x,
        {"w": (D, V)},
        {"w": "oi"},
    ),
    Subject(
        "embedding_one_hot",
        lambda p, x: (jax.nn.one_hot(IDS, V, dtype=x.dtype) @ p["w"]) * x,
        {"w": (V, D)},
        {"w": "io"},
    ),
    Subject(
        "embedding_one_at_a_time",
        lambda p, x: jnp.tanh(one_at_a_time(p, jnp.asarray(IDS)) * x) @ p["w"].T,
        {"w": (V, D)},
        {"w": "io"},
        sites=2,
    ),
    Subject("embedding_of_one", one_row, {"w": (V, D)}, {"w": "io"}, (B, D), sites=2),
    Subject("embedding_rows_in_turn", rows_in_turn, {"w": (V, D)}, {"w": "io"}, (B, D), sites=3),
    Subject("embedding_padded", padded, {"w": (V, D)}, {"w": "io"}),
    Subject("embedding_windows", windows, {"w": (V, D)}, {"w": "io"}),
    Subject(
        "experts_by_choices",
        experts_by_choices,
        {"w": (E, D, F), "v": (E, F, D)},
        {"w": "sio", "v": "sio"},
        x=(B, D),
    ),
    Subject(
        "experts_one_at_a_time",
        experts_one_at_a_time,
        {"w": (3, E, D, F)},
        {"w": "ssio"},
        x=(B, D),
    ),
    Subject("experts_by_index", experts_by_index, {"w": (E, D, F)}, {"w": "sio"}, x=(B, D)),
    Subject("ragged_dot", ragged, {"w": (len(ROWS), D, F)}, {"w": "sio"}, x=(B, D), vmaps=False),
    Subject(
        "ragged_dot_back",
        ragged_back,
        {"w": (len(ROWS), D, F)},
        {"w": "sio"},
        x=(B, D),
        sites=2,
        vmaps=False,
    ),
    Subject(
        "fused_qkv_query_and_value",
        fused,
        {"w": (D, 3 * F)},
        {"w": "io"},
        options={"output_slices": {"w": [(0, F), (2 * F, 3 * F)]}},
    ),
    Subject(
        "fused_heads_of_query",
        lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["w"]),
        {"w": (D, H, K)},
        {"w": "ioo"},
        options={"output_slices": {"w": [(1, H)]}},
    ),
]
