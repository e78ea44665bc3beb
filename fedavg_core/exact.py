"""Exact sums of weighted arrays, element by element, in plain float64 arithmetic.

An `ExactSum` holds, for each of n elements, a number with no rounding error: a sum of limbs

    value = Σ_k limb[k] · 2**(origin + STEP·k)

where each limb is a float64 array of *integers*. Float64 adds integers exactly as long as no sum
exceeds 2**53, whatever the order; so each limb carries a bound on what it may hold, and when the
next addition could break the bound, its upper part is first moved to the limb above (`_carry`).
The idea of summing on a fixed grid, where order cannot matter, is that of reproducible summation
(Demmel and Nguyen, 2013) and of the superaccumulator (Kulisch and Miranker, 1986; Neal, 2015);
limbs that are created only where the data ask for them keep it as small as a double-double.

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

An addition is made whole or not at all, whatever interrupts it. Python delivers a signal between
two of its instructions, so what belongs together is done by one call into C: `map` over the
operations, drained by `list` or `extend`.

Weights are exact rationals whose denominator is a power of two: every int and every finite float64.
A negative weight undoes an addition exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import frexp, ldexp
from operator import methodcaller
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.positions import positions
from fedavg_core.weight import Weight, dyadic, pieces

__all__ = ["LOOSE_BOUND", "STEP", "ExactSum", "NonFiniteError", "Scratch"]

Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.intp]

STEP = 24
"""Bits from one limb to the next."""

_HEADROOM = 6  # bits that limb 0 has, at least, above the first product
_CAPACITY = 1 << 53
_SETTLED = 1 << (STEP - 1)
LOOSE_BOUND = _SETTLED
"""What no loose part exceeds, in units of limb -1."""

_ONE = np.uint32(1)
_INFINITY_BITS = 0xFF << 24  # a float32 infinity, its sign shifted out
_FAST_WEIGHT_BITS = 29
_SPARSE = 4  # up to n / 2**4 elements are picked out one by one
_PIECE = 1 << 12  # elements that are carried in one go
_MOST_LOOSE = 16  # and one: two pieces of a weight, 29 bits apart, may leave something each
_CUTS = (1, 2)
_HALF = np.uint64(1 << 26)
_UPPER = np.uint64((1 << 64) - (1 << 27))  # of a float64's 53 bits the upper 26
_SPLITS = 2.0**1023  # what is larger may not be rounded to those
_LOOSE = 0  # in place of a bound: the step was to keep something aside
_SAFE_RANGE = 900  # exponents further apart than this are never scaled together


_NOWHERE: Indices = np.empty(0, np.intp)


class NonFiniteError(ValueError):
    """An array holds a NaN or an infinity.

    Args:
        index: The position of the first.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"element {index} is not finite")
        self.index = index


