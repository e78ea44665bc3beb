"""Weighted sums of named arrays in ordinary arithmetic, rounded at each addition.

A float64 or float32 array for each block holds the sum, and is added to in place. What was added
cannot be taken out again exactly, so an addition takes two passes. The first reads all of an update
and finds its NaNs; the second adds it. That reads the update twice, and is still no slower than to
write each sum beside the one before it, which it goes on from: storing to memory that is not in the
cache reads it first, and a sum takes more of it than an update.

Where several updates are added at once, or one has to be copied to be read (float16, say, or many
small arrays), to do so twice would be slower. There the first pass does write the new sum beside
the one before it, in memory that is taken once it is needed, and the second pass lets it take the
other's place. So it is with a block that is still zero: there is no sum yet to spoil.

From the second pass on there is no way back, only forward: what is interrupted then is finished
(`recover`). Each block knows whether the update was added to it.

The last bits of a sum depend on the order of the additions, and on nothing else: not on blocks, nor
on threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.bad_element import base_not_finite, not_finite
from fedavg_core.errors import OutOfRange, Reason, RefusedUpdate, quoted
from fedavg_core.model import ArraySpec, Params, flat
from fedavg_core.sums.blocks import Block, Buffers, Segment, is_at_hand, load
from fedavg_core.sums.books import Term
from fedavg_core.sums.sums import Sums
from fedavg_core.weight import Weight

__all__ = ["PlainSums"]

Array: TypeAlias = npt.NDArray[Any]


class PlainSum:
    """A rounded sum of n elements, and memory for the next; a new one is zero.

    Args:
        array: n float64 or float32; their contents do not matter.

    Attributes:
        current: Which of two arrays is the sum; -1 for neither, which is zero.
        following: Which of them will be, once the addition under way is made.
        in_place: Whether that addition is made in place, by the second pass.
        made: One item once it is.
    """

    __slots__ = ("_pair", "current", "following", "in_place", "made")

    def __init__(self, array: Array) -> None:
        self._pair = [array]
        self.current = -1
        self.begin()

    @property
    def is_zero(self) -> bool:
        """Whether nothing was added."""
        return self.current < 0

    @property
    def value(self) -> Array:
        """The sum, if it is not zero."""
        return self._pair[self.current]

    def begin(self) -> None:
        """Begin an addition."""
        self.following = self.current
        self.in_place = False
        self.made: list[Array] = []

    def add(self, product: Array) -> None:
        """Add in place."""
        # It is counted by the very call that adds it: nothing can come between the two.
        self.made.extend(map(np.add, (self.value,), (product,), (self.value,)))

    def next(self) -> tuple[int, Array]:
        """The number and the memory of an array that is not the sum."""
        number = int(self.current == 0)
        if number == len(self._pair):
            self._pair.append(np.empty_like(self.value))
        return number, self._pair[number]

    def fork(self) -> Array:
        """A copy of the sum, which is the sum from here on, and may be changed in place."""
        number, array = self.next()
        array[:] = 0 if self.is_zero else self.value
        self.current = number
        return array


class PlainSums(Sums[PlainSum]):
    """Sums that are rounded at each addition; see `Sums`.

    Args:
        dtype: float64 or float32.
        block: The number of elements handled in one go.
        threads: The most threads to spread the blocks over.
    """

    def __init__(self, dtype: np.dtype[Any], block: int, threads: int) -> None:
        super().__init__(block, threads)
        self._dtype = dtype
        self._checked = False  # whether the addition under way is past its first pass

    def add(self, terms: Sequence[Term]) -> None:
        """See `Sums.add`."""
        factors = []
        for number, (_, weight) in enumerate(terms):
            with RefusedUpdate.numbered(number, terms):
                factors.append(self._factor(weight))

        def work(at: int, buffers: Buffers) -> None:
            block, total = self._blocks[at]
            total.begin()
            # Of several updates at once, each is read but once.
            alone = len(terms) == 1 and is_at_hand(block, terms[0][0])
            in_place = alone and not total.is_zero
            source = None if total.is_zero else total.value
            following, target = (total.current, source) if in_place else total.next()
            for number, (params, _) in enumerate(terms):
                for values, exponent in load(block, params, params, buffers):
                    index = _first_not_finite(values, buffers)
                    if index >= 0:
                        with RefusedUpdate.numbered(number, terms):
                            raise not_finite(params, *block.locate(index))
                    if in_place:
                        total.in_place = True
                        continue
                    product = self._product(values, factors[number], exponent, buffers)
                    np.add(0.0 if source is None else source, product, out=target)
                    source, total.following = target, following

        self._each_block(work)
        self._checked = True
        self._each_block(self._rest_of(terms))

    def _rest_of(self, terms: Sequence[Term]) -> Callable[[int, Buffers], None]:
        """The second pass: what it has to do, or has left to do, for a block."""
        factors = [self._factor(weight) for _, weight in terms]

        def work(number: int, buffers: Buffers) -> None:
            block, total = self._blocks[number]
            if total.in_place and not total.made:
                ((params, _),), (factor,) = terms, factors
                ((values, exponent),) = load(block, params, params, buffers)
                total.add(self._product(values, factor, exponent, buffers))
            total.current = total.following

        return work

    def _product(self, values: Array, factor: float, exponent: int, buffers: Buffers) -> Array:
        """Values times a factor times a power of two, in a buffer."""
        product = buffers.scratch.product.view(self._dtype)[: values.size]
        if exponent:  # apart from the factor: together they may overflow, and zeros be none
            values = values * 2.0**exponent
        scale = self._dtype.type(factor)
        if values.dtype == np.float32 and self._dtype == np.float64:
            np.copyto(product, values)  # faster than a cast on the way
            np.multiply(product, scale, out=product)
        else:
            np.multiply(values, scale, out=product, casting="same_kind")
        return product

    def merge(self, other: Sums[PlainSum], keys: Collection[str]) -> None:
        """See `Sums.merge`: this writes beside the sums, and can be taken back."""
        begun: dict[int, Array] = {}
        for total, at, source, of in self._counterparts(other, keys):
            array = begun.get(id(total))
            if array is None:
                array = begun[id(total)] = total.fork()
            array[at] += source.value[of]

    def mark(self) -> list[int]:
        """See `Sums.mark`: which array of each block is its sum."""
        self._checked = False
        return [total.current for _, total in self._blocks]

    def recover(self, terms: Sequence[Term], mark: list[int]) -> bool:
        """See `Sums.recover`: from the second pass on, forward."""
        if self._checked:
            work = self._rest_of(terms)
            for number in range(len(self._blocks)):
                work(number, self._buffers[0])  # in this thread: there may be no other to be had
        return self._checked

    def recover_merge(self, other: Any, keys: Collection[str], mark: list[int]) -> bool:
        """See `Sums.recover_merge`: back."""
        for (_, total), current in zip(self._blocks, mark, strict=False):
            total.current = current
        return False

    def reset(self) -> None:
        """See `Sums.reset`."""
        for _, total in self._blocks:
            total.current = -1

    def parts(self, key: str) -> list[tuple[str, Array]]:
        """See `Sums.parts`: the rounded sum."""
        pieces = [total.value[segment.place] for segment, total in self._segments(key)]
        return [("sum", np.concatenate([np.empty(0, self._dtype), *pieces]))]

    def restore(self, key: str, parts: Mapping[str, Array], weight: Weight) -> None:
        """See `Sums.restore`."""
        if parts.keys() != {"sum"}:
            raise ValueError(f"expected the array 'sum' alone, got {quoted(sorted(parts))}")
        _check_part(parts["sum"], self._dtype, sum(s.size for s, _ in self._segments(key)))
        for segment, total in self._segments(key):
            array = total.fork() if total.is_zero else total.value
            array[segment.place] += parts["sum"][segment.start : segment.start + segment.size]

    def _factor(self, weight: Weight) -> float:
        """The weight as a number of these sums' dtype, which can neither be 0 nor infinite."""
        limits = np.finfo(self._dtype)
        if not float(limits.smallest_normal) <= weight <= float(limits.max):
            raise RefusedUpdate(
                Reason.BAD_WEIGHT,
                expected=f"a weight that a sum in {self._dtype} can hold",
                got=quoted(float(weight) if weight < 1 else weight),
            )
        return float(weight)

    def _make(self, sizes: Sequence[int]) -> Iterator[PlainSum]:
        memory = np.empty(sum(sizes), self._dtype)  # pages are taken as they are written
        start = 0
        for size in sizes:
            yield PlainSum(memory[start : start + size])
            start += size

    def _divide(
        self,
        part: tuple[Block, PlainSum, list[Segment]],
        weight: Weight,
        spec: ArraySpec,
        base: Params | None,
        buffers: Buffers,
        out: Array,
    ) -> int:
        _, total, segments = part
        number, offset = spec.number, 0
        if weight > float(np.finfo(self._dtype).max):
            raise OutOfRange(
                f"key {quoted(segments[0].key)}: the sum of the weights is beyond the largest "
                f"number of {self._dtype}"
            )
        first, last = segments[0], segments[-1]
        if base is None and last.place.stop - first.offset == out.size:
            segments = [replace(first, size=out.size)]  # they lie side by side
        for segment in segments:
            place = slice(offset, offset + segment.size)
            spare = buffers.scratch.product.view(self._dtype)[: segment.size]
            at_once = out.dtype == self._dtype or (number.kind == "float" and base is None)
            mean = out[place] if at_once else spare
            held, divisor = total.value[segment.place], self._dtype.type(float(weight))
            np.divide(held, divisor, out=mean, dtype=self._dtype, casting="unsafe")
            if base is not None:
                start = flat(base[segment.key], segment.start, segment.size)
                if _first_not_finite(start, buffers) >= 0:
                    raise base_not_finite(base, {segment.key})
                mean += start.astype(self._dtype)
            if number.kind == "integer":
                np.rint(mean, out=mean)
                least = -number.largest - 1 if spec.dtype.kind == "i" else 0
                fine = (mean >= least) & (mean < float(number.largest + 1))
                out[place] = np.where(fine, mean, 0)
                beyond = -1 if fine.all() else int(np.argmin(fine))
            else:
                if mean is spare:
                    out[place] = mean
                beyond = _first_not_finite(out[place], buffers)
            if beyond >= 0:
                return offset + beyond
            offset += segment.size
        return -1


def _check_part(part: Array, dtype: np.dtype[Any], size: int) -> None:
    if part.dtype != dtype or part.shape != (size,):  # a sum may have overflowed
        raise ValueError(f"expected {size} numbers of {dtype}, got {part.dtype}{list(part.shape)}")


def _first_not_finite(values: Array, buffers: Buffers) -> int:
    """The position of the first NaN or infinity, or -1."""
    if values.dtype in (np.float32, np.float64):
        # A sum of products can only be finite if all factors are. Two places of the array are read
        # at a time, as memory gives more of two streams than of one.
        half = (values.size + 1) >> 1
        if math.isfinite(values[:half].dot(values[values.size - half :])):
            return -1
    fine = np.isfinite(values, out=buffers.scratch.spare.view(np.bool_)[: values.size])
    return -1 if fine.all() else int(np.argmin(fine))
