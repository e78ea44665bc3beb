"""Exact sums of weighted arrays, element by element, in plain float64 arithmetic.

An `ExactSum` is made of limbs (see `limbs`): whole numbers on a grid of powers of two, which
float64 adds without rounding. Here weighted arrays are cut into such numbers. The idea of summing
on a fixed grid, where order cannot matter, is that of reproducible summation (Demmel and Nguyen,
2013) and of the superaccumulator (Kulisch and Miranker, 1986; Neal, 2015); limbs that are created
only where the data ask for them keep it as small as a double-double.

The origin is chosen from the first array that comes: so that limb 0 has room for some dozens of
such products (`_anchor`). Then

* **float32 × a weight of at most 29 odd bits** is exact in float64 (24 + 29 = 53), and with a short
  weight all but the smallest elements are multiples of limb 0's unit already: they are added in one
  operation. Of the few that are not (below about 2**-13 of the largest) the whole units are added
  with the others, and the rest is kept aside, loose, with its position: until that is so in so many
  places that a limb pays (`tuck`), no addition and no mean has to pass over one.
* **Products of more bits** are had as exact sums of two float64: a float32 times both parts of a
  weight of up to 53 bits, or both halves of a float64 (Dekker, 1971) times a piece of the weight.
  The two are added, and the whole units of limb 0 cut off (`rint`); what that leaves of them is one
  float64 again, and whole units of limb -2 but for the smallest elements (`_add_cut`).
* **The general way** is for those, and for values too far apart. It cuts an array at the limbs'
  units, from the top (`rint`, subtract, scale by 2**STEP, again), as the Ozaki scheme does (Ozaki,
  Ogita, Oishi and Rump, 2012). A slice is an integer of few enough bits that its product with a
  STEP-bit piece of the weight is exact. It ends when nothing is left, so it is right for every
  finite input and every weight.

Weights are exact rationals whose denominator is a power of two: every int and every finite float64.
A negative weight undoes an addition exactly.
"""

from __future__ import annotations

from math import frexp, ldexp
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.exact.limbs import CAPACITY, SETTLED, STEP, Limbs
from fedavg_core.exact.positions import positions
from fedavg_core.exact.products import (
    LONG_WEIGHT,
    SHORT_WEIGHT,
    SPARSE,
    Products,
    Scratch,
    below,
    has_bits,
    magnitude_below,
    products,
)
from fedavg_core.weight import Weight, dyadic, pieces

__all__ = ["ExactSum", "NonFiniteError"]

Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.intp]

_HEADROOM = 6  # bits that limb 0 has, at least, above the first product
_ONE = np.uint32(1)
_INFINITY_BITS = 0xFF << 24  # a float32 infinity, its sign shifted out
_CUTS = (1, 2)  # how often products of more bits than a float64 has may be cut
_SAFE_RANGE = 900  # exponents further apart than this are never scaled together