class Scratch:
    """Buffers for additions, so that the fast way hardly allocates: one for each thread that adds.

    Args:
        size: The largest number of elements of an addition.

    Attributes:
        product: For products, and before there are any, in the same memory:
        bits: for bit patterns;
        small: for a mask.
        spare: For anything else.
        mask: For a mask that is kept while the others serve.
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


class _Step(NamedTuple):
    """A deposit that may have to be taken back.

    Attributes:
        k: The limb; -1 and `_LOOSE` as the bound: something was kept aside.
        where: The positions; all if None.
        part: What was added there.
        bound: What no element of it exceeds.
    """

    k: int
    where: Indices | None
    part: Floats
    bound: int

    def kept_from(self, scratch: Scratch) -> _Step:
        """The same, with nothing in buffers that are about to be used again."""
        if any(self.part.base is buffer for buffer in scratch.buffers):
            return self._replace(part=self.part.copy())
        return self


class ExactSum:
    """The exact weighted sum of arrays of n elements; a new one is zero.

    Args:
        size: n, at least 1.
        memory: Arrays of n float64 for the first limbs that are needed, the last array for the
            first of them; their contents do not matter. Further limbs take their own.

    Attributes:
        size: n.
        origin: The exponent of limb 0's unit; None while nothing was added.
        limbs: The limbs, by their number. One whose bound is zero counts as zero, whatever the
            memory holds: a reset writes nothing, and the next addition need not read. No other
            limb holds a -0.0.
        loose: Parts of limb -1 that are not in it yet: ascending positions, each once, and what to
            add there in units of limb 0. A few, and together for a small part of the elements.
        bounds: What no element of a limb exceeds.
        additions: How many additions were made, in all.
        is_whole: Whether the sum is that of these, and not of a part of another one besides.
    """

    __slots__ = (
        "_done",
        "_memory",
        "_steps",
        "additions",
        "bounds",
        "is_whole",
        "limbs",
        "loose",
        "origin",
        "size",
    )

    def __init__(self, size: int, memory: Iterable[Floats] = ()) -> None:
        self.size = size
        self._memory = list(memory)
        self.origin: int | None = None
        self.limbs: dict[int, Floats] = {}
        self.loose: list[tuple[Indices, Floats]] = []
        self.bounds: dict[int, int] = {}
        self.additions = 0
        self.is_whole = True
        self._steps: list[_Step] = []
        self._done: list[Any] = []

    @property
    def is_zero(self) -> bool:
        """Whether nothing is in the sum, not even what cancels."""
        return not any(self.bounds.values())  # with a loose part comes one in limb 0

    def reset(self) -> None:
        """Make the sum zero again; the memory of the limbs that most sums need is kept."""
        near = sorted((k for k in self.limbs if abs(k) <= 2), key=abs, reverse=True)
        memory = [*self._memory, *(self.limbs[k] for k in near)]
        fields = ("_memory", "limbs", "bounds", "loose", "origin", "is_whole")
        # In one call: a limb is never both in use and to be had.
        list(map(setattr, (self,) * len(fields), fields, (memory, {}, {}, [], None, True)))

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
        most = self.size >> _SPARSE
        if len(self.loose) >= _MOST_LOOSE or self._loose_size() > most:
            if not self.bounds.get(-1):
                self._join()
            if self.bounds.get(-1) or self._loose_size() > most >> 1:
                self.tuck()

        narrow = values.dtype == np.float32
        add, width = (self._add_float32, 53) if narrow else (self._add_float64, 27)

        def deposit() -> None:
            for piece, exponent in pieces(odd, shift, width):
                if self._steps:  # of the piece before
                    self._steps = [step.kept_from(scratch) for step in self._steps]
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
                if self.origin == other.origin and bound < _CAPACITY >> 1:
                    self._deposit(k, where, limb * sign, bound)
                elif limb.any():
                    reach = frexp(float(max(limb.max(), -limb.min())))[1]
                    self._add_slices(where, limb, reach, sign, (other.origin or 0) + STEP * k)

        self._whole_or_not_at_all(deposit)

    def take(self, where: Indices | slice) -> ExactSum:
        """The sums of some of the elements.

        Args:
            where: Which elements: ascending positions, or a slice of consecutive ones.

        Returns:
            A new sum; this one is unchanged.
        """
        if isinstance(where, slice):
            start, stop, _ = where.indices(self.size)
            taken = ExactSum(stop - start)
        else:
            taken = ExactSum(where.size)
        for at, part in self.loose:
            if isinstance(where, slice):
                inside = slice(*np.searchsorted(at, (start, stop)))
                found, chosen = at[inside] - start, part[inside]
            else:
                index = np.minimum(np.searchsorted(at, where), at.size - 1)
                found = np.flatnonzero(at[index] == where)
                chosen = part[index[found]]
            if found.size:
                taken.loose.append((found, chosen))
        taken.origin = self.origin
        taken.limbs = {k: self.limbs[k][where].copy() for k in self.used()}
        taken.bounds = {k: self.bounds[k] for k in taken.limbs}
        return taken

    def settle(self) -> None:
        """Carry until each limb holds at most half a unit of the next; the value stays."""
        self.tuck()
        k = min(self.used(), default=0)
        while k <= max(self.used(), default=k - 1):
            if self.bounds.get(k, 0) > _SETTLED:
                self._carry(k)
            k += 1

    def tuck(self) -> None:
        """Put what is loose where it belongs, into limb -1; the value stays."""
        while self.loose:
            where, part = self.loose[-1]
            limb = self._room(-1, LOOSE_BOUND)
            self.bounds[-1] += LOOSE_BOUND
            moved = limb[where] + part * 2.0**STEP
            _do_both(partial(limb.__setitem__, where, moved), self.loose.pop)

    def _join(self) -> None:
        """Make one list of all that is loose, and whole units part of limb 0; the value stays."""
        places, parts = map(np.concatenate, zip(*self.loose, strict=True))
        where, of = np.unique(places, return_inverse=True)
        part = np.bincount(of, weights=parts)
        whole = np.rint(part)
        part -= whole
        left = np.flatnonzero(part)
        joined = [(where[left], part[left])] if left.size else []
        limb = self._room(0, len(self.loose))
        self.bounds[0] += len(self.loose)
        moved = limb[where] + whole
        _do_both(partial(limb.__setitem__, where, moved), partial(setattr, self, "loose", joined))

    def _loose_size(self) -> int:
        return sum(where.size for where, _ in self.loose)

    def used(self) -> list[int]:
        """The limbs that may hold something, from the lowest."""
        return sorted(k for k, bound in self.bounds.items() if bound)

    def _add_float32(
        self, values: npt.NDArray[np.float32], odd: int, shift: int, scratch: Scratch
    ) -> bool:
        """Add ``odd · 2**shift`` times float32 values, if no more than a few go their own way.

        Args:
            values: The values.
            odd: An integer of at most 53 bits.
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
        if weight_bits <= _FAST_WEIGHT_BITS:
            where, has_zeros = _below(bits, least, scratch.small[:n])
        if where is None or (where.size and k):  # what is loose belongs to limb -1
            for cuts in _CUTS:
                where, _ = _below(bits, least - STEP * (cuts + 1), scratch.small[:n])
                if where is not None:
                    products = _products(values, odd, shift - unit, scratch)
                    self._add_cut(k, products, bound, where, cuts)
                    self._add_general(where, values[where], odd, shift)
                    return True
            return False
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
            below = rest * 2.0**STEP
            if (np.rint(below) != below).any():
                self._cut(-1, where, below, 1, _SETTLED)
                return True
        if left.size:
            self._steps.append(_Step(-1, where, rest, _LOOSE))
            self._done.extend(map(self.loose.append, ((where, rest),)))
        return True

    def _add_float64(self, values: Floats, odd: int, shift: int, scratch: Scratch) -> bool:
        """The same for float64 values, and an integer of at most 27 bits."""
        n = self.size
        magnitude = np.abs(values, out=scratch.product[:n])
        largest = float(np.maximum.reduce(magnitude))
        if not largest < np.inf:
            raise NonFiniteError(int(np.argmin(np.isfinite(values))))
        if largest == 0.0:
            return True
        k, unit = self._place_for(frexp(largest)[1] + odd.bit_length() + shift)
        if abs(shift - unit) > _SAFE_RANGE or largest > _SPLITS:
            return False
        bound = int(abs(largest * ldexp(odd, shift - unit))) + 1
        # A float64 ≥ 2**e is a multiple of 2**(e - 52), and each of 2**-1074.
        for cuts in _CUTS:
            where: Indices | None = _NOWHERE
            least = unit - shift - STEP * (cuts + 1)
            if least > -1074:
                small = np.less(magnitude, ldexp(1.0, least + 52), out=scratch.mask[:n])
                where = positions(small, n >> _SPARSE)
                if where is None:
                    where = positions(np.logical_and(small, magnitude, out=small), n >> _SPARSE)
            if where is not None:
                products = _products(values, odd, shift - unit, scratch)
                self._add_cut(k, products, bound, where, cuts)
                self._add_general(where, values[where], odd, shift)
                return True
        return False

    def _add_cut(
        self,
        k: int,
        products: tuple[Floats, Floats | None, Floats],
        bound: int,
        where: Indices,
        cuts: int,
    ) -> None:
        """Add products of more bits than a float64 has, cut at the units of limb k and lower ones.

        Args:
            k: The limb to begin with.
            products: See `_products`, in units of limb k; overwritten.
            bound: What no product exceeds.
            where: Positions whose products do not count.
            cuts: How often they are cut. What is left is whole units of the second limb below the
                last, and is added there.
        """
        high, low, whole = products
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
            self._deposit(k, None, whole, bound + 1)
            # The sum of two is rounded: what it leaves, which is not, may be over one half.
            excess = bound.bit_length() - 54
            bound = (1 << (STEP - 1)) + (1 << max(excess + STEP, 0))
        if low is not None:
            high += low
        if high.any():
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
        if not largest < np.inf:
            raise NonFiniteError(int(np.flatnonzero(~np.isfinite(values))[0]))
        reach = frexp(largest)[1]
        if values.dtype == np.float64 and (magnitude < ldexp(1.0, reach - _SAFE_RANGE)).any():
            # Values of exponents too far apart to be scaled together go in groups.
            far = (magnitude < ldexp(1.0, reach - _SAFE_RANGE)) & (magnitude > 0)
            if far.any():
                below = np.flatnonzero(far)
                near = np.where(far, 0.0, values)
                self._add_general(where, near, odd, shift)
                where = below if where is None else where[below]
                self._add_general(where, values[below], odd, shift)
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
                few = left <= rest.size >> _SPARSE
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

    def _limb(self, k: int) -> Floats:
        """Limb k, made if need be."""
        if k not in self.limbs:
            self.bounds[k] = 0
            self.limbs[k] = self._memory.pop() if self._memory else np.empty(self.size)
        return self.limbs[k]

    def _room(self, k: int, bound: int) -> Floats:
        """Limb k, ready to take integers up to the bound."""
        limb = self._limb(k)
        if not self.bounds[k]:
            limb.fill(0.0)
        elif self.bounds[k] + bound > _CAPACITY:
            self._carry(k)
        return limb

    def _deposit(self, k: int, where: Indices | None, part: Floats, bound: int) -> None:
        """Add integers of at most the bound to limb k; positions occur once each.

        They must stay as they are until the addition is made: they may be taken back. What is in
        the limb's own memory already counts from here on.
        """
        if part is self.limbs.get(k):
            self.bounds[k] = bound
            return
        limb = self._room(k, bound)
        self.bounds[k] += bound
        self._steps.append(_Step(k, where, part, bound))
        # What is done is noted by the very call that does it: nothing can come between the two.
        if where is None:
            self._done.extend(map(np.add, (limb,), (part,), (limb,)))
        else:
            self._done.extend(map(limb.__setitem__, (where,), (limb[where] + part,)))

    def _whole_or_not_at_all(self, deposit: Callable[[], None]) -> None:
        """Make an addition; take back what it deposited if it ends in an error.

        Any error: a MemoryError on the way, or a KeyboardInterrupt between any two instructions.
        `additions` says whether the addition stands; `is_whole`, if there is an error in taking
        back as well, that it does in part.
        """
        before, was_zero = self.additions, self.is_zero
        self._steps, self._done = [], []
        try:
            self.is_whole = False
            deposit()
            list(map(setattr, (self,) * 2, ("additions", "is_whole"), (before + 1, True)))
        except BaseException:
            if self.additions == before:  # pragma: no branch  (else it came after)
                steps = self._steps[: len(self._done)]
                if was_zero:
                    steps, self.loose, self.bounds = [], [], dict.fromkeys(self.limbs, 0)
                for k, where, part, bound in steps:
                    if bound == _LOOSE:
                        self.loose.pop()
                        continue
                    limb = self._room(k, bound)  # a carry may have come since
                    self.bounds[k] += bound
                    limb[slice(None) if where is None else where] -= part
                self.is_whole = True
            raise
        finally:
            self._steps, self._done = [], []

    def _carry(self, k: int) -> None:
        """Move the upper part of limb k to the limb above, some elements at a time."""
        limb = self.limbs[k]
        bound = (self.bounds[k] >> STEP) + 1
        above = self._room(k + 1, bound)
        self.bounds[k + 1] += bound
        for start in range(0, self.size, _PIECE):
            pair = above[start : start + _PIECE], limb[start : start + _PIECE]
            upper = np.rint(pair[1] * 2.0**-STEP)
            lower = upper * -(2.0**STEP)
            list(map(np.add, pair, (upper, lower), pair))
        self.bounds[k] = _SETTLED


