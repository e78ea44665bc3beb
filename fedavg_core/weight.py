"""Weights at their exact value.

A weight is a whole number of any size or a float64: either way a rational number whose denominator
is a power of two. Sums of weights are kept as such, so that no denominator of a mean is rounded.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from math import isfinite
from typing import Any, TypeAlias

import numpy as np

from fedavg_core.errors import Reason, RefusedUpdate, quoted
from fedavg_core.plain import plain_number

__all__ = [
    "Weight",
    "dyadic",
    "exact_weight",
    "extent_of",
    "pieces",
    "weight_from_text",
    "weight_text",
]

Weight: TypeAlias = "int | Fraction"

_REACH = 1024  # every value is less than 2**_REACH
_DEPTH = 1 << 14  # far more than the product of some float64 has below the point


def exact_weight(weight: object) -> Weight:
    """A weight at its exact value.

    Args:
        weight: A whole number of any size, a float, of Python or NumPy, or a fraction whose
            denominator is a power of two.

    Returns:
        The same number as an int, or as a fraction whose denominator is a power of two.

    Raises:
        RefusedUpdate: It is not a finite number above zero (BAD_WEIGHT).
    """
    number: Any = weight if type(weight) in (Fraction, np.longdouble) else plain_number(weight)
    if isinstance(number, int) and number > 0:
        return number
    if isinstance(number, (float, np.longdouble)) and isfinite(number):
        number = Fraction(*number.as_integer_ratio())
    if isinstance(number, Fraction) and number > 0 and number.denominator.bit_count() == 1:
        return number.numerator if number.denominator == 1 else number
    raise RefusedUpdate(
        Reason.BAD_WEIGHT, expected="a finite int or float above zero as weight", got=quoted(weight)
    )


def extent_of(weight: Weight) -> tuple[int, int]:
    """Between which powers of two weighted sums lie.

    Args:
        weight: The sum of the weights, above zero.

    Returns:
        ``(least, reach)``: a sum of finite values with these weights is less than ``2**reach`` in
        magnitude. It is a multiple of ``2**least``, unless some of the weights are much finer than
        their sum: by far more than float64 weights can be.
    """
    below = weight.denominator.bit_length() - 1
    return -_DEPTH - below, weight.numerator.bit_length() - below + _REACH


@lru_cache(maxsize=64)  # the blocks of an update have one weight
def dyadic(weight: Weight) -> tuple[int, int]:
    """A weight as an odd integer and a power of two.

    Args:
        weight: Any weight but zero; it may be negative.

    Returns:
        ``(odd, exponent)``: it is ``odd · 2**exponent``.
    """
    numerator, denominator = weight.numerator, weight.denominator
    zeros = (numerator & -numerator).bit_length() - 1
    return numerator >> zeros, zeros - (denominator.bit_length() - 1)


@lru_cache(maxsize=64)
def pieces(odd: int, exponent: int, width: int) -> tuple[tuple[int, int], ...]:
    """A weight in pieces of few bits.

    Args:
        odd: See `dyadic`.
        exponent: See there.
        width: The most bits of a piece.

    Returns:
        Integers of its sign, and exponents, the largest first: it is ``Σ piece · 2**exponent``.
    """
    sign, rest = (-1, -odd) if odd < 0 else (1, odd)
    found = []
    while rest:
        piece = rest & ((1 << width) - 1)
        if piece:
            found.append((sign * piece, exponent))
        rest >>= width
        exponent += width
    return tuple(reversed(found))


def weight_text(weight: Weight) -> str:
    """A weight as text, in which nothing is rounded.

    Args:
        weight: Any weight, or sum of weights.

    Returns:
        Numerator and denominator, hexadecimal.
    """
    return f"{weight.numerator:x}/{weight.denominator:x}"


def weight_from_text(text: str) -> Weight:
    """The inverse of `weight_text`.

    Args:
        text: What that gave.

    Returns:
        The weight.

    Raises:
        AttributeError, ValueError, ZeroDivisionError: The text is no weight.
    """
    numerator, _, denominator = text.partition("/")
    weight = Fraction(int(numerator, 16), int(denominator, 16))
    if weight.denominator.bit_count() != 1:
        raise ValueError(f"the weight {text}, whose denominator is no power of two")
    return weight.numerator if weight.denominator == 1 else weight