class NonFiniteError(ValueError):
    """An array holds a NaN or an infinity.

    Args:
        index: The position of the first.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"element {index} is not finite")
        self.index = index


class ExactSum(Limbs):
    """The exact weighted sum of arrays of n elements; a new one is zero.

    Args:
        size: n, at least 1.
        memory: See `Limbs`, which also has what can be read.
    """

    __slots__ = ()

    def add(self, values: npt.NDArray[Any], weight: Weight, scratch: Scratch) -> None:
        """Add ``weight · values``, exactly; with any error nothing is added.

        Args:
            values: One dimension, n elements, contiguous; float32 or float64. Only read.
            weight: Not zero; its denominator is a power of two.
            scratch: Buffers of at least n elements; their contents are overwritten.

        Raises:
            NonFiniteError: An element is NaN or infinite.
        """
        odd, shift = dyadic(weight)
        self._keep_few_loose(self.size >> SPARSE)
        add = self._add_float32 if values.dtype == np.float32 else self._add_float64

        def deposit() -> None:
            for piece, exponent in pieces(odd, shift, LONG_WEIGHT[values.dtype]):
                self._keep_steps_from(scratch.buffers)  # those of the piece before
                if not add(values, piece, exponent, scratch):
                    self._add_general(None, values, piece, exponent, scratch)

        self._whole_or_not_at_all(deposit)

    def add_sum(self, other: ExactSum, sign: int = 1, at: slice | None = None) -> None:
        """Add another sum, exactly; with any error nothing is added.

        Args:
            other: Another sum; its value stays.
            sign: 1, or -1 to subtract it.
            at: Which of the elements to add it to: as many as the other has. All of them if None.
        """
        other.tuck()
        if self.origin is None:
            self.origin = other.origin
        where = None if at is None else np.arange(*at.indices(self.size))

        def deposit() -> None:
            for k in other.used():
                limb, bound = other.limbs[k], other.bounds[k]
                if self.origin == other.origin and bound < CAPACITY >> 1:
                    self._deposit(k, where, limb * sign, bound)
                elif limb.any():
                    reach = frexp(float(max(limb.max(), -limb.min())))[1]
                    self._add_slices(where, limb, reach, sign, (other.origin or 0) + STEP * k)

        self._whole_or_not_at_all(deposit)

    def _add_float32(
        self, values: npt.NDArray[np.float32], odd: int, shift: int, scratch: Scratch
    ) -> bool:
        """Add ``odd · 2**shift`` times float32 values, if all but a few are whole units soon.

        Args:
            values: The values.
            odd: An integer of at most LONG_WEIGHT bits.
            shift: An exponent.
            scratch: Buffers.

        Returns:
            Whether it was done; if not, nothing was.
        """
        n = self.size
        bits = np.left_shift(values.view(np.uint32), _ONE, out=scratch.bits[:n])
        top_bits = int(np.maximum.reduce(bits))
        if top_bits >= _INFINITY_BITS:
            raise NonFiniteError(int(np.argmax(bits >= _INFINITY_BITS)))
        if top_bits == 0:
            return True
        weight_bits = odd.bit_length()
        reach = (top_bits >> 24) - 126 if top_bits >> 24 else -126  # every |value| < 2**reach
        k, unit = self._place_for(reach + weight_bits + shift)
        # The bits, one place further left than in a float32, are an exponent and its fraction.
        fraction = top_bits & ((1 << 24) - 1) | (1 << 24 if top_bits >> 24 else 0)
        largest = ldexp(fraction, max(top_bits >> 24, 1) - 151)
        bound = int(abs(largest * ldexp(odd, shift - unit))) + 1
        # A float32 ≥ 2**e is a multiple of 2**(e - 23): from this e on products are whole units.
        least = unit - shift + 23
        where, has_zeros = None, True
        if weight_bits <= SHORT_WEIGHT:
            where, has_zeros = below(bits, least, scratch.small[:n])
        if where is None or (where.size and k):  # what is loose belongs to limb -1
            for cuts in _CUTS:
                where, _ = below(bits, least - STEP * (cuts + 1), scratch.small[:n])
                if where is not None:
                    break
            else:
                return False
            parts = products(values, odd, shift - unit, scratch)
            self._add_cut(k, parts, bound, where, cuts)
            self._add_general(where, values[where], odd, shift)
            return True
        lowest = int(np.minimum.reduce(bits[where])) if where.size else 0
        # The first products are written where they are to stay: as such, none may be -0.0.
        is_first = self.is_zero
        product = np.multiply(
            values,
            ldexp(odd, shift - unit),
            out=self._limb(k) if is_first else scratch.product[:n],
            dtype=np.float64,
        )
        if is_first and has_zeros:
            product += 0.0
        if not where.size:
            self._deposit(k, None, product, bound)
            return True
        rest = product[where]
        whole = np.rint(rest)
        if is_first:
            whole += 0.0
        product[where] = whole
        self._deposit(0, None, product, bound)
        rest -= whole
        left = rest.nonzero()[0]  # zeros and other whole units are small as well
        where, rest = where[left], rest[left]
        # In the same way those of the others that are not STEP binades smaller yet are whole units
        # of limb -1.
        if lowest < (least - STEP + 127) << 24:
            finer = rest * 2.0**STEP
            if (np.rint(finer) != finer).any():
                self._cut(-1, where, finer, 1, SETTLED)
                return True
        if left.size:
            self._deposit_loose(where, rest)
        return True

    def _add_float64(self, values: Floats, odd: int, shift: int, scratch: Scratch) -> bool:
        """The same for float64 values."""
        n = self.size
        magnitude = np.abs(values, out=scratch.product[:n])
        largest = float(np.maximum.reduce(magnitude))
        if not largest < np.inf:
            raise NonFiniteError(int(np.argmin(np.isfinite(values))))
        if largest == 0.0:
            return True
        k, unit = self._place_for(frexp(largest)[1] + odd.bit_length() + shift)
        if abs(shift - unit) > _SAFE_RANGE:
            return False
        bound = int(abs(largest * ldexp(odd, shift - unit))) + 1
        for cuts in _CUTS:
            # A float64 ≥ 2**e is a multiple of 2**(e - 52).
            least = unit - shift - STEP * (cuts + 1) + 52
            where = magnitude_below(magnitude, least, scratch.mask[:n])
            if where is not None:
                break
        else:
            return False
        parts = products(values, odd, shift - unit, scratch)
        self._add_cut(k, parts, bound, where, cuts)
        self._add_general(where, values[where], odd, shift)
        return True

    def _add_cut(self, k: int, parts: Products, bound: int, where: Indices, cuts: int) -> None:
        """Add products of more bits than a float64 has, cut at the units of limb k and lower ones.

        Args:
            k: The limb to begin with.
            parts: The products, in units of limb k; overwritten.
            bound: What no product exceeds.
            where: Positions whose products do not count.
            cuts: How often they are cut. What is left is whole units of the second limb below the
                last, and is added there.
        """
        high, low, whole = parts
        high[where] = 0.0
        if low is not None:
            low[where] = 0.0
        for cut in range(cuts):
            if cut:
                k, whole = k - 1, np.empty_like(high)
                high *= 2.0**STEP
                if low is not None:
                    low *= 2.0**STEP
            np.rint(high if low is None else np.add(high, low, out=whole), out=whole)
            high -= whole
            self._deposit(k, None, whole, bound)
            # The sum of two is rounded: what it leaves, which is not, may be over one half.
            excess = bound.bit_length() - 54
            bound = (1 << (STEP - 1)) + (1 << max(excess + STEP, 0))
        if low is not None:
            high += low
        if has_bits(high):
            high *= 2.0 ** (2 * STEP)
            self._deposit(k - 2, None, high, bound << STEP)

    def _add_general(
        self,
        where: Indices | None,
        values: npt.NDArray[Any],
        odd: int,
        shift: int,
        scratch: Scratch | None = None,
    ) -> None:
        """Add any finite values, at the given positions, times any weight."""
        magnitude, rest = None, None
        if scratch is not None:
            magnitude, rest = scratch.product[: values.size], scratch.spare[: values.size]
        magnitude = np.abs(values, out=magnitude)
        largest = float(magnitude.max(initial=0.0))
        reach = frexp(largest)[1]
        if values.dtype == np.float64 and (magnitude < ldexp(1.0, reach - _SAFE_RANGE)).any():
            # Values of exponents too far apart to be scaled together go in groups.
            far = (magnitude < ldexp(1.0, reach - _SAFE_RANGE)) & (magnitude > 0)
            if far.any():
                apart = np.flatnonzero(far)
                near = np.where(far, 0.0, values)
                self._add_general(where, near, odd, shift)
                where = apart if where is None else where[apart]
                self._add_general(where, values[apart], odd, shift)
                return
        if largest == 0.0:
            return
        for piece, exponent in pieces(odd, shift, STEP):
            self._add_slices(where, values, reach, piece, exponent, rest)

    def _add_slices(
        self,
        where: Indices | None,
        values: npt.NDArray[Any],
        reach: int,
        piece: int,
        shift: int,
        rest: Floats | None = None,
    ) -> None:
        """Add values times ``piece · 2**shift``, slice by slice.

        Args:
            where: The positions of the values; all if None.
            values: The values; below ``2**reach``.
            reach: See there.
            piece: An integer of at most STEP bits.
            shift: An exponent.
            rest: Memory for as many numbers, to be overwritten; new memory if None.
        """
        high = reach + piece.bit_length() + shift
        origin = self._anchor(high)
        k = self._limb_for(high)
        exponent = shift - origin - STEP * k
        if abs(exponent) < _SAFE_RANGE:
            rest = np.multiply(values, 2.0**exponent, out=rest, dtype=np.float64)
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
            is_left = rest != 0.0
            left = int(np.count_nonzero(is_left))
            if not left:
                return
            if left <= rest.size >> 2:
                few = left <= rest.size >> SPARSE
                keep = positions(is_left) if few else is_left.nonzero()[0]
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

    def _limb_for(self, high: int) -> int:
        """The limb that has the head-room of limb 0 over 2**high."""
        return -((self._anchor(high) + 53 - _HEADROOM - high) // STEP)

    def _place_for(self, high: int) -> tuple[int, int]:
        """The limb, 0 at most, that takes values below 2**high, and its unit's exponent."""
        if high - self._anchor(high) > 52:
            self._rebase(high)
        k = min(0, self._limb_for(high))
        return k, self._anchor(high) + STEP * k

    def _rebase(self, high: int) -> None:
        """Move the origin up, to where values below 2**high fit into limb 0."""
        moved = ExactSum(self.size)
        moved._anchor(high)
        moved.add_sum(self)
        fields = ("origin", "limbs", "bounds")
        list(map(setattr, (self,) * 3, fields, (moved.origin, moved.limbs, moved.bounds)))
