"""Exact sums read back: as a sign, as float64, as double-doubles, as canonical digits.

The same value can lie in an `ExactSum`'s limbs in many ways. These functions tell the value and
nothing of the way. Where the limbs have to be put in order first, that is done on a copy.

Settled limbs (each at most half a unit of the next above) are a number in base 2**STEP with digits
of either sign: its highest digit that is not zero has its sign and, with the next few, nearly all
of its value. The canonical digits are the ordinary ones, not negative, beside one sign, on a grid
that is the same for all; they identify the value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.exact import LOOSE_BOUND, STEP, ExactSum

__all__ = ["digits", "extent", "from_digits", "leading", "nearest", "sign"]

Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.intp]
Digits: TypeAlias = "dict[int, npt.NDArray[np.int32]]"


def sign(total: ExactSum) -> Floats:
    """The sign of each sum.

    Args:
        total: The sums; only read.

    Returns:
        -1.0, 0.0 or 1.0 for each; new memory.
    """
    settled = _settled(total)
    result = np.zeros(total.size)
    for _, limb in sorted(settled.limbs.items(), reverse=True):
        np.copyto(result, np.sign(limb), where=result == 0)
    return result


def extent(total: ExactSum) -> tuple[int, int]:
    """Between which powers of two the sums lie.

    Args:
        total: The sums, not all zero; only read.

    Returns:
        ``(least, reach)``: every sum that is not zero is at least ``2**least`` in magnitude, and
        every sum is less than ``2**reach``.
    """
    bounds = {k: total.bounds[k] for k in total.used()}
    if total.loose:
        bounds[-1] = bounds.get(-1, 0) + len(total.loose) * LOOSE_BOUND
    lowest = min(bounds)
    bound = sum(bound << (STEP * (k - lowest)) for k, bound in bounds.items())
    least = (total.origin or 0) + STEP * lowest
    return least, least + bound.bit_length()


def nearest(total: ExactSum, place: slice, out: Floats, spare: Floats) -> tuple[int, int] | None:
    """The sums of some elements as float64, if that can be had at once.

    Args:
        total: The sums; only read.
        place: Which elements.
        out: As many numbers; overwritten with the sums.
        spare: As many numbers; overwritten.

    Returns:
        ``(exponent, roundings)``: the sums are ``out · 2**exponent``, after so many roundings,
        each with a relative error below 2**-52; exact if there were none. None if it takes more
        than that, or if every sum is zero.
    """
    used = total.used()
    if total.origin is None or not used or used[-1] - used[0] > 2:
        return None
    top = used[-1]
    lower = [k for k in used if k < top]
    # Two lower limbs are added without rounding, if between them there are at most 53 bits.
    if len(lower) == 2 and max(total.bounds[k] for k in lower) > 1 << (52 - STEP):
        return None
    if not lower:
        np.add(total.limbs[top][place], 0.0, out=out)  # a limb may hold -0.0; what is told is +0.0
    else:
        np.multiply(total.limbs[lower[0]][place], 2.0 ** (STEP * (lower[0] - top)), out=spare)
        if len(lower) == 2:
            np.multiply(total.limbs[lower[1]][place], 2.0**-STEP, out=out)
            np.add(spare, out, out=spare)
        np.add(total.limbs[top][place], spare, out=out)
    # All are multiples of one unit. A partial sum of few bits is exact, and from one of many bits
    # loose parts do not lead back to few. So no error is large beside the sum.
    if total.loose:
        where, part = map(np.concatenate, zip(*total.loose, strict=True))
        if out.size < total.size:
            inside = (place.start <= where) & (where < place.stop)
            where, part = where[inside] - place.start, part[inside]
        np.add.at(out, where, part * 2.0 ** (-STEP * top))
    return total.origin + STEP * top, bool(lower) + len(total.loose)


def leading(total: ExactSum) -> Iterator[tuple[Indices, Floats, Floats, int, bool]]:
    """The sums as double-doubles, in groups of elements of like magnitude.

    Args:
        total: The sums; only read.

    Yields:
        ``(where, high, low, exponent, exact)``: the elements at ``where`` are
        ``(high + low) · 2**exponent``, with ``high`` the nearest float64 to that sum, exactly if
        ``exact``, and else with a relative error below 2**-71. Elements that occur in no group are
        zero. All arrays are new memory.
    """
    settled = _settled(total)
    used = settled.used()
    if settled.origin is None or not used:
        return
    exact = used[-1] - used[0] <= 3
    pending = np.arange(total.size)
    for k in reversed(used):
        leads = settled.limbs[k][pending] != 0
        where = pending[leads]
        pending = pending[~leads]
        if where.size:
            # Two limbs together are exactly one float64, so four are one double-double.
            upper, low = _pair(settled, k, where), _pair(settled, k - 2, where)
            low *= 2.0 ** (-2 * STEP)
            high = upper + low
            low -= high - upper
            yield where, high, low, settled.origin + STEP * k, exact


def digits(total: ExactSum, grid: int) -> tuple[npt.NDArray[np.int8], Digits]:
    """The one canonical form of the sums: signs, and base-2**STEP digits on a fixed grid.

    Args:
        total: The sums; only read.
        grid: An exponent; digit k counts in units of 2**(grid + STEP·k).

    Returns:
        The sign of each element, and from k to digit k of each, 0 ≤ digit < 2**STEP, for those k
        for which some element's digit is not zero. New memory.
    """
    fixed = ExactSum(total.size)
    fixed.origin = grid
    fixed.add_sum(total)
    fixed.settle()
    signs = sign(fixed)
    used = fixed.used()
    result = {}
    borrow = np.zeros(total.size)
    for k in range(used[0], used[-1] + 1) if used else ():
        limb = fixed.limbs.get(k)
        digit = borrow if limb is None else limb * signs + borrow
        borrow = np.floor(digit * 2.0**-STEP)
        digit = digit - borrow * 2.0**STEP
        if digit.any():
            result[k] = digit.astype(np.int32)
    return signs.astype(np.int8), result


def from_digits(size: int, grid: int, signs: npt.NDArray[np.int8], digits: Digits) -> ExactSum:
    """The sums that have the given digits; the inverse of `digits`.

    Args:
        size: The number of elements.
        grid: As it was.
        signs: As they were.
        digits: As they were.

    Returns:
        A new sum.
    """
    total = ExactSum(size)
    total.origin = grid
    for k, digit in digits.items():
        total.limbs[k] = digit.astype(np.float64) * signs
        total.bounds[k] = 1 << STEP
    return total


def _settled(total: ExactSum) -> ExactSum:
    copy = total.take(slice(None))
    copy.settle()
    return copy


def _pair(settled: ExactSum, k: int, where: Indices) -> Floats:
    """Settled limbs k and k - 1 of some elements, in units of limb k; exact."""
    pair = np.zeros(where.size)
    if k in settled.limbs:
        pair += settled.limbs[k][where]
    if k - 1 in settled.limbs:
        pair += settled.limbs[k - 1][where] * 2.0**-STEP
    return pair
