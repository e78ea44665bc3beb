"""The one rounding: an exact sum over an exact weight, to the nearest number of a dtype.

For each element the quotient is first computed as a double-double, with a bound on its error
(Dekker, 1971: the product of two float64 as an exact sum of two). Its two ends, the value less and
plus the bound, are both rounded to the dtype, half to even. Rounding is monotone, so if the two
agree, that is the correctly rounded quotient. If they do not, they are neighbours and the midpoint
between them lies within the bound; then which side of it the quotient is on is settled exactly:
the sign of

    2 · sum - weight · (lower + upper)

is that of one more exact sum. A tie, sign zero, goes to the even one.

Most elements do not come so far: float64 alone tells how they round (`_divide_at`), unless it is
near to a midpoint or has not all of the sum; and of most of these, ties above all, also on which
side of a midpoint they are (`_settle`). A float32 base is added to the quotients in float64 in the
same manner (`_add_at`); to others, and where float64 does not tell, it is added in the exact sums,
times the weight.

A double-double is brought to fewer bits in two steps without rounding twice by *rounding to odd*
(Boldo and Melquiond, 2008): if it is not itself a float64, the neighbouring float64 with an odd
last bit stands for it, and that one is on no boundary of a narrower format.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import frexp, ldexp
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.exact import ExactSum, NonFiniteError
from fedavg_core.model import NumberFormat
from fedavg_core.positions import positions
from fedavg_core.products import Scratch
from fedavg_core.readout import Nearest, extent, leading, nearest, sign, two_sum
from fedavg_core.weight import Weight, dyadic

__all__ = ["quotient"]

Floats: TypeAlias = npt.NDArray[np.float64]
Array: TypeAlias = npt.NDArray[Any]
Floats32: TypeAlias = npt.NDArray[np.float32]
Indices: TypeAlias = npt.NDArray[np.intp]
Base: TypeAlias = "Sequence[tuple[Array, int]]"

_RELATIVE_ERROR = 2.0**-68
_SHIFT = 2.0**-47  # 32 to 64 last places; a rounded sum times a rounded inverse is off by 5 at most
_NEAR = 96  # last places; more than this shift and that error together
_CANCELLED = 2.0**9  # a base this much larger than the result leaves too little of its accuracy
_WIDE_SHIFT = 2.0**-38  # 2**14 to 2**15 last places
# With a base the sum, up to 17 loose parts and their products are each rounded, in all some twenty
# times, at up to 2**9 + 65 times the size of the result, and there is 2**10 for the limbs' error.
_WIDE_NEAR = 6 << 13  # last places; more than that shift and 22 * (2**9 + 65) + 2**10
_WIDE_ERROR = 2.0**42  # what is smaller than this times its error may be off by over 2**10 of them
_PAIR_ERROR = 2.0**72  # the same for double-doubles; see `leading`
_SAFE_SCALE = 900
_BEYOND = 2.0**1000
_UNUSED_BY_FLOAT32 = 53 - 24
_FLOAT32 = np.finfo(np.float32)
_PIECE = 1 << 16  # elements divided with care in one go, which takes some thirty arrays as large
_SPLITTER = 2.0**27 + 1


def quotient(
    total: ExactSum,
    weight: Weight,
    number: NumberFormat,
    scratch: Scratch,
    out: Array,
    base: Base = (),
) -> int:
    """Divide exact sums by a weight and round once, to nearest, half to even.

    Args:
        total: The sums; their value does not change.
        weight: Above zero; its denominator is a power of two.
        number: The format of ``out``.
        scratch: Buffers, of any size; their contents are overwritten.
        out: Overwritten with the quotients, with an exact zero as +0.0, and with 0 for what is
            beyond the largest number of the dtype. One dimension.
        base: What is added to the quotients before they are rounded: parts ``(values, exponent)``
            of ``Σ values · 2**exponent``, as `ExactSum.add` takes them. Only read.

    Returns:
        The position of the first result beyond the largest number, or -1.

    Raises:
        NonFiniteError: An element of the base is NaN or infinite.
    """
    with np.errstate(all="ignore"):  # whatever the caller has set
        way = _way(total, weight, number)
        if base and not (way is not None and _is_float32(way, base)):
            total = _above(total, slice(None), base, weight, scratch)
            base = ()
            way = _way(total, weight, number)
        if way is None:
            careful = np.arange(total.size)
        else:
            piece = min(scratch.product.size, total.size if way.unused else _PIECE)
            pieces = [slice(n, min(n + piece, total.size)) for n in range(0, total.size, piece)]
            if base:
                ((values, _),) = base
                found = [_add_at(at, way, values, weight, scratch, out) for at in pieces]
                near, careful = map(np.concatenate, zip(*found, strict=True))
                careful = np.union1d(careful, _settle(way, near, weight, out, values))
            else:
                near = np.concatenate(
                    [_divide_at(at, way, weight, number, scratch, out) for at in pieces]
                )
                careful = _settle(way, near, weight, out)
        out[careful] = 0
        beyond: list[int] = []
        for start in range(0, careful.size, _PIECE):
            places = careful[start : start + _PIECE]
            part = total.take(places)
            if base:
                part = _above(total, places, base, weight, scratch)
            for chosen, high, low, exponent, exact in leading(part):
                values, lost = _careful(
                    part, chosen, high, low, exponent, exact, weight, number, out
                )
                out[places[chosen]] = values
                beyond += places[chosen[lost]].tolist()
    return min(beyond, default=-1)


class _Way(NamedTuple):
    """How sums are divided in float64.

    Attributes:
        sums: The sums.
        scale: See `_scaled`.
        unused: How many of a float64's bits the format of the results does not have.
        are_normal: Whether every result is zero, or a normal number.
    """

    sums: Nearest
    scale: int
    unused: int
    are_normal: bool


def _way(total: ExactSum, weight: Weight, number: NumberFormat) -> _Way | None:
    """How to divide the sums in float64; None if that cannot be."""
    if number.kind == "integer":
        return None
    sums = nearest(total)
    if sums is None:
        return None
    unused = 53 - number.precision
    scale = _scaled(weight, sums.exponent)[2]
    if abs(scale) > _SAFE_SCALE:
        return None
    # Dividing by one half to one leaves a quotient as it is, or makes it up to twice as large.
    least, reach = (power + scale - sums.exponent for power in extent(total))
    return _Way(
        sums,
        scale,
        unused,
        least >= number.least_exponent and reach + 1 < frexp(number.largest)[1],
    )


def _divide_at(
    place: slice,
    way: _Way,
    weight: Weight,
    number: NumberFormat,
    scratch: Scratch,
    out: Array,
) -> Indices:
    """Write some of the quotients, as float64 tells them; the positions of those not to be trusted.

    Into a narrow format: the product with the divisor's inverse is off by a few units in the last
    place of float64, so its rounding is right unless it lies that near to a midpoint. All products
    are made greater by more than they are off (`_SHIFT`); so those that may have been on the other
    side of a midpoint, or on it, are beyond it now by little, which one comparison finds.

    Into float64: of one float64 over another the division is right by itself. Others are divided as
    double-doubles, and are right where both ends of what they may be come to the same.

    Results that are not normal numbers are not trusted, nor those to which something loose belongs,
    nor those that are so small beside what limbs may hold that they may be off by more.
    """
    size = place.stop - place.start
    values, spare, doubtful = scratch.product[:size], scratch.spare[:size], scratch.mask[:size]
    sums, numerator, bits = way.sums, weight.numerator, weight.numerator.bit_length()
    where, least, near = sums.where, 0.0, _NEAR
    if way.unused:
        shift = _SHIFT
        if sums.error:
            shift, near = _WIDE_SHIFT, _WIDE_NEAR
        factor = ldexp((1 << bits) / numerator, way.scale) * (1 + shift)
        np.multiply(sums.at(place, values), factor, out=values)
        least = sums.error * factor * _WIDE_ERROR
    elif len(sums.limbs) == 1 and bits <= 53:
        factor = ldexp(numerator / (1 << bits), -way.scale)
        np.divide(sums.at(place, values), factor, out=values)
        doubtful[:] = False
    else:
        first, second, error, _ = _divide(*sums.pair(place), 0, False, weight)
        np.multiply(first + (second - error), 2.0**way.scale, out=values)
        np.multiply(first + (second + error), 2.0**way.scale, out=spare)
        np.not_equal(values, spare, out=doubtful)
        if not way.are_normal:  # they were rounded twice
            doubtful |= (np.abs(values) <= 2.0**number.least_exponent) & (first != 0.0)
        least = ldexp(sums.pair_error, way.scale) * _PAIR_ERROR
        where = where[:0]
    doubt: npt.NDArray[np.bool_] | None = None
    if least or not way.are_normal:
        np.abs(values, out=spare)
        doubt = spare < least
        if not way.are_normal:
            too_small = (spare < 2.0**number.least_exponent) & (spare > 0.0)
            doubt |= too_small | (spare > number.largest)
        values[doubt] = 0.0
    if way.unused:
        _round(values, way.unused, spare, out[place], doubtful, near)
    else:
        out[place] = values
    if doubt is not None:
        doubtful |= doubt
    where = where[(place.start <= where) & (where < place.stop)] - place.start
    doubtful[where] = True
    places: Indices = positions(doubtful) + place.start
    return places


def _is_float32(way: _Way, base: Base) -> bool:
    """Whether a base and the results are float32, as it is."""
    ((values, exponent), *others) = base
    is_plain = values.dtype == np.float32 and exponent == 0 and not others
    return is_plain and way.unused == _UNUSED_BY_FLOAT32


def _add_at(
    place: slice,
    way: _Way,
    base: Floats32,
    weight: Weight,
    scratch: Scratch,
    out: Floats32,
) -> tuple[Indices, Indices]:
    """Write some of the quotients plus a base, as float64 tells them; which are not to be trusted.

    As in `_divide_at` all results are made greater by more than they are off. A result of which
    base and quotient have cancelled most is off by too much, and one that is not a normal number
    has its midpoints elsewhere.

    Returns:
        The positions of those near to a midpoint, and of those to be computed with care whatever
        they are near to; some of them are in both.
    """
    size = place.stop - place.start
    values, spare, base, out = scratch.product[:size], scratch.spare[:size], base[place], out[place]
    sums, numerator, bits = way.sums, weight.numerator, weight.numerator.bit_length()
    factor = ldexp((1 << bits) / numerator, way.scale)
    np.multiply(sums.at(place, values), factor, out=values)
    here = (place.start <= sums.where) & (sums.where < place.stop)
    at, loose = sums.where[here] - place.start, sums.part[here] * factor
    np.add.at(values, at, loose)
    np.add(values, base, out=values)
    np.multiply(values, 1 + _WIDE_SHIFT, out=values)
    # The sum and its loose parts may have cancelled as well, 17 of them at most.
    at = at[np.abs(values[at]) < 0.5 * np.abs(loose).max(initial=0.0)]
    midway = scratch.mask[:size]
    _round(values, way.unused, spare, out, midway, _WIDE_NEAR)
    near = positions(midway)
    narrow = spare.view(np.float32)
    before, after = np.abs(base, out=narrow[:size]), np.abs(out, out=narrow[size:])
    if not before.max() < np.inf:
        raise NonFiniteError(int(np.argmin(np.isfinite(base))) + place.start)
    unsure = midway
    unsure[:] = False
    if after.min() < 2 * _FLOAT32.smallest_normal or after.max() > _FLOAT32.max:
        unsure |= (after < 2 * _FLOAT32.smallest_normal) & (after > 0) | (after > _FLOAT32.max)
    unsure[at] = True
    if sums.error:
        unsure |= after < 2 * _WIDE_ERROR * sums.error * factor
    unsure |= np.multiply(after, _CANCELLED, out=after) < before
    return near + place.start, positions(unsure) + place.start


def _round(
    values: Floats,
    unused: int,
    spare: Floats,
    out: Array,
    midway: npt.NDArray[np.bool_],
    near: int,
) -> None:
    """Write values rounded to narrower numbers; which are beyond a midpoint of two by little.

    Args:
        values: Zeros, and numbers of a size that is normal in the narrower format; overwritten.
        unused: How many of a value's last bits the narrower format does not have.
        spare: As many numbers; overwritten.
        out: Overwritten with the rounded values; of those near to a midpoint, with either
            neighbour.
        midway: Overwritten with which are on a midpoint, or beyond it by up to `near`.
        near: A number of last places of a value.
    """
    pattern = values.view(np.uint64)
    is_float32 = unused == _UNUSED_BY_FLOAT32
    rest = pattern
    if is_float32:  # a processor's own rounding, once
        out[:] = values
    else:
        rest = spare.view(np.uint64)
    # What is unused, moved to the top: at a midpoint it is the least of the signed integers.
    np.left_shift(pattern, np.uint64(64 - unused), out=rest)
    least = -(1 << 63) + (near << (64 - unused))
    np.less_equal(rest.view(np.int64), np.int64(least), out=midway)
    if not is_float32:
        # As those near to a midpoint are known, adding half a unit and cutting rounds to nearest.
        pattern += np.uint64(1 << (unused - 1))
        pattern &= np.uint64((1 << 64) - (1 << unused))
        out[:] = values


def _above(
    total: ExactSum,
    where: Indices | slice,
    base: Base,
    weight: Weight,
    scratch: Scratch,
) -> ExactSum:
    """Some of the sums, and a base times the weight; a new sum."""
    part = total.take(where)
    if scratch.product.size < part.size:
        scratch = Scratch(part.size)
    for values, exponent in base:
        part.add(np.ascontiguousarray(values[where]), weight * (1 << exponent), scratch)
    return part


def _settle(
    way: _Way,
    places: Indices,
    weight: Weight,
    out: Array,
    base: Floats32 | None = None,
) -> Indices:
    """Write the quotients of a few sums that are normal numbers; the positions left over.

    Cut to the narrower format, a quotient has a midpoint above it. A sum of limbs, less that
    midpoint times the weight: of the upper limb and the product, if they are alike, the difference
    is exact (Sterbenz, 1974), and they are if it is less than half the product; adding what is
    lower to it keeps the sign of the exact result, though it rounds. Should an error of the
    quotient have led to the midpoint before or after the right one, the number between the two is
    what comes out, and is right.
    """
    unused, sums = way.unused, way.sums
    numerator, bits, _ = _scaled(weight, 0)
    odd, _ = dyadic(weight)
    are_normal = way.are_normal or base is not None  # those that are not are not asked for
    if not places.size or not are_normal or odd.bit_length() >= unused or sums.error:
        return places  # else a midpoint times the weight is exact
    upper, lower = sums.limbs[0][places], np.zeros(places.size)
    for limb, unit in zip(sums.limbs[1:], sums.units[1:], strict=True):
        lower += limb[places] * unit
    loose = np.zeros(places.size)
    at = np.minimum(np.searchsorted(places, sums.where), places.size - 1)
    here = places[at] == sums.where
    np.add.at(loose, at[here], sums.part[here])
    lower, lost = two_sum(lower, loose)
    values = (upper + lower) * ldexp((1 << bits) / numerator, way.scale)
    if base is not None:
        added = base[places].astype(np.float64)
        values += added
    cut = values.view(np.int64) & -(1 << unused)
    divisor = ldexp(odd, -odd.bit_length() - way.scale)  # as the numerator may be beyond float64
    midpoint = (cut | 1 << (unused - 1)).view(np.float64)
    fine = lost == 0.0
    if base is None:
        middle = midpoint * divisor
    else:
        apart, lost = two_sum(midpoint, -added)
        middle, also_lost = _two_product(apart, divisor)
        fine &= (lost == 0.0) & (also_lost == 0.0)
    distance = upper - middle
    fine &= np.abs(distance) < 0.5 * np.abs(middle)
    side = (distance + lower) * np.sign(midpoint)
    up = (side > 0.0) | ((side == 0.0) & ((cut >> unused) & 1 == 1))
    out[places] = (cut + (up.astype(np.int64) << unused)).view(np.float64)
    left: Indices = places[~fine]
    return left


def _careful(
    total: ExactSum,
    places: Indices,
    high: Floats,
    low: Floats,
    exponent: int,
    exact: bool,
    weight: Weight,
    number: NumberFormat,
    out: Array,
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """The quotients at some places as ``out`` has them, and which are beyond the largest number."""
    first, second, error, scale = _divide(high, low, exponent, exact, weight)
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
        return _to_integers(base, lower, out.dtype, number)
    values = np.ldexp(lower, unit)
    lost = np.abs(values) > number.largest
    values[lost] = 0.0
    return values.astype(out.dtype), lost


def _scaled(weight: Weight, exponent: int) -> tuple[int, int, int]:
    """The numerator n of a weight, its length b, and the scale s of ``x · 2**exponent / weight``.

    That is ``x / (n / 2**b) · 2**s``, with a divisor between 1/2 and 1.
    """
    bits = weight.numerator.bit_length()
    return weight.numerator, bits, exponent - bits + weight.denominator.bit_length() - 1


def _divide(
    high: Floats, low: Floats, exponent: int, exact: bool, weight: Weight
) -> tuple[Floats, Floats, Floats, int]:
    """The quotient as ``(first + second) · 2**scale``, and a bound on the error of second."""
    numerator, bits, scale = _scaled(weight, exponent)
    divisor = numerator / (1 << bits)  # correctly rounded
    left = float(Fraction(numerator, 1 << bits) - Fraction(divisor))
    quotient = high / divisor
    product, product_error = _two_product(quotient, divisor)
    rest = ((high - product) - product_error) + (low - quotient * left)
    correction = rest / divisor
    first = quotient + correction
    second = correction - (first - quotient)
    # Of one float64 over another the remainder is exact, and with it the correction's sign.
    sure = (low == 0.0) & (exact and bits <= 53)
    error = np.where(sure, 0.0, np.abs(first) * _RELATIVE_ERROR)
    return first, second, error, scale


def _two_product(a: Floats, b: float) -> tuple[Floats, Floats]:
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
