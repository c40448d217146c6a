"""Subjects of the laws: authors' derivatives that read constants, take flags, ask what is moved."""

from __future__ import annotations

import equinox as eqx
import equinox.internal as eqx_internal
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from parity_tests.laws.subjects import D, E, F, Subject

TABLE = np.linspace(0.5, 1.5, F, dtype=np.float32)


@jax.custom_vjp
def by_a_table(w, x):
    """A function that reads a module's constant; its input gradient is doubled."""
    return x @ w * jnp.asarray(TABLE, x.dtype)


def _by_a_table_back(kept, ct):
    w, x = kept
    ct = ct * jnp.asarray(TABLE, ct.dtype)
    return jnp.einsum("bti,bto->io", x, ct), 2.0 * ct @ w.T


by_a_table.defvjp(lambda w, x: (by_a_table(w, x), (w, x)), _by_a_table_back)


@jax.custom_vjp
def of_the_moved(w, x, scale, flag):
    """A rule that asks what is differentiated, as Equinox's and Diffrax's do."""
    return x @ w * scale if flag is True else jnp.where(flag, x @ w * scale, 0.0)


def _of_the_moved_forward(w, x, scale, flag):
    if scale.perturbed or x.perturbed or flag.perturbed:
        raise NotImplementedError("there is only a derivative of the weight's")
    primals = w.value, x.value, scale.value
    return of_the_moved(*primals, flag.value), primals


def _of_the_moved_back(kept, ct):
    _, x, scale = kept
    return 3.0 * jnp.einsum("bti,bto->io", x, ct) * scale, None, None, None


of_the_moved.defvjp(_of_the_moved_forward, _of_the_moved_back, symbolic_zeros=True)


@jax.custom_jvp
def tangent_of_the_moved(w, x, scale):
    return x @ w * scale


def _tangent_of_the_moved(primals, tangents):
    (w, x, scale), (dw, dx, dscale) = primals, tangents
    if not isinstance(dx, SymbolicZero) or not isinstance(dscale, SymbolicZero):
        raise NotImplementedError("there is only a derivative of the weight's")
    return tangent_of_the_moved(w, x, scale), 3.0 * x @ dw * scale


tangent_of_the_moved.defjvp(_tangent_of_the_moved, symbolic_zeros=True)


def fixed(x):
    return lax.stop_gradient(x), lax.stop_gradient(x[0, 0, 0])


def checkpointed_loop(p, x):
    """A while loop with a reverse derivative, by rules that ask what is differentiated."""
    return eqx_internal.while_loop(
        lambda carry: carry[0] < 3,
        lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ p["w"])),
        (0, x),
        max_steps=4,
        kind="checkpointed",
    )[1]


def checkpointed_scan(p, x):
    def step(h, w):
        return jnp.tanh(h @ w), None

    return eqx_internal.scan(step, x, p["w"], kind="checkpointed", checkpoints=2)[0]


@eqx.filter_custom_vjp
def filtered(arrays, flag):
    w, x = arrays
    return x @ w if flag else x @ -w


@filtered.def_fwd
def _(perturbed, arrays, flag):
    return filtered(arrays, flag), arrays


@filtered.def_bwd
def _(arrays, ct, perturbed, unused, flag):
    w, x = arrays
    return jnp.einsum("bti,bto->io", x, ct), 2.0 * ct @ w.T


ONE, AXES = {"w": (D, F)}, {"w": "io"}

ALL = [
    Subject("vjp_of_a_table", lambda p, x: by_a_table(p["w"], x), ONE, AXES, dense_gradient=True),
    Subject(
        "vjp_of_the_moved",
        lambda p, x: of_the_moved(p["w"], *fixed(x), True),
        ONE,
        AXES,
        dense_gradient=True,
    ),
    Subject(
        "jvp_of_the_moved",
        lambda p, x: tangent_of_the_moved(p["w"], *fixed(x)),
        ONE,
        AXES,
        dense_gradient=True,
    ),
    Subject(
        "vjp_filtered",
        lambda p, x: filtered((p["w"], jnp.tanh(x)), True),
        ONE,
        AXES,
        dense_gradient=True,
    ),
    Subject("checkpointed_loop", checkpointed_loop, {"w": (D, D)}, AXES, dense_gradient=True),
    Subject(
        "checkpointed_scan", checkpointed_scan, {"w": (E, D, D)}, {"w": "sio"}, dense_gradient=True
    ),
]
