"""What planning accepts the call does, what it refuses the call refuses: on what authors write.

The laws hold this on every subject; here are odd ways of using a weight, most of them linear in
it, of which some have rules and some have none. Which, nobody needs to say: only that planning
says the same as the call, and that what runs is right.
"""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lora_jax import Adapter, LoraConfig, lora, merge, plan
from lora_jax.core.adapter import a_shape, b_shape
from lora_jax.core.errors import AdapterError, PlanError
from parity_tests.laws import laws
from parity_tests.tiers import cases

D, F, E = 8, 6, 4
MATRIX, STACK, HEADS = (D, F), (E, D, F), (D, 2, 3)
IDS, ORDER = jnp.array([1, 3, 0]), np.array([5, 1, 3, 2, 0, 4])
SAVED = jax.checkpoint_policies.save_only_these_names("w")
einsum = partial(jnp.einsum, optimize=False)

# name -> the function of w and x, and w's shape
USES = {
    "plain": (lambda w, x: x @ w, MATRIX),
    "checkpoint_name": (lambda w, x: x @ checkpoint_name(w, "w"), MATRIX),
    "saved_name": (
        lambda w, x: jax.checkpoint(lambda w, x: x @ checkpoint_name(w, "w"), policy=SAVED)(w, x),
        MATRIX,
    ),
    "device_put": (lambda w, x: x @ jax.device_put(w, jax.devices()[0]), MATRIX),
    "to_the_device": (lambda w, x: x @ jax.device_put(w, jax.memory.Space.Device), MATRIX),
    "repeat_out": (lambda w, x: x @ jnp.repeat(w, 2, axis=1), MATRIX),
    "repeat_in": (lambda w, x: jnp.tile(x, 2) @ jnp.repeat(w, 2, axis=0), MATRIX),
    "repeat_heads": (lambda w, x: einsum("td,dkh->tkh", x, jnp.repeat(w, 2, axis=1)), HEADS),
    "repeat_inside_heads": (lambda w, x: einsum("td,dkh->tkh", x, jnp.repeat(w, 2, 2)), HEADS),
    "repeat_experts": (lambda w, x: einsum("td,edf->etf", x, jnp.repeat(w, 2, axis=0)), STACK),
    "repeat_with_the_input": (
        lambda w, x: einsum("etd,edf->etf", jnp.stack([x] * 2 * E), jnp.repeat(w, 2, axis=0)),
        STACK,
    ),
    "repeat_of_a_repeat": (lambda w, x: x @ jnp.repeat(jnp.repeat(w, 2, 1), 3, axis=1), MATRIX),
    "repeat_back": (lambda w, x: (x @ (v := jnp.repeat(w, 2, 1))) @ v.T, MATRIX),
    "groups": (
        lambda w, x: einsum("td,dkgh->tkgh", x, jnp.broadcast_to(w[:, :, None], (D, 2, 2, 3))),
        HEADS,
    ),
    "one_head_for_all": (
        lambda w, x: einsum("td,dkh->tkh", x, jnp.broadcast_to(w, (D, 4, 3))),
        (D, 1, 3),
    ),
    "one_row_for_all": (lambda w, x: x @ jnp.broadcast_to(w, (D, F)), (1, F)),
    "repeat_then_part": (lambda w, x: x @ jnp.repeat(w, 2, axis=1)[:, 3:7], MATRIX),
    "tile_out": (lambda w, x: x @ jnp.tile(w, (1, 2)), MATRIX),
    "tile_in": (lambda w, x: jnp.tile(x, 2) @ jnp.tile(w, (2, 1)), MATRIX),
    "tile_new_axis": (lambda w, x: x @ jnp.tile(w, (3, 1, 1)), MATRIX),
    "flip": (lambda w, x: x @ jnp.flip(w, 1), MATRIX),
    "roll": (lambda w, x: x @ jnp.roll(w, 1, 1), MATRIX),
    "columns_by_index": (lambda w, x: x @ w[:, ORDER], MATRIX),
    "heads_by_index": (lambda w, x: einsum("td,dkh->tkh", x, w[:, np.array([0, 0, 1])]), HEADS),
    "heads_by_index_in": (lambda w, x: einsum("td,dkh->tk", x, w[:, np.array([0, 0, 1])]), HEADS),
    "strided": (lambda w, x: (x @ w[:, ::2]) * (x @ w[:, 1::2]), MATRIX),
    "pad": (lambda w, x: x @ jnp.pad(w, ((0, 0), (0, 2))), MATRIX),
    "split_inputs": (lambda w, x: x[:, :4] @ w.reshape(4, 12), MATRIX),
    "merged_inputs": (lambda w, x: x @ w.reshape(D, F), (4, 2, F)),
    "both_ways": (lambda w, x: x @ w @ w.T, MATRIX),
    "two_axes_two_ways": (
        lambda w, x: einsum("td,dkh->tkh", x, w).sum() * einsum("tk,dkh->tdh", x[:, :2], w),
        HEADS,
    ),
    "three_ways": (
        lambda w, x: (einsum("td,dkh->tkh", x, w), einsum("th,dkh->tdk", x[:, :3], w)),
        HEADS,
    ),
    "rows_by_index": (lambda w, x: w[IDS] * x[:, :F], MATRIX),
    "row_by_row": (lambda w, x: jax.vmap(lambda i: w[i])(IDS) * x[:, :F], MATRIX),
    "experts_by_index": (lambda w, x: einsum("bd,bdf->bf", x, w[IDS]), STACK),
    "experts_one_by_one": (lambda w, x: jax.vmap(lambda i, v: v @ w[i])(IDS, x), STACK),
    "experts_soup": (lambda w, x: x @ w.mean(0), STACK),
    "experts_mixed": (lambda w, x: x @ einsum("e,edf->df", x[0, :E], w), STACK),
    "masked": (lambda w, x: x @ (w * jnp.ones(MATRIX)), MATRIX),
    "column_scales": (lambda w, x: x @ (w * jnp.arange(1.0, F + 1)), MATRIX),
    "weight_norm": (lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0)), MATRIX),
    "lower_triangle": (lambda w, x: x @ jnp.tril(w), MATRIX),
    "added_zero": (lambda w, x: x @ (w + 0.0), MATRIX),
    "sum_of_slices": (lambda w, x: x @ (w[0] + w[1]), STACK),
    "difference_of_slices": (lambda w, x: x @ (w[0] - 2 * w[1]), STACK),
    "sum_of_ways": (lambda w, x: x[:, :F] @ (w[:F] + w[:F].T), MATRIX),
    "two_real_parts": (lambda w, x: jnp.abs(lax.complex(x, x) @ lax.complex(w[0], w[1])), STACK),
    "fourier": (lambda w, x: jnp.abs(lax.complex(x, x) @ jnp.fft.fft(w, axis=1)), MATRIX),
    "chosen": (lambda w, x: x @ jnp.where(x.sum() > 0, w[0], w[1]), STACK),
    "chosen_by_row": (
        lambda w, x: x @ jnp.where((jnp.arange(D) > 2)[:, None], w[0], w[1]),
        STACK,
    ),
    "chosen_one_by_one": (lambda w, x: x @ jnp.where(w[1] > 0, w[0], 0.0), STACK),
    "chosen_for_each": (
        lambda w, x: jax.vmap(lambda v: lax.cond(v[0] > 0, lambda: v @ w[0], lambda: v @ w[1]))(x),
        STACK,
    ),
    "chosen_or_data": (lambda w, x: x @ jnp.where(x.sum() > 0, w, x[0, :F]), MATRIX),
    "row_by_data": (lambda w, x: w[jnp.argmax(x)] * x[:, :F], MATRIX),
    "row_by_number": (lambda w, x: w[3] * x[:, :F], MATRIX),
    "element_by_data": (lambda w, x: w[jnp.argmax(x), jnp.argmin(x)] * x, MATRIX),
    "branches": (lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ (2 * w)), MATRIX),
    "loop_over": (
        lambda w, x: lax.fori_loop(0, E, lambda i, h: jnp.tanh(h @ w[i]) @ w[i].T, x),
        STACK,
    ),
    "sum_of_parts": (lambda w, x: x @ (w[:, :3] + 2 * w[:, 3:]), MATRIX),
    "sum_of_halves": (lambda w, x: x[:, :4] @ (w[:4] - w[4:] / 3), MATRIX),
    "sum_of_three": (lambda w, x: x @ sum(w), STACK),
    "plus_constants": (lambda w, x: x @ (np.float32(1) - w + jnp.arange(6.0)), MATRIX),
    "plus_its_own_constant": (lambda w, x: x @ (w + 0.5 * lax.stop_gradient(w)), MATRIX),
    "plus_data": (lambda w, x: x @ (w + x[:1].T), MATRIX),
    "plus_noise": (lambda w, x: x @ (w + jax.random.normal(jax.random.key(0), w.shape)), MATRIX),
    "plus_a_sum": (lambda w, x: x @ (w[0] + w[1:].sum(0)), STACK),
    "soup_of_repeated": (lambda w, x: x @ jnp.broadcast_to(w, (3, D, F)).mean(0), MATRIX),
    "soup_of_heads": (lambda w, x: x @ w.sum(1), HEADS),
    "soup_in_turn": (
        lambda w, x: lax.scan(lambda h, e: (h @ (e[0] + e[1]) @ e[2].T, None), x, w[None])[0],
        STACK,
    ),
    "both_parts_complex": (
        lambda w, x: jnp.abs(lax.complex(x, x) @ ((v := w.astype("complex64"))[0] + 1j * v[1])),
        STACK,
    ),
    "set_to_zero": (lambda w, x: x @ w.at[:, :2].set(0.0), MATRIX),
    "penalised": (lambda w, x: (x @ w).sum() + (w**2).sum(), MATRIX),
    "shape_alone": (lambda w, x: x * w.shape[1], MATRIX),
    "like": (lambda w, x: x @ jnp.ones_like(w), MATRIX),
    "unused_view": (lambda w, x: (w.T, x)[1], MATRIX),
    "returned": (lambda w, x: (x @ w, w), MATRIX),
    "kron": (lambda w, x: x[:, :4] @ jnp.kron(w[:2, :3], jnp.eye(2)), MATRIX),
    "bilinear": (lambda w, x: einsum("bi,ijk,bj->bk", x[:, :E], w, x), STACK),
    "scan_over_columns": (lambda w, x: lax.scan(lambda c, v: (c, x @ v), 0.0, w.T)[1], MATRIX),
    "scan_over_rows_too": (
        lambda w, x: (x @ w, lax.scan(lambda c, v: (c, x[:, :F] @ v), 0.0, w)[1]),
        MATRIX,
    ),
    "joined_with_itself": (lambda w, x: x @ jnp.concatenate([w, w], 1), MATRIX),
    "joined_both_ways": (lambda w, x: x[:, :F] @ jnp.concatenate([w[:F], w[:F].T], 1), MATRIX),
    "stacked_with_itself": (lambda w, x: einsum("td,edf->etf", x, jnp.stack([w, w])), MATRIX),
}
FIELDS = {
    "plain": {},
    "DoRA": dict(use_dora=True),
    "bias": dict(lora_bias=True),
    "formed": dict(on_unsupported="materialize"),
}


