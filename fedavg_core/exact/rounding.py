"""The one rounding: an exact sum over an exact weight, to the nearest number of a dtype.

For most elements float64 arithmetic tells how they round, unless they are near to a midpoint of two
numbers, or it has not all of the sum (`_divide_at` for narrower formats, `_divide_wide_at` for
float64 itself); and of most of these, ties above all, also on which side of a midpoint they are
(`_settle`). A float32 base is added to the quotients in float64 in the same manner (`_add_at`); to
others, and where float64 does not tell, it is added in the exact sums, times the weight. What is
left is computed with care (see `careful`).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import frexp, ldexp
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.exact.careful import careful, scaled
from fedavg_core.exact.error_free import UPPER_BITS, two_product, two_sum
from fedavg_core.exact.exact_sum import ExactSum, NonFiniteError
from fedavg_core.exact.positions import positions
from fedavg_core.exact.products import Scratch
from fedavg_core.exact.readout import Nearest, extent, nearest
from fedavg_core.model import NumberFormat
from fedavg_core.weight import Weight, dyadic

__all__ = ["quotient"]

Floats: TypeAlias = npt.NDArray[np.float64]
Array: TypeAlias = npt.NDArray[Any]
Floats32: TypeAlias = npt.NDArray[np.float32]
Indices: TypeAlias = npt.NDArray[np.intp]
Base: TypeAlias = "Sequence[tuple[Array, int]]"

_SHIFT = 2.0**-47  # 32 to 64 last places; a rounded sum times a rounded inverse is off by 5 at most
_NEAR = 96  # last places; more than this shift and that error together
_CANCELLED = 2.0**9  # a base this much larger than the result leaves too little of its accuracy
_WIDE_SHIFT = 2.0**-38  # 2**14 to 2**15 last places
# With a base the sum, up to 17 loose parts and their products are each rounded, in all some twenty
# times, at up to 2**9 + 65 times the size of the result, and there is 2**10 for the limbs' error.
_WIDE_NEAR = 6 << 13  # last places; more than that shift and 22 * (2**9 + 65) + 2**10
_WIDE_ERROR = 2.0**42  # what is smaller than this times its error may be off by over 2**10 of them
_RELATIVE_ERROR = 2.0**-68  # of a quotient and what is missing; they are off by 2**-71 at most
_PAIR_ERROR = 2.0**72  # what is smaller than this times its error may be off by more
_LEAST_WIDE = -900  # an exponent; of what is smaller, an error may have no float64
_SAFE_SCALE = 900
_UNUSED_BY_FLOAT32 = 53 - 24
_FLOAT32 = np.finfo(np.float32)
_PIECE = 1 << 16  # elements divided with care in one go


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
            left: Indices = np.arange(total.size)
        else:
            piece = min(scratch.product.size, total.size)
            pieces = [slice(n, min(n + piece, total.size)) for n in range(0, total.size, piece)]
            if base:
                ((values, _),) = base
                found = [_add_at(at, way, values, weight, scratch, out) for at in pieces]
                near, left = map(np.concatenate, zip(*found, strict=True))
                left = np.union1d(left, _settle(way, near, weight, out, values))
            elif way.unused:
                near = np.concatenate(
                    [_divide_at(at, way, weight, number, scratch, out) for at in pieces]
                )
                left = _settle(way, near, weight, out)
            else:
                near = np.concatenate(
                    [_divide_wide_at(at, way, weight, scratch, out) for at in pieces]
                )
                left = _settle_wide(way, near, weight, out)
        beyond: list[int] = []
        for start in range(0, left.size, _PIECE):
            places = left[start : start + _PIECE]
            part = _above(total, places, base, weight, scratch) if base else total.take(places)
            results = np.empty(places.size, out.dtype)
            beyond += places[careful(part, weight, number, results)].tolist()
            out[places] = results
    return min(beyond, default=-1)


class _Way(NamedTuple):
    """How sums are divided in float64.

    Attributes:
        sums: The sums.
        scale: See `_scaled`.
        unused: How many of a float64's bits the format of the results does not have.
        are_normal: Whether every result is zero, or a normal number of at least 2**_LEAST_WIDE.
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
    scale = scaled(weight, sums.exponent)[2]
    if abs(scale) > _SAFE_SCALE:
        return None
    # Dividing by one half to one leaves a quotient as it is, or makes it up to twice as large.
    least, reach = (power + scale - sums.exponent for power in extent(total))
    are_normal = least >= max(number.least_exponent, _LEAST_WIDE)
    return _Way(sums, scale, unused, are_normal and reach + 1 < frexp(number.largest)[1])


