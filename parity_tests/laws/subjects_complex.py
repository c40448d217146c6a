"""Subjects of the laws: complex numbers that multiply a weight, and complex weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from parity_tests.laws.subjects import D, F, K, L, Subject


@dataclass(frozen=True)
class Complex(Subject):
    """A subject whose weights are complex; its input is real."""

    def draw(self, dtype: Any = np.float32) -> tuple[dict[str, Any], jax.Array]:
        real, x = super().draw(dtype)
        rng = np.random.default_rng(7)
        return {
            path: lax.complex(w, jnp.asarray(rng.normal(size=w.shape) / 5, dtype))
            for path, w in real.items()
        }, x


def parts(y):
    """Return a complex result as two real ones: the laws differentiate their sum."""
    return jnp.stack([y.real, y.imag])


def made(x):
    """Read a real array as complex."""
    return lax.convert_element_type(x, jnp.complex64 if x.dtype == jnp.float32 else jnp.complex128)


def read_complex(x, w):
    """Multiply with a weight in the dtype of complex values, as the author must."""
    return parts(made(x) @ w)


def tracked_number(p, x):
    """A number that only the run knows."""
    return read_complex(x, made(p["w"]) * jnp.exp(1j * made(x.mean())))


def turned_layers(p, x):
    """Stacked layers, turned before the scan; their real and imaginary parts act."""
    turned = made(p["w"]) * (0.6 + 0.8j)
    return lax.scan(lambda h, w: (jnp.tanh(h @ w.real) @ w.imag, None), x, turned)[0]


def joined(p, x):
    """A turned weight beside one that is not: both have complex A and B then."""
    return read_complex(x, jnp.concatenate([1j * made(p["a"]), made(p["b"])], axis=1))


ONE, AXES = {"w": (D, F)}, {"w": "io"}

ALL = [
    Subject(
        "number_complex", lambda p, x: read_complex(x, made(p["w"]) * (2 - 1j) / 3j), ONE, AXES
    ),
    Subject("number_complex_traced", tracked_number, ONE, AXES),
    Subject(
        "complex_read",
        lambda p, x: read_complex(x, made(p["w"])),
        ONE,
        AXES,
    ),
    Subject(
        "complex_made",
        lambda p, x: read_complex(x, lax.complex(jnp.ones((D, F), x.dtype), p["w"])),
        ONE,
        AXES,
    ),
    Subject(
        "complex_of_two",
        lambda p, x: read_complex(x, lax.complex(p["w"][0], p["w"][1])),
        {"w": (2, D, F)},
        {"w": "sio"},
    ),
    Subject("complex_joined", joined, {"a": (D, F), "b": (D, K)}, {"a": "io", "b": "io"}),
    Subject("complex_layers", turned_layers, {"w": (L, D, D)}, {"w": "sio"}, sites=2),
    Complex("complex_conjugate", lambda p, x: read_complex(x, 1j * p["w"].conj()), ONE, AXES),
    Complex(
        "complex_both_parts",
        lambda p, x: (
            jnp.tanh(x @ p["w"].real) @ p["w"].imag.T + x @ (1j * p["w"].T).imag.T @ p["v"].real
        ),
        {"w": (D, F), "v": (F, D)},
        AXES,
        sites=2,
    ),
]
