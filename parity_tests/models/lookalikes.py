"""Small models built as larger ones are, with their proportions: what their adapters cost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

WIDTH, INNER, STATE, CHUNK = 136, 256, 32, 16  # of the state space model
FANNED, HIDDEN, EXPERTS, CHOSEN, TOKENS = 192, 72, 8, 2, 101  # of the experts
CHANNELS, EXPANDED = 24, 144  # of the convolutions


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def sorted_experts(p, x):
    """Many small experts, the tokens sorted by theirs, as Qwen3's have them."""
    logits = x @ p["gate"]
    weights, ids = lax.top_k(jax.nn.softmax(logits), CHOSEN)
    order, sizes = jnp.argsort(ids.reshape(-1)), jnp.bincount(ids.reshape(-1), length=EXPERTS)
    rows = x[order // CHOSEN]
    gated = jax.nn.silu(lax.ragged_dot(rows, p["gate_proj"], sizes))
    rows = lax.ragged_dot(gated * lax.ragged_dot(rows, p["up_proj"], sizes), p["down_proj"], sizes)
    back = rows[jnp.argsort(order)].reshape(len(x), CHOSEN, -1)
    return x + jnp.einsum("tkd,tk->td", back, weights.astype(x.dtype))


def sharded_experts(p, x):
    """All experts see all tokens, some of them on each device."""
    devices = min(2, jax.device_count())
    mesh = jax.make_mesh((devices,), ("expert",), axis_types=(AxisType.Auto,))

    def local(gate, up, down, x):
        mine = up.shape[0]
        start = lax.axis_index("expert") * mine
        share = lax.dynamic_slice_in_dim(jax.nn.softmax(x @ gate), start, mine, 1)
        h = jax.nn.silu(jnp.einsum("td,edh->eth", x, up))
        return lax.psum(jnp.einsum("eth,ehd,te->td", h, down, share), "expert")

    specs = (P(), P("expert"), P("expert"), P())
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    return x + mapped(p["gate"], p["up_proj"], p["down_proj"], x)


def state_space(p, x, heads=4):
    """Mamba 2: one projection for all parts, a causal convolution, chunks of a recurrence."""
    batch, tokens, _ = x.shape
    blocks, own = (batch, tokens // CHUNK, CHUNK), INNER // heads
    z, xbc, dt = jnp.split(x @ p["in_proj"], [INNER, 2 * INNER + 2 * STATE], -1)
    dims = ("NWC", "WIO", "NWC")
    options = dict(dimension_numbers=dims, feature_group_count=xbc.shape[-1])
    xbc = jax.nn.silu(lax.conv_general_dilated(xbc, p["conv1d"], (1,), [(3, 0)], **options))
    u, b, c = jnp.split(xbc, [INNER, INNER + STATE], -1)
    dt = jax.nn.softplus(dt).reshape(*blocks, heads)
    u, b, c = (
        u.reshape(*blocks, heads, own) * dt[..., None],
        *(part.reshape(*blocks, STATE) for part in (b, c)),
    )
    a = jnp.cumsum(-dt * jnp.exp(p["a_log"]), 2)
    earlier = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))[:, :, None]
    decay = jnp.where(earlier, jnp.exp(a[:, :, :, None] - a[:, :, None]), 0)
    y = jnp.einsum("bncs,bnms,bncmh,bnmhd->bnchd", c, b, decay, u)
    states = jnp.einsum("bnms,bnmh,bnmhd->nbhds", b, jnp.exp(a[:, :, -1:] - a), u)
    last = jnp.exp(a[:, :, -1]).transpose(1, 0, 2)

    def step(h, now):
        return h * now[0][:, :, None, None] + now[1], h

    before = lax.scan(step, jnp.zeros(states.shape[1:], x.dtype), (last, states))[1]
    y = y + jnp.einsum("bncs,nbhds,bnch->bnchd", c, before, jnp.exp(a))
    return x + (y.reshape(batch, tokens, INNER) * jax.nn.silu(z)) @ p["out_proj"]


def inverted_bottleneck(p, x):
    """EfficientNet's block: 1×1 to more channels, depthwise 3×3, squeeze and excite, 1×1 back."""

    def conv(x, w, groups=1):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=groups
        )

    h = jax.nn.silu(conv(x, p["expand"]))
    h = jax.nn.silu(conv(h, p["depthwise"], EXPANDED))
    squeezed = jax.nn.silu(conv(h.mean((1, 2), keepdims=True), p["reduce"]))
    return x + conv(h * jax.nn.sigmoid(conv(squeezed, p["excite"])), p["project"])


_EXPERTS = {
    "gate": shape(FANNED, EXPERTS),
    "gate_proj": shape(EXPERTS, FANNED, HIDDEN),
    "up_proj": shape(EXPERTS, FANNED, HIDDEN),
    "down_proj": shape(EXPERTS, HIDDEN, FANNED),
}
# The function, its parameters, its input, and what is adapted.
ALL = {
    "experts sorted": (
        sorted_experts,
        _EXPERTS,
        shape(TOKENS, FANNED),
        ["gate_proj", "up_proj", "down_proj"],
    ),
    "experts in shards": (
        sharded_experts,
        _EXPERTS,
        shape(TOKENS, FANNED),
        ["up_proj", "down_proj"],
    ),
    "state space": (
        state_space,
        {
            "in_proj": shape(WIDTH, 2 * INNER + 2 * STATE + 4),
            "conv1d": shape(4, 1, INNER + 2 * STATE),
            "a_log": shape(4),
            "out_proj": shape(INNER, WIDTH),
        },
        shape(2, 64, WIDTH),
        ["in_proj", "conv1d", "out_proj"],
    ),
    "convolutions": (
        inverted_bottleneck,
        {
            "expand": shape(1, 1, CHANNELS, EXPANDED),
            "depthwise": shape(3, 3, 1, EXPANDED),
            "reduce": shape(1, 1, EXPANDED, 10),
            "excite": shape(1, 1, 10, EXPANDED),
            "project": shape(1, 1, EXPANDED, CHANNELS),
        },
        shape(2, 14, 14, CHANNELS),
        ["expand", "depthwise", "reduce", "excite", "project"],
    ),
}
