"""Exact sums read back: as a sign, as float64, as double-doubles, as canonical digits.

The same value can lie in an `ExactSum`'s limbs in many ways. These functions tell the value and
nothing of the way. Where the limbs have to be put in order first, that is done on a copy.

Settled limbs (each at most half a unit of the next above) are a number in base 2**STEP with digits
of either sign: its highest digit that is not zero has its sign and, with the next few, nearly all
of its value. The canonical digits are the ordinary ones, not negative, beside one sign, on a grid
that is the same for all; they identify the value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.exact.exact_sum import ExactSum
from fedavg_core.exact.limbs import LOOSE_BOUND, STEP

__all__ = ["Nearest", "digits", "extent", "from_digits", "leading", "nearest", "sign"]

Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.intp]
Digits: TypeAlias = "dict[int, npt.NDArray[np.int32]]"

_MOST_STEPS = 29  # between limbs that are told together in float64, whose exponents have an end


class Nearest(NamedTuple):
    """Sums that float64 tells at once, and what is loose beside them.

    Attributes:
        limbs: The limbs, the highest first.
        units: The units of these, in those of the first.
        where: Where there is something loose, in any order; a place may occur several times.
        part: What is to be added there.
        exponent: What all of it is to be scaled by, as a power of two.
        error: What `at` may be off by, beside a relative error below 2**-52; exact with one limb.
        pair_error: What `pair` may be off by, beside a relative error below 2**-100.
    """

    limbs: Sequence[Floats]
    units: Sequence[float]
    where: Indices
    part: Floats
    exponent: int
    error: float
    pair_error: float

    def at(self, place: slice, out: Floats) -> Floats:
        """Some of the sums, without what is loose.

        Args:
            place: Which.
            out: As many numbers; overwritten.

        Returns:
            The sums, none of them -0.0; only to be read: they may be part of a limb.
        """
        return _folded([limb[place] for limb in self.limbs], self.units, out)

    def pair(self, place: slice, high: Floats, low: Floats, spare: Floats) -> None:
        """Some of the sums as sums of two float64, with what is loose.

        Args:
            place: Which.
            high: As many numbers; overwritten with the sums of the first two limbs, rounded.
            low: Overwritten with what is missing.
            spare: Overwritten.
        """
        top, *lower = (limb[place] for limb in self.limbs)
        if lower:
            # What the sum loses is had exactly, as one is a multiple of the other's last place.
            np.multiply(lower[0], self.units[1], out=low)
            np.add(top, low, out=high)
            np.subtract(high, top, out=spare)
            low -= spare
        else:
            high[:], low[:] = top, 0.0
        if lower[1:]:
            np.multiply(_folded(lower[1:], self.units[2:], spare), self.units[2], out=spare)
            low += spare
        here = (place.start <= self.where) & (self.where < place.stop)
        np.add.at(low, self.where[here] - place.start, self.part[here])


def _folded(limbs: Sequence[Floats], units: Sequence[float], out: Floats) -> Floats:
    """The sum of limbs, the highest first, in the first one's units; rounded at each addition."""
    *upper, total = limbs
    for number in range(len(upper) - 1, -1, -1):
        np.multiply(total, units[number + 1] / units[number], out=out)
        total = np.add(out, upper[number], out=out)
    return total


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


def nearest(total: ExactSum) -> Nearest | None:
    """The sums as float64, if that can be had at once.

    Args:
        total: The sums; only read.

    Returns:
        The sums; None if it takes more than a few operations, or if every sum is zero.
    """
    used = total.used()[::-1]
    if total.origin is None or not used or used[0] - used[-1] > _MOST_STEPS:
        return None
    top = used[0]
    where, part = np.empty(0, np.intp), np.empty(0)
    if total.loose:
        where, part = map(np.concatenate, zip(*total.loose, strict=True))
        part *= 2.0 ** (-STEP * top)
    # Up to what the limbs come from the second on, and from the third.
    second, third = (
        sum(total.bounds[k] * 2.0 ** (STEP * (k - top)) for k in used[number:]) for number in (1, 2)
    )
    # What is added up loses 2**-53 of that at each rounding. The last one is relative, and of two
    # lower limbs there is none, if between them there are at most 53 bits.
    fits = used[1:] == [top - 1, top - 2] and second * 2.0**STEP <= 1 << (52 - STEP)
    error = 0.0 if len(used) < 3 or fits else len(used) * second * 2.0**-53
    # Of a pair only the smaller one is not exact, and no larger than what it is rounded from; the
    # four are for what it is used for.
    loose = len(total.loose) * 2.0 ** (-STEP * top) if total.loose else 0.0
    pair_error = (len(used) + len(total.loose) + 4) * (third + loose) * 2.0**-53
    return Nearest(
        limbs=[total.limbs[k] for k in used],
        units=[2.0 ** (STEP * (k - top)) for k in used],
        where=where,
        part=part,
        exponent=total.origin + STEP * top,
        error=error,
        pair_error=pair_error,
    )


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
