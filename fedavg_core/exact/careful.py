"""Quotients of exact sums with care: of any dtype, and however near to a midpoint.

The quotient is first computed as a double-double, with a bound on its error. Its two ends, the
value less and plus the bound, are both rounded to the dtype, half to even. Rounding is monotone, so
if the two agree, that is the correctly rounded quotient. If they do not, they are neighbours and
the midpoint between them lies within the bound; then which side of it the quotient is on is settled
exactly: the sign of

    2 · sum - weight · (lower + upper)

is that of one more exact sum. A tie, sign zero, goes to the even one.

A double-double is brought to fewer bits in two steps without rounding twice by *rounding to odd*
(Boldo and Melquiond, 2008): if it is not itself a float64, the neighbouring float64 with an odd
last bit stands for it, and that one is on no boundary of a narrower format.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.exact.error_free import two_product, two_sum
from fedavg_core.exact.exact_sum import ExactSum
from fedavg_core.exact.products import Scratch
from fedavg_core.exact.readout import leading, sign
from fedavg_core.model import NumberFormat
from fedavg_core.weight import Weight

__all__ = ["careful", "scaled"]

Floats: TypeAlias = npt.NDArray[np.float64]
Array: TypeAlias = npt.NDArray[Any]
Indices: TypeAlias = npt.NDArray[np.intp]

_RELATIVE_ERROR = 2.0**-68
_BEYOND = 2.0**1000


def careful(
    total: ExactSum, weight: Weight, number: NumberFormat, out: Array
) -> npt.NDArray[np.bool_]:
    """Divide exact sums by a weight and round once, to nearest, half to even.

    It takes some thirty arrays as large.

    Args:
        total: The sums; their value does not change.
        weight: Above zero; its denominator is a power of two.
        number: The format of ``out``.
        out: Overwritten with the quotients; with 0 for exact zeros, and for what is beyond the
            largest number.

    Returns:
        Which are beyond the largest number.
    """
    lost = np.zeros(total.size, np.bool_)
    out[:] = 0
    for places, high, low, exponent, exact in leading(total):
        quotients = _divide(high, low, exponent, exact, weight)
        out[places], lost[places] = _rounded(total, places, *quotients, weight, number, out.dtype)
    return lost


def _rounded(
    total: ExactSum,
    places: Indices,
    first: Floats,
    second: Floats,
    error: Floats,
    scale: int,
    weight: Weight,
    number: NumberFormat,
    dtype: np.dtype[Any],
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """The quotients at some places in a dtype, and which are beyond its largest number."""
    if number.kind == "integer":
        base, lower, upper, unit = _integer_bracket(first, second, error, scale)
    else:
        base = np.zeros(first.size)
        lower, upper, unit = _float_bracket(first, second, error, scale, number)
    doubt = np.flatnonzero(lower != upper)
    if doubt.size:
        part = total.take(places[doubt])
        side = _side(part, weight * Fraction(2) ** unit, base, lower, upper, doubt)
        even = _is_even(lower[doubt], number)
        up = (side > 0.0) | ((side == 0.0) & ~even)
        lower[doubt] = np.where(up, upper[doubt], lower[doubt])
    if number.kind == "integer":
        return _to_integers(base, lower, dtype, number)
    values = np.ldexp(lower, unit)
    lost = np.abs(values) > number.largest
    values[lost] = 0.0
    return values.astype(dtype), lost


def scaled(weight: Weight, exponent: int) -> tuple[int, int, int]:
    """The numerator n of a weight, its length b, and the scale s of ``x · 2**exponent / weight``.

    That is ``x / (n / 2**b) · 2**s``, with a divisor between 1/2 and 1.
    """
    bits = weight.numerator.bit_length()
    return weight.numerator, bits, exponent - bits + weight.denominator.bit_length() - 1


def _divide(
    high: Floats, low: Floats, exponent: int, exact: bool, weight: Weight
) -> tuple[Floats, Floats, Floats, int]:
    """The quotient as ``(first + second) · 2**scale``, and a bound on the error of second."""
    numerator, bits, scale = scaled(weight, exponent)
    divisor = numerator / (1 << bits)  # correctly rounded
    left = float(Fraction(numerator, 1 << bits) - Fraction(divisor))
    quotient = high / divisor
    product, product_error = two_product(quotient, divisor)
    rest = ((high - product) - product_error) + (low - quotient * left)
    correction = rest / divisor
    first = quotient + correction
    second = correction - (first - quotient)
    # Of one float64 over another the remainder is exact, and with it the correction's sign.
    sure = (low == 0.0) & (exact and bits <= 53)
    error = np.where(sure, 0.0, np.abs(first) * _RELATIVE_ERROR)
    return first, second, error, scale


def _to_odd(a: Floats, b: Floats) -> Floats:
    """A float64 that every format of at most 51 bits rounds as it would round a + b."""
    total, error = two_sum(a, b)
    aside = np.nextafter(total, np.where(error > 0.0, np.inf, -np.inf))
    even = (total.view(np.int64) & 1) == 0
    return np.where((error != 0.0) & even, aside, total)


def _float_bracket(
    first: Floats, second: Floats, error: Floats, scale: int, number: NumberFormat
) -> tuple[Floats, Floats, int]:
    """Neighbouring numbers, or twice the same, one of which is the rounded quotient.

    They are ``lower · 2**unit`` and ``upper · 2**unit``, and not held to the format's largest.
    """
    doubtful = bool(error.any())
    if number.precision < 53:
        # What is beyond this is far beyond the largest number as well.
        lower = np.clip(np.ldexp(_to_odd(first, second - error), scale), -_BEYOND, _BEYOND)
        lower = _nearest(lower, number)
        if not doubtful:
            return lower, lower, 0
        upper = np.clip(np.ldexp(_to_odd(first, second + error), scale), -_BEYOND, _BEYOND)
        return lower, _nearest(upper, number), 0
    if scale > 0:
        return first + (second - error), first + (second + error), scale
    lower = np.ldexp(first + (second - error), scale)
    upper = np.ldexp(first + (second + error), scale)
    # Below the normal numbers ldexp has rounded a second time; there the results are whole
    # multiples of the least subnormal.
    tiny = (np.abs(upper) <= 2.0**number.least_exponent) & (first != 0.0)
    if tiny.any():
        least = number.least_exponent - 52
        first, second, error = first[tiny], second[tiny], error[tiny]
        base, below, above, _ = _integer_bracket(first, second, error, scale - least)
        lower[tiny] = np.copysign(np.ldexp(base + below, least), first)
        upper[tiny] = np.copysign(np.ldexp(base + above, least), first)
    return lower, upper, 0


def _integer_bracket(
    first: Floats, second: Floats, error: Floats, scale: int
) -> tuple[Floats, Floats, Floats, int]:
    """The same among the integers: ``base + lower`` and ``base + upper``, with an even base."""
    # What vanishes here is far below one half, what overflows is far beyond any integer.
    limit = 2.0**80
    first = np.clip(np.ldexp(first, scale), -limit, limit)
    second = np.clip(np.ldexp(second, scale), -limit, limit)
    error = np.clip(np.ldexp(error, scale), -limit, limit)
    base = 2.0 * np.rint(first * 0.5)
    rest = first - base
    return base, np.rint(_to_odd(rest, second - error)), np.rint(_to_odd(rest, second + error)), 0


def _to_integers(
    base: Floats, rest: Floats, dtype: np.dtype[Any], number: NumberFormat
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """The integers ``base + rest``, and which of them the dtype cannot hold (those are 0)."""
    end = float(number.largest + 1)
    start = -end if dtype.kind == "i" else 0.0
    out = ((base - end) + rest >= 0.0) | ((base - start) + rest < 0.0)
    base, rest = np.where(out, 0.0, base), np.where(out, 0.0, rest)
    upper = np.floor(base * 2.0**-32)
    lower = (base - upper * 2.0**32) + rest
    whole = (upper.astype(np.int64) << 32) + lower.astype(np.int64)
    return (whole.view(np.uint64) if dtype.kind == "u" else whole).astype(dtype), out


def _unit(values: Floats, number: NumberFormat) -> npt.NDArray[np.int32]:
    """The exponents of the last places of the values in a floating-point format."""
    exponents: npt.NDArray[np.int32] = np.frexp(values)[1]
    return np.maximum(exponents - 1, number.least_exponent) - (number.precision - 1)


def _nearest(values: Floats, number: NumberFormat) -> Floats:
    """Float64 values rounded to a narrower format, half to even, without its upper limit."""
    unit = _unit(values, number)
    rounded: Floats = np.ldexp(np.rint(np.ldexp(values, -unit)), unit)
    return rounded


def _is_even(values: Floats, number: NumberFormat) -> npt.NDArray[np.bool_]:
    """Whether the last bit of each value's significand (of an integer, its last bit) is zero."""
    if number.kind == "float":
        values = np.ldexp(values, -_unit(values, number))
    even: npt.NDArray[np.bool_] = np.remainder(values, 2.0) == 0.0
    return even


def _side(
    part: ExactSum, weight: Fraction, base: Floats, lower: Floats, upper: Floats, at: Array
) -> Floats:
    """The sign of the quotient less the midpoint of its bracket, for some elements; exact."""
    scratch = Scratch(part.size)
    part.add(base[at], -weight, scratch)
    part.add(lower[at], -weight / 2, scratch)
    part.add(upper[at], -weight / 2, scratch)
    return sign(part)