def drawn(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 3, jnp.float32)


def fitting(shape, config):
    """Yield the adapters that a weight of this shape could have, whatever its use is."""
    for letters in itertools.product("ios", repeat=len(shape)):
        axes = "".join(letters)
        # Planning reads stacked axes off a loop or a batch, and those come first here.
        if not {"i", "o"} <= set(axes) or "s" in axes[1:]:
            continue
        a, b = jnp.ones(a_shape(shape, axes, 2)), jnp.ones(b_shape(shape, axes, 2))
        thin = jnp.ones(tuple(n for n, s in zip(shape, axes, strict=True) if s != "i"))
        yield {
            "w": Adapter(
                a,
                b,
                2.0,
                axes,
                magnitude=thin if config.use_dora else None,
                bias=thin if config.lora_bias else None,
            )
        }


# Uses that low-rank pairs alone have a rule for.
FOLLOWED = {
    *("plain", "checkpoint_name", "saved_name", "device_put", "to_the_device", "flip", "roll"),
    *("repeat_out", "repeat_in", "repeat_heads", "repeat_inside_heads", "repeat_experts"),
    *("repeat_with_the_input", "repeat_of_a_repeat", "repeat_then_part", "repeat_back"),
    *("sum_of_slices", "difference_of_slices", "sum_of_parts", "sum_of_halves", "sum_of_three"),
    *("plus_constants", "plus_its_own_constant", "plus_noise", "plus_a_sum", "experts_soup"),
    *("soup_of_repeated", "soup_of_heads", "soup_in_turn", "added_zero", "two_real_parts"),
    *("both_parts_complex", "chosen", "chosen_for_each", "row_by_data"),
    *("groups", "one_head_for_all", "one_row_for_all", "tile_out", "tile_in", "tile_new_axis"),
}


