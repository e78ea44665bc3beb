"""Exact numbers, element by element: whole float64 numbers on a grid of powers of two.

`Limbs` hold, for each of n elements,

    value = Σ_k limb[k] · 2**(origin + STEP·k)

where each limb is a float64 array of *integers*. Float64 adds integers exactly as long as no sum
exceeds 2**53, whatever the order; so each limb carries a bound on what it may hold, and when the
next deposit could break the bound, its upper part is first moved to the limb above (`_carry`). A
few fractions of limb 0's unit may be loose, each with its position, until there are so many that a
limb pays.

An addition, of any number of deposits, is made whole or not at all, whatever interrupts it. Python
delivers a signal between two of its instructions, so what belongs together is done by one call into
C: `map` over the operations, drained by `list` or `extend`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from operator import methodcaller
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["CAPACITY", "LOOSE_BOUND", "SETTLED", "STEP", "Limbs"]

Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.intp]
Self = TypeVar("Self", bound="Limbs")

STEP = 24
"""Bits from one limb to the next."""

CAPACITY = 1 << 53
"""What no element of a limb exceeds."""

SETTLED = 1 << (STEP - 1)
"""What no element of a limb exceeds after a carry."""

LOOSE_BOUND = SETTLED
"""What no loose part exceeds, in units of limb -1."""

_MOST_LOOSE = 16  # and one: an addition may leave two, of two pieces of a weight
_PIECE = 1 << 12  # elements that are carried in one go
_LOOSE = 0  # in place of a bound: the step was to keep something aside


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

    def kept_from(self, buffers: Iterable[Floats]) -> _Step:
        """The same, with nothing in buffers that are about to be used again."""
        if any(self.part.base is buffer for buffer in buffers):
            return self._replace(part=self.part.copy())
        return self


class Limbs:
    """For each of n elements an exact number; new ones are zero.

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

    def take(self: Self, where: Indices | slice) -> Self:
        """The numbers of some of the elements.

        Args:
            where: Which elements: ascending positions, or a slice of consecutive ones.

        Returns:
            New ones; these are unchanged.
        """
        if isinstance(where, slice):
            start, stop, _ = where.indices(self.size)
            taken = type(self)(stop - start)
        else:
            taken = type(self)(where.size)
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
            if self.bounds.get(k, 0) > SETTLED:
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

    def _keep_few_loose(self, most: int) -> None:
        """Make room for two more lists of what is loose; the value stays.

        Args:
            most: How many elements may be loose without a limb for them.
        """
        if len(self.loose) >= _MOST_LOOSE or self._loose_size() > most:
            if not self.bounds.get(-1):
                self._join()
            if self.bounds.get(-1) or self._loose_size() > most >> 1:
                self.tuck()

    def _loose_size(self) -> int:
        return sum(where.size for where, _ in self.loose)

    def used(self) -> list[int]:
        """The limbs that may hold something, from the lowest."""
        return sorted(k for k, bound in self.bounds.items() if bound)

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
        elif self.bounds[k] + bound > CAPACITY:
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

    def _deposit_loose(self, where: Indices, part: Floats) -> None:
        """Keep fractions of limb 0's units aside."""
        self._steps.append(_Step(-1, where, part, _LOOSE))
        self._done.extend(map(self.loose.append, ((where, part),)))

    def _keep_steps_from(self, buffers: Iterable[Floats]) -> None:
        """Let nothing that may have to be taken back be in buffers that are used again."""
        if self._steps:
            self._steps = [step.kept_from(buffers) for step in self._steps]

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
        self.bounds[k] = SETTLED


def _do_both(first: Callable[[], object], second: Callable[[], object]) -> None:
    """Do two things in one call: nothing can come between them."""
    list(map(methodcaller("__call__"), (first, second)))
