"""Weighted sums of named arrays in ordinary arithmetic, rounded at each addition.

A float64 or float32 array for each block holds the sum, and is added to in place. What was added
cannot be taken out again exactly, so an addition is looked at before it is made: one pass over all
of an update finds its NaNs, and only then a second one adds it. That reads the update twice, and is
still no slower than to write each sum beside the one before it, which it goes on from: storing to
memory that is not in the cache reads it first, and a sum takes more of it than an update. (A block
that is still zero needs no look ahead. It is written, and counts if all of the update was finite.)

From the first addition on there is no way back, only forward: what is interrupted then is finished
(`recover`). Each block knows how much of the update was added to it.

The last bits of a sum depend on the order of the additions, and on nothing else: not on blocks, nor
on threads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.blocks import Block, Buffers, Segment, flat, load
from fedavg_core.errors import OutOfRange, Reason, RefusedUpdate, quoted
from fedavg_core.model import ArraySpec, Params
from fedavg_core.sums import Sums, Term, base_not_finite, not_finite
from fedavg_core.weight import Weight

__all__ = ["PlainSums"]

Array: TypeAlias = npt.NDArray[Any]


class PlainSum:
    """A rounded sum of n elements; a new one is zero.

    Args:
        array: n float64 or float32; their contents do not matter.

    Attributes:
        array: The sum, unless it is zero.
        is_zero: Whether nothing was added.
        parts: Of how many parts the addition under way consists.
        made: As many items as parts were added.
    """

    __slots__ = ("array", "is_zero", "made", "parts")

    def __init__(self, array: Array) -> None:
        self.array = array
        self.is_zero = True
        self.parts = 0
        self.made: list[Array] = []

    def begin(self) -> None:
        """Begin an addition."""
        self.parts = 0
        self.made = []

    def add(self, product: Array) -> None:
        """Add a part."""
        before = self.array if self.made or not self.is_zero else 0.0
        # It is counted by the very call that adds it: nothing can come between the two.
        self.made.extend(map(np.add, (before,), (product,), (self.array,)))

    def fork(self) -> Array:
        """A copy of the sum, which is the sum from here on."""
        self.array = np.zeros_like(self.array) if self.is_zero else self.array.copy()
        self.is_zero = False
        return self.array


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
        factors = [self._factor(weight) for _, weight in terms]

        def check(number: int, buffers: Buffers) -> None:
            block, total = self._blocks[number]
            total.begin()
            for (params, _), factor in zip(terms, factors, strict=True):
                for values, exponent in load(block, params, params, buffers):
                    if total.is_zero and not total.parts:
                        self._add_part(total, values, factor * 2.0**exponent, buffers)
                    index = _first_not_finite(values, buffers)
                    if index >= 0:
                        raise not_finite(params, *block.locate(index))
                    total.parts += 1

        self._each_block(check)
        self._checked = True
        # Backwards: what was looked at last may be in the cache.
        self._each_block(self._rest_of(terms), backwards=True)

    def _rest_of(self, terms: Sequence[Term]) -> Callable[[int, Buffers], None]:
        """The work that adds to a block what was not added yet of terms that are finite."""

        def work(number: int, buffers: Buffers) -> None:
            block, total = self._blocks[number]
            skipped = len(total.made)
            for params, weight in terms if skipped < total.parts else ():
                for values, exponent in load(block, params, params, buffers):
                    if skipped:
                        skipped -= 1
                    else:
                        factor = self._factor(weight) * 2.0**exponent
                        self._add_part(total, values, factor, buffers)
            total.is_zero = total.is_zero and not total.parts

        return work

    def _add_part(self, total: PlainSum, values: Array, factor: float, buffers: Buffers) -> None:
        """Add values times a factor."""
        product = buffers.scratch.product.view(self._dtype)[: values.size]
        with np.errstate(over="ignore", invalid="ignore"):
            scale = self._dtype.type(factor)
            if values.dtype == np.float32 and self._dtype == np.float64:
                np.copyto(product, values)  # faster than a cast on the way
                np.multiply(product, scale, out=product)
            else:
                np.multiply(values, scale, out=product, casting="same_kind")
            total.add(product)

    def merge(self, other: Sums[PlainSum], keys: Collection[str]) -> None:
        """See `Sums.merge`: this writes beside the sums, and can be taken back."""
        begun: dict[int, Array] = {}
        for total, at, source, of in self._counterparts(other, keys):
            array = begun.get(id(total))
            if array is None:
                array = begun[id(total)] = total.fork()
            with np.errstate(over="ignore", invalid="ignore"):
                array[at] += source.array[of]

    def mark(self) -> list[Any]:
        """See `Sums.mark`: the array of each block, and whether it is zero."""
        self._checked = False
        return [(total.array, total.is_zero) for _, total in self._blocks]

    def recover(self, terms: Sequence[Term], mark: list[Any]) -> bool:
        """See `Sums.recover`: from the first addition on, forward."""
        work = self._rest_of(terms)
        for number in range(len(self._blocks)) if self._checked else ():
            work(number, self._buffers[0])  # in this thread: there may be no other to be had
        return self._checked

    def recover_merge(self, other: Any, keys: Collection[str], mark: list[Any]) -> bool:
        """See `Sums.recover_merge`: back."""
        for (_, total), (array, is_zero) in zip(self._blocks, mark, strict=False):
            total.array, total.is_zero = array, is_zero
        return False

    def reset(self) -> None:
        """See `Sums.reset`."""
        for _, total in self._blocks:
            total.is_zero = True

    def parts(self, key: str) -> list[tuple[str, Array]]:
        """See `Sums.parts`: the rounded sum."""
        pieces = [total.array[segment.place] for segment, total in self._segments(key)]
        return [("sum", np.concatenate([np.empty(0, self._dtype), *pieces]))]

    def restore(self, key: str, parts: Mapping[str, Array]) -> None:
        """See `Sums.restore`."""
        _check_part(parts["sum"], self._dtype, sum(s.size for s, _ in self._segments(key)))
        for segment, total in self._segments(key):
            array = total.fork() if total.is_zero else total.array
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
            mean = out[place] if out.dtype == self._dtype else spare
            with np.errstate(over="ignore", invalid="ignore"):
                divisor = self._dtype.type(float(weight))
                np.divide(total.array[segment.place], divisor, out=mean)
                if base is not None:
                    start = flat(base[segment.key], segment.start, segment.size)
                    if _first_not_finite(start, buffers) >= 0:
                        raise base_not_finite({segment.key})
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
    if part.dtype != dtype or part.shape != (size,) or not np.isfinite(part).all():
        raise ValueError(f"expected {size} finite numbers of {dtype}")


def _first_not_finite(values: Array, buffers: Buffers) -> int:
    """The position of the first NaN or infinity, or -1."""
    if values.dtype == np.float32:
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.dot(values, values)):
                return -1  # a sum of squares can only be finite if they all are
    fine = np.isfinite(values, out=buffers.scratch.spare.view(np.bool_)[: values.size])
    return -1 if fine.all() else int(np.argmin(fine))