@pytest.mark.parametrize("kind", cases(FIELDS, slow=("bias", "formed")))
def test_planning_and_calling_agree(kind):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["w"], **FIELDS[kind])
    x, accepted, differ = drawn((3, D)), {}, []
    for name, (use, shape) in USES.items():
        fn, params = lambda p, x, use=use: use(p["w"], x), {"w": drawn(shape, 1)}
        call = partial(jax.eval_shape, lora(fn), params)
        try:
            adapters = plan(fn, params, config, x).abstract()
        except PlanError:
            for wrong in fitting(shape, config):
                try:
                    call(wrong, x)
                except (PlanError, AdapterError):
                    continue
                differ.append(f"{name}: planning refuses it, calling does it, {wrong['w'].axes}")
        else:
            try:
                call(adapters, x)
                accepted[name] = fn, params, adapters
            except Exception as error:
                differ.append(f"{name}: planning accepts it, calling says {error}")
    assert not differ, "\n".join(differ)
    if kind in ("plain", "formed"):
        assert accepted.keys() >= FOLLOWED
    if not config.lora_bias:  # which no weight holds alone
        held_to_the_merged(accepted, x)


def held_to_the_merged(accepted, x):
    drawn_as = lambda tree: jax.tree.map(lambda leaf: drawn(leaf.shape, 2), tree)  # noqa: E731
    arguments = {name: (p, drawn_as(adapters)) for name, (_, p, adapters) in accepted.items()}

    def both(arguments, x):
        fns = {name: fn for name, (fn, *_) in accepted.items()}
        got = {name: lora(fns[name])(p, a, x) for name, (p, a) in arguments.items()}
        return got, {name: fns[name](merge(p, a), x) for name, (p, a) in arguments.items()}

    with laws.quick_compilation():
        got, wanted = jax.jit(both)(arguments, x)
    wrong = {name: laws.relative(got[name], wanted[name]) for name in accepted}
    assert not {name: far for name, far in wrong.items() if far > 1e-5}
