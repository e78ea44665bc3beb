"""Arrays times weights, without rounding, and which elements are small.

A product of more bits than a float64 has is the sum of two. Which elements are below a power of two
is told from their bits, as whole numbers: one comparison, and what is not finite is found with it.
"""

from __future__ import annotations

from math import ldexp
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.exact.error_free import UPPER_BITS
from fedavg_core.exact.positions import positions
from fedavg_core.weight import pieces

__all__ = [
    "LONG_WEIGHT",
    "SHORT_WEIGHT",
    "SPARSE",
    "Products",
    "Scratch",
    "below",
    "has_bits",
    "magnitude_below",
    "products",
]

Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.intp]
Products: TypeAlias = "tuple[Floats, Floats | None, Floats]"

SHORT_WEIGHT = 53 - 24
"""Bits of a weight whose product with a float32 is a float64."""

LONG_WEIGHT = {np.dtype(np.float32): 53, np.dtype(np.float64): 27}
"""Bits of a weight whose products with values of a dtype are sums of two float64."""

SPARSE = 4
"""Up to n / 2**SPARSE elements are picked out one by one."""

_NOWHERE: Indices = np.empty(0, np.intp)
_HALF = np.uint64(1 << 26)


class Scratch:
    """Buffers for additions, so that the fast way hardly allocates: one for each thread that adds.

    Args:
        size: The largest number of elements of an addition.

    Attributes:
        product: For products.
        bits: For bit patterns, before there are products: in the same memory.
        small: For a mask, likewise.
        spare, whole: For anything else.
        mask: For a mask that is kept while the others serve.
        buffers: The arrays of float64.
    """

    def __init__(self, size: int) -> None:
        self.product = np.empty(size, np.float64)
        self.spare = np.empty(size, np.float64)
        self.whole = np.empty(size, np.float64)
        self.mask = np.empty(size, np.bool_)
        self.buffers = self.product, self.spare, self.whole
        # The less memory in use, the more of it stays in the cache.
        self.bits = self.product.view(np.uint32)[:size]
        self.small = self.product.view(np.bool_)[4 * size : 5 * size]


def below(
    bits: npt.NDArray[np.uint32], least: int, small: npt.NDArray[np.bool_]
) -> tuple[Indices | None, bool]:
    """Where float32 values are less than a power of two.

    Args:
        bits: The values' bits, their signs shifted out.
        least: The power's exponent. Up to the least normal number's, none are told: all float32
            values are multiples of one that its last bit has.
        small: As many places; overwritten.

    Returns:
        The positions, and whether there may be zeros in others; None if they are too many to be
        picked out, zeros aside.
    """
    if least <= -126:
        return _NOWHERE, True
    if least > 127:
        return None, True
    return _few(np.less(bits, np.uint32((least + 127) << 24), out=small), bits)


def magnitude_below(magnitude: Floats, least: int, small: npt.NDArray[np.bool_]) -> Indices | None:
    """The same for the magnitudes of float64 values, and without a word about zeros.

    The power is one that a normal number has.
    """
    return _few(np.less(magnitude, ldexp(1.0, least), out=small), magnitude)[0]


def _few(small: npt.NDArray[np.bool_], values: npt.NDArray[Any]) -> tuple[Indices | None, bool]:
    most = small.size >> SPARSE
    where = positions(small, most)
    if where is not None:
        return where, False
    return positions(np.logical_and(small, values, out=small), most), True


def products(values: npt.NDArray[Any], odd: int, exponent: int, scratch: Scratch) -> Products:
    """Values times ``odd · 2**exponent``, exactly, as sums of two.

    With float32 values the weight is cut in two, of SHORT_WEIGHT bits at most; float64 values are
    cut themselves, into 26 bits each (Dekker, 1971).

    Args:
        values: The values, of which the largest is below 2**1023 in magnitude; only read.
        odd: An integer of at most LONG_WEIGHT bits.
        exponent: An exponent.
        scratch: Buffers, in which the result is.

    Returns:
        The two, the second None if it is zero everywhere, and a third array whose contents do not
        matter. Products of which a float64 cannot hold every bit are only nearly right.
    """
    n = values.size
    high, low, other = scratch.product[:n], scratch.spare[:n], scratch.whole[:n]
    if values.dtype == np.float32:
        upper, *lower = pieces(odd, exponent, SHORT_WEIGHT)
        np.multiply(values, ldexp(*upper), out=high, dtype=np.float64)
        if not lower:
            return high, None, other
        np.multiply(values, ldexp(*lower[0]), out=low, dtype=np.float64)
        return high, low, other
    bits = np.add(values.view(np.uint64), _HALF, out=high.view(np.uint64))
    bits &= UPPER_BITS
    np.subtract(values, high, out=low)
    factor = ldexp(odd, exponent)
    high *= factor
    if not has_bits(low):
        return high, None, other
    low *= factor
    return high, low, other


def has_bits(values: Floats) -> bool:
    """Whether an array has something else than zeros: soon told, if it has."""
    return bool(values.view(np.bool_).any())
