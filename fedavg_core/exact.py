"""Exact sums of weighted arrays, element by element, in plain float64 arithmetic.

An `ExactSum` holds, for each of n elements, a number with no rounding error: a sum of limbs

    value = Σ_k limb[k] · 2**(origin + STEP·k)

where each limb is a float64 array of *integers*. Float64 adds integers exactly as long as no sum
exceeds 2**53, whatever the order; so each limb carries a bound on what it may hold, and when the
next addition could break the bound, its upper part is first moved to the limb above (`_carry`).
The idea of summing on a fixed grid, where order cannot matter, is that of reproducible summation
(Demmel and Nguyen, 2013) and of the superaccumulator (Kulisch and Miranker, 1986; Neal, 2015);
limbs that are created only where the data ask for them keep it as small as a double-double.

The origin is chosen from the first array that comes, HEADROOM bits above its largest product. Then

* **float32 × a weight of at most 29 odd bits** is exact in float64 (24 + 29 = 53), and all but the
  smallest elements are multiples of limb 0's unit already: they are added in one operation. The few
  that are not (below about 2**-20 of the largest) are taken out and go the general way.
* **The general way** cuts the array at the limbs' units, from the top (`rint`, subtract, scale by
  2**STEP, again), as the Ozaki scheme does (Ozaki, Ogita, Oishi and Rump, 2012). A slice is an
  integer of few enough bits that its product with a STEP-bit piece of the weight is exact. It ends
  when nothing is left, so it is right for every finite input and every weight.

Weights are exact rationals whose denominator is a power of two: every int and every finite float64.
A negative weight undoes an addition exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from math import frexp, ldexp
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["STEP", "ExactSum", "NonFiniteError", "Scratch"]

Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.intp]

STEP = 24
"""Bits from one limb to the next."""

_HEADROOM = 6
_CAPACITY = 1 << 53
_SETTLED = 1 << (STEP - 1)
_INFINITY_BITS = 0xFF << 24  # a float32 infinity, its sign shifted out
_FAST_WEIGHT_BITS = 29
_SPARSE = 4  # up to n / 2**4 elements are picked out one by one
_SAFE_RANGE = 900  # exponents further apart than this are never scaled together


class NonFiniteError(ValueError):
    """An array holds a NaN or an infinity.

    Args:
        index: The position of the first.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"element {index} is not finite")
        self.index = index


class Scratch:
    """Buffers for additions, so that no addition allocates: one for each thread that adds.

    Args:
        size: The largest number of elements of an addition.
    """

    def __init__(self, size: int) -> None:
        self.bits = np.empty(size, np.uint32)
        self.small = np.empty(size, np.bool_)
        self.product = np.empty(size, np.float64)
        self.spare = np.empty(size, np.float64)


