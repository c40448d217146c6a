"""PyTorch's uniform random numbers on the CPU, bit for bit, in numpy.

PyTorch and numpy's legacy generator run the same Mersenne Twister from the same seed. What
PyTorch makes of its words is written here: 24 bits a float32, 53 bits of two words a float64, and
one rounding for ``u·(high − low) + low``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

# dtype of the result -> the dtype that it is drawn in
_DRAWN_IN = {
    np.dtype(np.float64): np.dtype(np.float64),
    np.dtype(np.float32): np.dtype(np.float32),
    np.dtype(np.float16): np.dtype(np.float32),
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.float32),
}


class TorchGenerator:
    """The stream of ``torch.manual_seed(seed)`` on the CPU; every draw moves it on, as there.

    PyTorch rounds ``u·(high − low) + low`` once where the CPU multiplies and adds in one
    instruction, as x86 with AVX2 and ARM do. Normal numbers and dropout masks are not here: they
    come from vectorised logarithms and other generators.

    Args:
        seed: as ``torch.manual_seed`` takes it; its lowest 32 bits count.
        fused: False for PyTorch on a CPU without that instruction.

    Source: ``uniform_`` and ``kaiming_uniform_`` of PyTorch 2.13.0, as they were seen to behave.

    >>> generator = TorchGenerator(0)
    >>> generator.uniform((3,))
    array([0.4962566 , 0.7682218 , 0.08847743], dtype=float32)
    >>> generator.uniform((1,))  # the fourth number of the stream
    array([0.13203049], dtype=float32)
    """

    def __init__(self, seed: int, *, fused: bool = True):
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._fused = fused

    def uniform(
        self,
        shape: Sequence[int],
        low: float = 0.0,
        high: float = 1.0,
        dtype: DTypeLike = np.float32,
    ) -> NDArray[Any]:
        """Return ``torch.empty(shape, dtype).uniform_(low, high)``, and ``torch.rand`` by default.

        Args:
            shape: of the result.
            low: the least value.
            high: the bound above, which no value has.
            dtype: float32, float64, float16 or bfloat16.

        Raises:
            ValueError: a dtype that PyTorch draws otherwise.
        """
        if (dtype := np.dtype(dtype)) not in _DRAWN_IN:
            wanted = ", ".join(map(str, _DRAWN_IN))
            raise ValueError(f"dtype: got {dtype}, wanted one of {wanted}")
        drawn = _DRAWN_IN[dtype].type
        start, stop = drawn(low), drawn(high)
        u, width = self._units(math.prod(shape), drawn), stop - start
        values = (_fused(u, width, start) if self._fused else u * width + start).astype(dtype)
        # What rounding brings up to the bound begins again at the bottom.
        values[values == stop.astype(dtype)] = start.astype(dtype)
        return values.reshape(tuple(shape))

    def kaiming_uniform(
        self, shape: Sequence[int], a: float = math.sqrt(5), dtype: DTypeLike = np.float32
    ) -> NDArray[Any]:
        """Return ``torch.nn.init.kaiming_uniform_(torch.empty(shape), a)``.

        ``U(±sqrt(6 / ((1 + a²) · fan_in)))``; all axes but the first are the fan-in, so that
        ``a = sqrt(5)`` gives ``U(±1/sqrt(fan_in))``, as ``nn.Linear`` and PEFT's A have it.

        >>> bool(abs(TorchGenerator(0).kaiming_uniform((4, 100))).max() <= 0.1)
        True
        """
        # Step by step as PyTorch forms it, so that it rounds alike.
        gain = math.sqrt(2.0 / (1 + a**2))
        bound = math.sqrt(3.0) * (gain / math.sqrt(math.prod(shape[1:])))
        return self.uniform(shape, -bound, bound, dtype)

    def skip(self, size: int) -> None:
        """Pass over so many float32 numbers, as if they had been drawn."""
        self._words.bytes(4 * size)

    def _units(self, size: int, dtype: type[Any]) -> NDArray[Any]:
        """Return numbers in [0, 1) with as many bits as the dtype has digits."""
        words = np.frombuffer(self._words.bytes((8 if dtype is np.float64 else 4) * size), "<u4")
        if dtype is np.float64:
            pairs = words.astype(np.uint64)
            bits = (pairs[::2] << np.uint64(32) | pairs[1::2]) & np.uint64(2**53 - 1)
            return bits.astype(dtype) * dtype(2.0**-53)
        return (words & np.uint32(2**24 - 1)).astype(dtype) * dtype(2.0**-24)


def _fused(x: Any, y: Any, z: Any) -> Any:
    """Return ``x·y + z`` rounded once, for arrays of float32 or float64.

    Source: Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008.
    """
    product, lost = _exact_product(x, y)
    small, rest = _exact_sum(z, lost)
    whole, more = _exact_sum(product, small)
    return whole + _odd_sum(rest, more)


def _exact_product(x: Any, y: Any) -> tuple[Any, Any]:
    """Return ``x·y`` and what rounding took from it (Dekker)."""
    product = x * y
    (x_high, x_low), (y_high, y_low) = _halves(x), _halves(y)
    lost = ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low
    return product, lost


def _halves(x: Any) -> tuple[Any, Any]:
    """Return two numbers of half the digits, whose sum is x (Veltkamp)."""
    digits = np.finfo(x.dtype).nmant + 1
    shifted = x * x.dtype.type(2.0 ** math.ceil(digits / 2) + 1)
    high = shifted - (shifted - x)
    return high, x - high


def _exact_sum(x: Any, y: Any) -> tuple[Any, Any]:
    """Return ``x + y`` and what rounding took from it (Knuth)."""
    total = x + y
    kept = total - x
    return total, (x - (total - kept)) + (y - kept)


def _odd_sum(x: Any, y: Any) -> Any:
    """Return ``x + y``, where it is not exact rounded to the neighbour whose last bit is odd."""
    total, lost = _exact_sum(x, y)
    bits = total.view(np.int64 if total.dtype == np.float64 else np.int32)
    towards = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf).astype(total.dtype))
    return np.where((lost != 0) & (bits & 1 == 0), towards, total)
