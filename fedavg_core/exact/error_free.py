"""Sums and products of float64 with what their rounding loses."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["UPPER_BITS", "two_product", "two_sum"]

Floats: TypeAlias = npt.NDArray[np.float64]

UPPER_BITS = np.uint64((1 << 64) - (1 << 27))
"""Of a float64's bits those that leave 26 of its 53, so that products with as few are exact."""

_SPLITTER = 2.0**27 + 1


def two_sum(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """The sum a + b as an exact sum of two float64 (Knuth, 1969)."""
    total = a + b
    shift = total - a
    return total, (a - (total - shift)) + (b - shift)


def two_product(a: Floats, b: float) -> tuple[Floats, Floats]:
    """The product a · b as an exact sum of two float64 (Dekker, 1971)."""
    product = a * b
    carry = a * _SPLITTER
    a_high = carry - (carry - a)
    a_low = a - a_high
    b_carry = b * _SPLITTER
    b_high = b_carry - (b_carry - b)
    b_low = b - b_high
    error = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
    return product, error