class ExactSum:
    """The exact weighted sum of arrays of n elements; a new one is zero.

    Args:
        size: n, at least 1.
    """

    __slots__ = ("_bounds", "_journal", "_limbs", "origin", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.origin: int | None = None
        self._limbs: dict[int, Floats] = {}
        self._bounds: dict[int, int] = {}
        self._journal: list[tuple[int, Indices | None, Floats]] = []

    def reset(self) -> None:
        """Make the sum zero again; the memory is kept for the next one."""
        self.origin = None
        for k, limb in self._limbs.items():
            if self._bounds[k]:
                limb.fill(0.0)
                self._bounds[k] = 0

    def add(self, values: npt.NDArray[Any], weight: int | Fraction, scratch: Scratch) -> None:
        """Add ``weight · values``, exactly; with any error nothing is added.

        Args:
            values: One dimension, n elements, contiguous; float32 or float64. Only read.
            weight: Not zero; its denominator is a power of two.
            scratch: Buffers of at least n elements; their contents are overwritten.

        Raises:
            NonFiniteError: An element is NaN or infinite.
        """
        with self._undone_if_it_fails():
            odd, shift = _dyadic(weight)
            if values.dtype == np.float32:
                if self._add_float32(values, odd, shift, scratch):
                    return
            else:
                largest = float(np.abs(values, out=scratch.product[: self.size]).max())
                if not largest < np.inf:
                    raise NonFiniteError(int(np.flatnonzero(~np.isfinite(values))[0]))
            self._add_general(None, values, odd, shift)

    def add_sum(self, other: ExactSum, sign: int = 1, at: slice | None = None) -> None:
        """Add another sum, exactly; with any error nothing is added.

        Args:
            other: Another sum; only read.
            sign: 1, or -1 to subtract it.
            at: Which of the elements to add it to: as many as the other has. All of them if None.
        """
        if other.origin is None:
            return
        if self.origin is None:
            self.origin = other.origin
        where = None if at is None else np.arange(self.size)[at]
        with self._undone_if_it_fails():
            for k in other._used():
                limb, bound = other._limbs[k], other._bounds[k]
                if self.origin == other.origin and bound < _CAPACITY >> 1:
                    self._deposit(k, where, limb * sign, bound)
                else:
                    self._add_slices(where, limb, sign, other.origin + STEP * k)

    def take(self, where: Indices | slice) -> ExactSum:
        """The sums of some of the elements.

        Args:
            where: Which elements: positions, or a slice.

        Returns:
            A new sum; this one is unchanged.
        """
        limbs = {k: limb[where].copy() for k, limb in self._limbs.items() if self._bounds[k]}
        size = next(iter(limbs.values())).size if limbs else np.arange(self.size)[where].size
        taken = ExactSum(size)
        taken.origin = self.origin
        taken._limbs = limbs
        taken._bounds = {k: self._bounds[k] for k in limbs}
        return taken

    def sign(self) -> Floats:
        """The sign of each element.

        Returns:
            -1.0, 0.0 or 1.0 for each; new memory.
        """
        settled = self.take(slice(None))
        settled._settle(top=True)
        sign = np.zeros(self.size)
        for _, limb in sorted(settled._limbs.items(), reverse=True):
            np.copyto(sign, np.sign(limb), where=sign == 0)
        return sign

    def nearest(self, place: slice, out: Floats, spare: Floats) -> tuple[int, bool] | None:
        """The sums of some elements as float64, if that can be had at once.

        Args:
            place: Which elements.
            out: As many numbers; overwritten with the sums.
            spare: As many numbers; overwritten.

        Returns:
            ``(exponent, exact)``: the sums are ``out · 2**exponent``, rounded to nearest even, or
            exact. None if it takes more, or if every sum is zero.
        """
        used = self._used()
        if self.origin is None or not used or used[-1] - used[0] > 2:
            return None
        top = used[-1]
        lower = [k for k in used if k < top]
        # Two lower limbs are added without rounding, if between them there are at most 53 bits.
        if len(lower) == 2 and max(self._bounds[k] for k in lower) > 1 << (52 - STEP):
            return None
        if not lower:
            np.copyto(out, self._limbs[top][place])
        else:
            np.multiply(self._limbs[lower[0]][place], 2.0 ** (STEP * (lower[0] - top)), out=spare)
            if len(lower) == 2:
                np.multiply(self._limbs[lower[1]][place], 2.0**-STEP, out=out)
                np.add(spare, out, out=spare)
            np.add(self._limbs[top][place], spare, out=out)
        return self.origin + STEP * top, not lower

    def leading(self) -> Iterator[tuple[Indices | slice, Floats, Floats, int, bool]]:
        """The sums as double-doubles, in groups of elements of like magnitude.

        The limbs are brought in order on the way; the value does not change.

        Yields:
            ``(where, high, low, exponent, exact)``: the elements at ``where`` are
            ``(high + low) · 2**exponent``, with ``high`` the nearest float64 to that sum, exactly
            if ``exact``, and else with a relative error below 2**-71. Elements that occur in no
            group are zero. All arrays are new memory.
        """
        if self.origin is None:
            return
        self._settle(top=False)
        used = self._used()
        if not used:
            return
        top = used[-1]
        if top - used[0] <= 2:
            # The two lower limbs are together one float64 below 1 in units of the top one.
            low = self._below(top, slice(None))
            high = self._limbs[top] + low
            low -= high - self._limbs[top]
            yield slice(None), high, low, self.origin + STEP * top, True
            return
        self._settle(top=True)
        pending = np.arange(self.size)
        for k in sorted(self._limbs, reverse=True):
            leads = self._limbs[k][pending] != 0
            where = pending[leads]
            pending = pending[~leads]
            if where.size:
                upper = self._limbs[k][where]
                if k - 1 in self._limbs:
                    upper += self._limbs[k - 1][where] * 2.0**-STEP
                low = self._below(k - 1, where) * 2.0**-STEP
                high = upper + low
                low -= high - upper
                yield where, high, low, self.origin + STEP * k, False

    def digits(self, grid: int) -> tuple[npt.NDArray[np.int8], dict[int, npt.NDArray[np.int32]]]:
        """The one canonical form of the sums: a sign and base-2**STEP digits on a fixed grid.

        It depends on the values alone, not on how the limbs happen to hold them.

        Args:
            grid: An exponent; digit k counts in units of 2**(grid + STEP·k).

        Returns:
            The sign of each element, and from k to digit k of each, 0 ≤ digit < 2**STEP, for
            those k for which some element's digit is not zero. New memory.
        """
        fixed = ExactSum(self.size)
        fixed.origin = grid
        fixed.add_sum(self)
        sign = fixed.sign()
        fixed._settle(top=True)
        used = fixed._used()
        digits = {}
        borrow = np.zeros(self.size)
        for k in range(used[0], used[-1] + 1) if used else ():
            limb = fixed._limbs.get(k)
            digit = borrow if limb is None else limb * sign + borrow
            borrow = np.floor(digit * 2.0**-STEP)
            digit = digit - borrow * 2.0**STEP
            if digit.any():
                digits[k] = digit.astype(np.int32)
        return sign.astype(np.int8), digits

    @classmethod
    def from_digits(
        cls,
        size: int,
        grid: int,
        sign: npt.NDArray[np.int8],
        digits: dict[int, npt.NDArray[np.int32]],
    ) -> ExactSum:
        """The sums that have the given digits (see `digits`)."""
        total = cls(size)
        total.origin = grid
        for k, digit in digits.items():
            total._deposit(k, None, digit.astype(np.float64) * sign, 1 << STEP)
        return total

    def _add_float32(
        self, values: npt.NDArray[np.float32], odd: int, shift: int, scratch: Scratch
    ) -> bool:
        """Add the fast way; False, and nothing done, if these values ask for the general way."""
        n = self.size
        bits = np.left_shift(values.view(np.uint32), np.uint32(1), out=scratch.bits[:n])
        top_bits = int(bits.max())
        if top_bits >= _INFINITY_BITS:
            raise NonFiniteError(int(np.argmax(bits >= _INFINITY_BITS)))
        if top_bits == 0:
            return True
        weight_bits = odd.bit_length()
        if weight_bits > _FAST_WEIGHT_BITS:
            return False
        reach = (top_bits >> 24) - 126 if top_bits >> 24 else -126  # every |value| < 2**reach
        high = reach + weight_bits + shift
        if high - self._anchor(high) > 52:
            self._rebase(high)
        origin = self._anchor(high)
        # A float32 ≥ 2**e is a multiple of 2**(e - 23): from this e on products are whole units.
        least = origin - shift + 23
        if least > 127:
            return False
        small, count = scratch.small[:n], 0
        if least > -126:
            np.less(bits, np.uint32((least + 127) << 24), out=small)
            count = int(np.count_nonzero(small))
            if count > n >> _SPARSE:
                np.logical_and(small, bits, out=small)
                count = int(np.count_nonzero(small))
        factor = ldexp(odd, shift - origin)
        product = np.multiply(values, factor, out=scratch.product[:n], dtype=np.float64)
        largest = float(np.uint32(top_bits >> 1).view(np.float32))
        bound = int(abs(largest * factor)) + 1
        if not count:
            self._deposit(0, None, product, bound)
        elif count <= n >> _SPARSE:
            where = np.flatnonzero(small)
            rest = product[where]
            whole = np.rint(rest)
            product[where] = whole
            self._deposit(0, None, product, bound)
            rest -= whole
            self._cut(-1, where, rest * 2.0**STEP, 1, _SETTLED)
        else:
            self._cut(0, None, product, 1, bound)
        return True

    def _add_general(
        self, where: Indices | None, values: npt.NDArray[Any], odd: int, shift: int
    ) -> None:
        """Add any finite values, at the given positions, times any weight."""
        if values.dtype == np.float64 and values.size:
            # Values of exponents too far apart to be scaled together go in groups.
            magnitude = np.abs(values)
            least = frexp(float(magnitude.max()))[1] - _SAFE_RANGE
            far = (magnitude < ldexp(1.0, least)) & (magnitude > 0)
            if far.any():
                below = np.flatnonzero(far)
                near = np.where(far, 0.0, values)
                self._add_general(where, near, odd, shift)
                where = below if where is None else where[below]
                self._add_general(where, values[below], odd, shift)
                return
        sign, odd = (-1, -odd) if odd < 0 else (1, odd)
        while odd:
            piece = odd & ((1 << STEP) - 1)
            if piece:
                self._add_slices(where, values, sign * piece, shift)
            odd >>= STEP
            shift += STEP

    def _add_slices(
        self, where: Indices | None, values: npt.NDArray[Any], piece: int, shift: int
    ) -> None:
        """Add values times ``piece · 2**shift``, the piece of at most STEP bits, slice by slice."""
        reach = frexp(float(max(values.max(), -values.min())))[1]
        if reach == 0 and not values.any():
            return
        piece_bits = piece.bit_length()
        high = reach + piece_bits + shift
        origin = self._anchor(high)
        k = -((origin + 53 - _HEADROOM - high) // STEP)
        exponent = shift - origin - STEP * k
        if abs(exponent) < _SAFE_RANGE:
            rest = np.multiply(values, 2.0**exponent, dtype=np.float64)
        else:
            rest = np.ldexp(values.astype(np.float64), exponent)
        self._cut(k, where, rest, piece, 1 << (high - origin - STEP * k))

    def _cut(self, k: int, where: Indices | None, rest: Floats, piece: int, bound: int) -> None:
        """Add values in units of limb k times the piece, cut at the units of it and those below.

        Args:
            k: The limb to begin with.
            where: The positions of the values; all if None.
            rest: The values; overwritten.
            piece: What each slice is multiplied by.
            bound: What the first slice times the piece does not exceed.
        """
        while True:
            part = np.rint(rest)
            rest -= part
            if piece != 1:
                part *= piece
            self._deposit(k, where, part, bound)
            left = int(np.count_nonzero(rest))
            if not left:
                return
            if left <= rest.size >> 2:
                keep = np.flatnonzero(rest)
                rest = rest[keep]
                where = keep if where is None else where[keep]
            rest *= 2.0**STEP
            k -= 1
            bound = 1 << (STEP - 1 + piece.bit_length())

    def _anchor(self, high: int) -> int:
        """The origin; if there is none yet, one such that limb 0 has head-room over 2**high."""
        if self.origin is None:
            self.origin = high + _HEADROOM - 53
        return self.origin

    def _rebase(self, high: int) -> None:
        """Move the origin up, to where values below 2**high fit into limb 0."""
        moved = ExactSum(self.size)
        moved._anchor(high)
        moved.add_sum(self)
        self.origin, self._limbs, self._bounds = moved.origin, moved._limbs, moved._bounds

    def _room(self, k: int, bound: int) -> Floats:
        """Limb k, made if need be, ready to take integers up to the bound."""
        limb = self._limbs.get(k)
        if limb is None:
            limb = self._limbs[k] = np.zeros(self.size)
            self._bounds[k] = 0
        elif self._bounds[k] + bound > _CAPACITY:
            self._carry(k)
        return limb

    def _deposit(self, k: int, where: Indices | None, part: Floats, bound: int) -> None:
        """Add integers of at most the bound to limb k; positions occur once each."""
        limb = self._room(k, bound)
        self._bounds[k] += bound
        if where is None:
            limb += part
        else:
            limb[where] += part
        self._journal.append((k, where, part))

    @contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        """Take back what is deposited inside if it is left by an error, such as MemoryError."""
        self._journal.clear()
        try:
            yield
        except BaseException:
            for k, where, part in self._journal:
                self._limbs[k][slice(None) if where is None else where] -= part
            raise
        finally:
            self._journal.clear()

    def _carry(self, k: int) -> None:
        """Move the upper part of limb k to the limb above."""
        limb = self._limbs[k]
        bound = (self._bounds[k] >> STEP) + 1
        above = self._room(k + 1, bound)
        upper = np.rint(limb * 2.0**-STEP)
        above += upper
        self._bounds[k + 1] += bound
        upper *= 2.0**STEP
        limb -= upper
        self._bounds[k] = _SETTLED

    def _settle(self, top: bool) -> None:
        """Carry until each limb holds at most half a unit of the next; the top one if asked."""
        k = min(self._used(), default=0)
        while k < (last := max(self._used(), default=k - 1)) or (top and k == last):
            if self._bounds.get(k, 0) > _SETTLED:
                self._carry(k)
            k += 1

    def _used(self) -> list[int]:
        """The limbs that may hold something, from the lowest."""
        return sorted(k for k, bound in self._bounds.items() if bound)

    def _below(self, k: int, where: Indices | slice) -> Floats:
        """The two settled limbs below limb k, in units of limb k; exact."""
        low = np.zeros(self.size)[where]
        for j in (2, 1):
            limb = self._limbs.get(k - j)
            if limb is not None:
                low += limb[where] * 2.0 ** (-STEP * j)
        return low


def _dyadic(weight: int | Fraction) -> tuple[int, int]:
    """The odd integer and the exponent whose product ``odd · 2**exponent`` is the weight."""
    numerator, denominator = weight.numerator, weight.denominator
    zeros = (numerator & -numerator).bit_length() - 1
    return numerator >> zeros, zeros - (denominator.bit_length() - 1)