def _divide_at(
    place: slice,
    way: _Way,
    weight: Weight,
    number: NumberFormat,
    scratch: Scratch,
    out: Array,
) -> Indices:
    """Write some of the quotients, as float64 tells them; the positions of those not to be trusted.

    The product with the divisor's inverse is off by a few units in the last place of float64, so
    its rounding to a narrower format is right unless it lies that near to a midpoint. All products
    are made greater by more than they are off (`_SHIFT`); so those that may have been on the other
    side of a midpoint, or on it, are beyond it now by little, which one comparison finds.

    Results that are not normal numbers are not trusted, nor those to which something loose belongs,
    nor those that are so small beside what limbs may hold that they may be off by more.
    """
    size = place.stop - place.start
    values, spare, doubtful = scratch.product[:size], scratch.spare[:size], scratch.mask[:size]
    sums, numerator, bits = way.sums, weight.numerator, weight.numerator.bit_length()
    shift, near = (_WIDE_SHIFT, _WIDE_NEAR) if sums.error else (_SHIFT, _NEAR)
    factor = ldexp((1 << bits) / numerator, way.scale) * (1 + shift)
    np.multiply(sums.at(place, values), factor, out=values)
    least = sums.error * factor * _WIDE_ERROR
    doubt: npt.NDArray[np.bool_] | None = None
    if least or not way.are_normal:
        np.abs(values, out=spare)
        doubt = spare < least
        if not way.are_normal:
            too_small = (spare < 2.0**number.least_exponent) & (spare > 0.0)
            doubt |= too_small | (spare > number.largest)
        values[doubt] = 0.0
    _round(values, way.unused, spare, out[place], doubtful, near)
    if doubt is not None:
        doubtful |= doubt
    here = (place.start <= sums.where) & (sums.where < place.stop)
    doubtful[sums.where[here] - place.start] = True
    places: Indices = positions(doubtful) + place.start
    return places


def _divide_wide_at(
    place: slice, way: _Way, weight: Weight, scratch: Scratch, out: Floats
) -> Indices:
    """The same into float64.

    Of one float64 over another the division is right by itself, and so is the rounded sum of two
    over a power of two. Otherwise a quotient is first rounded in whatever way. Sum less quotient
    times divisor, the remainder, comes to very nearly what it is, as the product is had in parts
    that lose next to nothing (Dekker, 1971); divided in its turn it is what is missing. The
    quotient with what is missing, less and plus a bound on the error, is right where both ends
    round to the same.
    """
    size = place.stop - place.start
    high, low, spare = scratch.product[:size], scratch.spare[:size], scratch.whole[:size]
    doubtful, result = scratch.mask[:size], out[place]
    sums, numerator, bits = way.sums, weight.numerator, weight.numerator.bit_length()
    is_power = numerator & (numerator - 1) == 0
    rounded = numerator / (1 << bits)
    divisor = ldexp(rounded, -way.scale)
    doubtful[:] = False
    if sums.pair_error == 0.0 and (is_power or (len(sums.limbs) == 1 and bits <= 53)):
        np.divide(sums.at(place, high), divisor, out=result)
    else:
        sums.pair(place, high, low, spare)
        inverse = 1 / divisor
        np.multiply(high, inverse, out=result)
        upper = float((np.float64(divisor).view(np.uint64) & UPPER_BITS).view(np.float64))
        cut, parts = result.view(np.uint64), spare.view(np.uint64)
        for factor in (upper, divisor - upper):
            np.bitwise_and(cut, UPPER_BITS, out=parts)
            spare *= factor
            high -= spare
        np.bitwise_and(cut, UPPER_BITS, out=parts)
        np.subtract(result, spare, out=spare)
        spare *= divisor
        high -= spare
        high += low
        lost = float(Fraction(numerator, 1 << bits) - Fraction(rounded))
        np.multiply(result, ldexp(lost, -way.scale), out=spare)
        high -= spare
        high *= inverse
        np.multiply(result, _RELATIVE_ERROR, out=low)
        np.subtract(high, low, out=spare)
        high += low
        spare += result
        result += high
        np.not_equal(spare, result, out=doubtful)
    least = ldexp(sums.pair_error, way.scale) * _PAIR_ERROR
    if not way.are_normal:  # as the scale is safe, none is beyond the largest number
        least = max(least, 2.0**_LEAST_WIDE)
    if least:
        doubtful |= np.abs(result, out=spare) < least
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
    numerator, bits, _ = scaled(weight, 0)
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
        middle, also_lost = two_product(apart, divisor)
        fine &= (lost == 0.0) & (also_lost == 0.0)
    distance = upper - middle
    fine &= np.abs(distance) < 0.5 * np.abs(middle)
    side = (distance + lower) * np.sign(midpoint)
    up = (side > 0.0) | ((side == 0.0) & ((cut >> unused) & 1 == 1))
    out[places] = (cut + (up.astype(np.int64) << unused)).view(np.float64)
    left: Indices = places[~fine]
    return left


def _settle_wide(way: _Way, places: Indices, weight: Weight, out: Floats) -> Indices:
    """The same for float64 quotients, of which one of two neighbours is written.

    The remainder of the one that is, exactly, tells which is nearer.
    """
    sums = way.sums
    odd, _ = dyadic(weight)
    if not places.size or not way.are_normal or sums.pair_error or odd.bit_length() > 53:
        return places
    high, low = two_sum(sums.limbs[0][places], np.zeros(places.size))
    for limb, unit in zip(sums.limbs[1:], sums.units[1:], strict=True):
        high, low = two_sum(high, limb[places] * unit)
    divisor = ldexp(odd, -odd.bit_length() - way.scale)
    values = out[places]
    product, error = two_product(values, divisor)
    rest, lost = two_sum(high - product, -error)
    rest, also_lost = two_sum(rest, low)
    other = np.nextafter(values, np.where(rest > 0.0, np.inf, -np.inf))
    twice, gap = 2.0 * np.abs(rest), np.abs(other - values) * divisor
    fine = (lost == 0.0) & (also_lost == 0.0)
    is_odd = (values.view(np.int64) & 1) == 1
    out[places] = np.where((twice > gap) | ((twice == gap) & is_odd), other, values)
    left: Indices = places[~fine]
    return left