def _below(
    bits: npt.NDArray[np.uint32], least: int, small: npt.NDArray[np.bool_]
) -> tuple[Indices | None, bool]:
    """Which float32 values are less than a power of two.

    Args:
        bits: The values' bits, their signs shifted out.
        least: The power's exponent.
        small: As many places; overwritten.

    Returns:
        Their positions, and whether there may be zeros in other places; no positions if they are
        too many to be picked out, zeros aside.
    """
    if least <= -126:
        return _NOWHERE, True
    most = bits.size >> _SPARSE
    if least > 127:
        return None, True
    np.less(bits, np.uint32((least + 127) << 24), out=small)
    where = positions(small, most)
    if where is not None:
        return where, False
    return positions(np.logical_and(small, bits, out=small), most), True


def _products(
    values: npt.NDArray[Any], odd: int, exponent: int, scratch: Scratch
) -> tuple[Floats, Floats | None, Floats]:
    """Values times ``odd · 2**exponent``, exactly, as sums of two.

    Of float32 values the weight is taken in two parts, of 24 and 29 bits; float64 values are, of 26
    bits each (Dekker, 1971), for weights of up to 27.

    Args:
        values: The values; only read.
        odd: See there.
        exponent: See there.
        scratch: Buffers.

    Returns:
        The two, the second less than the first by some 2**22, or None; and a third array. All of
        them are buffers.
    """
    n = values.size
    high, low, other = scratch.product[:n], scratch.spare[:n], scratch.whole[:n]
    if values.dtype == np.float32:
        upper, *lower = pieces(odd, exponent, _FAST_WEIGHT_BITS)
        np.multiply(values, ldexp(*upper), out=high, dtype=np.float64)
        if not lower:
            return high, None, other
        np.multiply(values, ldexp(*lower[0]), out=low, dtype=np.float64)
        return high, low, other
    factor = ldexp(odd, exponent)
    bits = high.view(np.uint64)
    np.add(values.view(np.uint64), _HALF, out=bits)
    bits &= _UPPER
    np.subtract(values, high, out=low)
    high *= factor
    low *= factor
    return high, low, other


def _do_both(first: Callable[[], object], second: Callable[[], object]) -> None:
    """Do two things in one call: nothing can come between them."""
    list(map(methodcaller("__call__"), (first, second)))
