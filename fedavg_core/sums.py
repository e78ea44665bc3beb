"""Weighted sums of named arrays.

All kinds cut the arrays into blocks (see `blocks`) and hold a sum for each block. They have one
interface, `Sums`, which knows arrays and weights and nothing of contributors or rounds. A caller
first makes room for the arrays (`grow`), then adds; what was made room for in vain is given back
(`shrink`). Blocks are independent of each other, so several threads may work on them.

`ExactSums` holds an `ExactSum` for each block. An addition to a block is whole or not at all, and
counted; so when one fails, those that were made before are known, and are undone by adding the same
with the opposite weight, exactly. Ordinary arithmetic is in `plain_sums`.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from fedavg_core.blocks import Block, Buffers, Segment, flat, load, pack
from fedavg_core.errors import OutOfRange, Reason, RefusedUpdate, UsageError, quoted
from fedavg_core.exact import STEP, ExactSum, NonFiniteError
from fedavg_core.model import ArraySpec, Params
from fedavg_core.readout import digits, from_digits, sign
from fedavg_core.results import Memory, Results, size_of
from fedavg_core.rounding import quotient
from fedavg_core.weight import Weight

__all__ = [
    "ExactSums",
    "Sums",
    "Term",
    "base_not_finite",
    "not_finite",
    "out_of_range",
    "shown_place",
]

Array: TypeAlias = npt.NDArray[Any]
Term: TypeAlias = "tuple[Params, Weight]"
Total = TypeVar("Total")

_THREAD_SHARE = 1 << 20  # elements that it takes to make a further thread worth its start
_GRID = 0  # the exponent of the grid on which digits are told


class Sums(ABC, Generic[Total]):
    """Weighted sums of named arrays, a ``Total`` for each block of them.

    Args:
        block: The number of elements handled in one go.
        threads: The most threads to spread the blocks over.
    """

    def __init__(self, block: int, threads: int) -> None:
        self._capacity = block
        self._threads = threads
        self._blocks: list[tuple[Block, Total]] = []
        self._places: dict[str, list[tuple[Segment, Total]]] = {}
        self._buffers: list[Buffers] = []
        self._memory = Memory()

    @abstractmethod
    def add(self, terms: Sequence[Term]) -> None:
        """Add each ``weight · params``.

        Raises:
            RefusedUpdate: A value is not finite. With this and any other error some may have been
                added; then `recover` is due.
        """

    @abstractmethod
    def merge(self, other: Sums[Total], keys: Collection[str]) -> None:
        """Add the sums that another one of the same kind has for some of the arrays.

        With an error some may have been added; then `recover_merge` is due.
        """

    @abstractmethod
    def mark(self) -> list[int]:
        """Begin a change.

        Returns:
            What `recover` and `recover_merge` need to know of the state before it: a number a
            block.
        """

    @abstractmethod
    def recover(self, terms: Sequence[Term], mark: list[int]) -> bool:
        """Make whole what an `add` that failed has left, in one way or the other.

        Returns:
            Whether the terms are in the sums now; else what was added since the mark is not.
        """

    @abstractmethod
    def recover_merge(self, other: Any, keys: Collection[str], mark: list[int]) -> bool:
        """Make whole what a `merge` that failed has left, in the same way."""

    @abstractmethod
    def reset(self) -> None:
        """Make every sum zero; the memory is kept."""

    @abstractmethod
    def parts(self, key: str) -> list[tuple[str, Array]]:
        """The sum of one array as named arrays, which hold its value and share no memory."""

    @abstractmethod
    def restore(self, key: str, parts: Mapping[str, Array]) -> None:
        """Add to a sum what `parts` gave; any ordinary exception if it is not of this array."""

    @abstractmethod
    def _make(self, sizes: Sequence[int]) -> Iterator[Total]:
        """Sums of so many elements, all zero, that lie in memory one behind the other.

        An array for all blocks together lies in large pages, where the system has them (NumPy asks
        for them from 4 MB on); reading and writing them is nearly half as fast again.
        """

    @abstractmethod
    def _divide(
        self,
        part: tuple[Block, Total, list[Segment]],
        weight: Weight,
        spec: ArraySpec,
        base: Params | None,
        buffers: Buffers,
        out: Array,
    ) -> int:
        """Write base plus sum over weight for some segments; the first beyond the dtype, or -1."""

    def grow(self, spec: Mapping[str, ArraySpec]) -> None:
        """Make room for further arrays, whose sums are zero."""
        size = sum(math.prod(array.shape) for array in spec.values())
        if size > sys.maxsize // 8:
            raise MemoryError(f"sums of {size} elements")
        np.empty(size, np.float32)  # if there is no memory for it, not even for its blocks
        # Gathered blocks take longest; at the end the other threads would wait for them.
        cut = sorted(pack(spec, self._capacity), key=lambda block: len(block.segments) == 1)
        blocks = list(zip(cut, self._make([block.size for block in cut]), strict=True))
        cut += [block for block, _ in self._blocks]
        largest = max((block.size for block in cut), default=0)
        threads = self._threads_for(cut)
        if threads > len(self._buffers) or largest > self._buffers[0].size:
            self._buffers = [Buffers(largest) for _ in range(threads)]
        for block, total in blocks:
            for segment in block.segments:
                self._places.setdefault(segment.key, []).append((segment, total))
        self._blocks += blocks

    def shrink(self, spec: Collection[str]) -> None:
        """Give back the room that was made since `grow` was last asked for one of these."""
        self._blocks[:] = [part for part in self._blocks if part[0].segments[0].key in spec]
        self._places = {key: places for key, places in self._places.items() if key in spec}

    @property
    def are_whole(self) -> bool:
        """Whether no sum holds a part of an addition, after `recover` or `recover_merge`."""
        return True

    def means(
        self, targets: Mapping[str, ArraySpec], weights: Mapping[str, Weight], base: Params | None
    ) -> dict[str, Array]:
        """The sums over their weights, added to a base if there is one.

        Args:
            targets: The arrays to compute; what they shall look like.
            weights: For each of them its weight, above zero.
            base: What to add them to; only read.

        Returns:
            New arrays; see `Results` for their memory.

        Raises:
            OutOfRange: A result is beyond the largest number of its dtype.
            UsageError: The base is not finite.
        """
        results = Results(targets, [block for block, _ in self._blocks], self._memory)

        def work(number: int, buffers: Buffers) -> None:
            block, total = self._blocks[number]
            # Segments of one weight and one dtype are divided and rounded together.
            alike: dict[tuple[Weight, np.dtype[Any]], list[Segment]] = {}
            for segment in block.segments:
                if segment.key in targets:
                    kind = weights[segment.key], targets[segment.key].dtype
                    alike.setdefault(kind, []).append(segment)
            for (weight, dtype), segments in alike.items():
                run = results.run(segments)
                out = buffers.wide.view(dtype)[: size_of(segments)] if run is None else run
                part = block, total, segments
                spec = targets[segments[0].key]
                beyond = self._divide(part, weight, spec, base, buffers, out)
                offset = 0
                for segment in segments:
                    if offset <= beyond < offset + segment.size:
                        index = segment.start + beyond - offset
                        raise out_of_range(segment.key, targets[segment.key], index)
                    if run is None:
                        results.flat[segment.key][:] = out[offset : offset + segment.size]
                    offset += segment.size

        self._each_block(work)
        return results.arrays

    def _each_block(self, work: Callable[[int, Buffers], None], backwards: bool = False) -> None:
        """Do some work for each block, on several threads if there is enough of it.

        If it fails for several blocks, the error is that for the first of them, whatever the
        threads, unless there is an interruption among them: numbers are handed out in order (unless
        backwards), and each that was handed out is tried. When this returns or raises, no thread is
        at work any more.
        """
        threads = self._threads_for([block for block, _ in self._blocks])
        numbers = iter(range(len(self._blocks))[:: -1 if backwards else 1])
        failed: list[tuple[int, BaseException]] = []
        busy: list[None] = []

        def run(buffers: Buffers, busy: list[None]) -> None:
            busy.append(None)  # before it looks whether something failed: see below
            number: int | None = None
            try:
                with np.errstate(all="ignore"):  # each thread has its own
                    while not failed:
                        number = next(numbers, None)
                        if number is None:
                            return
                        work(number, buffers)
            except BaseException as error:
                failed.append((len(self._blocks) if number is None else number, error))
            finally:
                busy.pop()

        others = [
            threading.Thread(target=run, args=(buffers, busy), daemon=True)
            for buffers in self._buffers[1:threads]
        ]
        started = []
        try:
            with contextlib.suppress(RuntimeError):  # there are no more threads to be had
                for other in others:
                    other.start()
                    started.append(other)
            if self._blocks:
                run(self._buffers[0], [])
            for other in started:
                other.join()
        except BaseException as error:  # pragma: no cover  (an interruption)
            failed.append((len(self._blocks), error))
        # A thread whose start or join was interrupted may say that it is not alive, and be at work.
        # It is busy by now, or will see that something failed before it does anything.
        waiting = True
        while waiting:
            try:
                while busy:  # pragma: no cover  (after an interruption)
                    time.sleep(0.001)
                waiting = False
            except BaseException as error:  # pragma: no cover  (an interruption)
                failed.append((len(self._blocks), error))
        try:
            if failed:
                # An interruption comes first: a refusal is an answer, and would hide it.
                raise min(failed, key=lambda one: (isinstance(one[1], Exception), one[0]))[1]
        finally:
            list(numbers)  # a thread that begins this late finds nothing to do
            failed.clear()  # an error that refers to itself would keep the update in memory

    def _threads_for(self, blocks: Sequence[Block]) -> int:
        """How many threads some blocks are worth, the calling one among them."""
        size = sum(block.size for block in blocks)
        return max(1, min(self._threads, size // _THREAD_SHARE, len(blocks)))

    def _segments(self, key: str) -> Sequence[tuple[Segment, Total]]:
        """Where one array is, from its first element on."""
        return self._places.get(key, ())

    def _counterparts(
        self, other: Sums[Total], keys: Collection[str]
    ) -> Iterator[tuple[Total, slice, Total, slice]]:
        """Which elements of our sums are the same as which of the other's."""
        theirs: dict[str, list[tuple[Segment, Total]]] = {}
        for block, source in other._blocks:
            for segment in block.segments:
                if segment.key in keys:
                    theirs.setdefault(segment.key, []).append((segment, source))
        for block, total in self._blocks:
            for ours in block.segments:
                for segment, source in theirs.get(ours.key, ()):
                    start = max(ours.start, segment.start)
                    stop = min(ours.start + ours.size, segment.start + segment.size)
                    if start < stop:
                        at = ours.offset + start - ours.start
                        of = segment.offset + start - segment.start
                        length = stop - start
                        yield total, slice(at, at + length), source, slice(of, of + length)


class ExactSums(Sums[ExactSum]):
    """Sums without rounding; see `Sums`."""

    def add(self, terms: Sequence[Term]) -> None:
        """See `Sums.add`."""

        def work(at: int, buffers: Buffers) -> None:
            block, total = self._blocks[at]
            for number, (params, weight) in enumerate(terms):
                try:
                    _add_block(block, total, params, params, weight, buffers)
                except NonFiniteError as error:
                    with RefusedUpdate.numbered(number, terms):
                        raise not_finite(params, *block.locate(error.index)) from None

        self._each_block(work)

    def merge(self, other: Sums[ExactSum], keys: Collection[str]) -> None:
        """See `Sums.merge`."""
        for total, at, source, of in self._counterparts(other, keys):
            total.add_sum(source.take(of), at=at)

    def mark(self) -> list[int]:
        """See `Sums.mark`: how many additions each block has had."""
        return [total.additions for _, total in self._blocks]

    def recover(self, terms: Sequence[Term], mark: list[int]) -> bool:
        """See `Sums.recover`: back."""
        for (block, total), before in zip(self._blocks, mark, strict=False):
            buffers, made = self._buffers[0], total.additions - before
            for params, weight in terms:
                for values, exponent in load(block, params, params, buffers):
                    if made > 0:
                        total.add(values, -weight * (1 << exponent), buffers.scratch)
                        made -= 1
        return False

    def recover_merge(self, other: Any, keys: Collection[str], mark: list[int]) -> bool:
        """See `Sums.recover_merge`: back."""
        made = {
            id(total): total.additions - before
            for (_, total), before in zip(self._blocks, mark, strict=False)
        }
        for total, at, source, of in self._counterparts(other, keys):
            if made.get(id(total), 0) > 0:  # blocks since the mark go as a whole
                total.add_sum(source.take(of), sign=-1, at=at)
                made[id(total)] -= 1
        return False

    @property
    def are_whole(self) -> bool:
        """See `Sums.are_whole`."""
        return all(total.is_whole for _, total in self._blocks)

    def is_zero(self, key: str) -> bool:
        """Whether every element of an array's sum is zero."""
        return not any(sign(total.take(s.place)).any() for s, total in self._segments(key))

    def reset(self) -> None:
        """See `Sums.reset`."""
        for _, total in self._blocks:
            total.reset()

    def parts(self, key: str) -> list[tuple[str, Array]]:
        """See `Sums.parts`: the sign, and the digits on one grid for all arrays."""
        pieces = [(s.size, *digits(total.take(s.place), _GRID)) for s, total in self._segments(key)]
        signs = [one for _, one, _ in pieces]
        result: list[tuple[str, Array]] = [("sign", np.concatenate([np.empty(0, np.int8), *signs]))]
        for k in sorted({k for _, _, columns in pieces for k in columns}):
            column = [columns.get(k, np.zeros(size, np.int32)) for size, _, columns in pieces]
            result.append((str(k), np.concatenate(column).astype("<i4", copy=False)))
        return result

    def restore(self, key: str, parts: Mapping[str, Array]) -> None:
        """See `Sums.restore`."""
        size = sum(segment.size for segment, _ in self._segments(key))
        for name, part in parts.items():
            least, most = (-1, 1) if name == "sign" else (0, (1 << STEP) - 1)
            if part.dtype.kind != "i" or part.shape != (size,):
                raise ValueError(f"expected {size} integers, got {part.dtype}{list(part.shape)}")
            if size and not (least <= part.min() and part.max() <= most):
                raise ValueError(f"expected integers from {least} to {most}")
        for segment, total in self._segments(key):
            of = slice(segment.start, segment.start + segment.size)
            columns = {int(k): part[of] for k, part in parts.items() if k != "sign"}
            piece = from_digits(segment.size, _GRID, parts["sign"][of], columns)
            total.add_sum(piece, at=segment.place)

    def _make(self, sizes: Sequence[int]) -> Iterator[ExactSum]:
        limbs = [np.empty(sum(sizes)) for _ in range(2)]  # pages are taken as they are written
        start = 0
        for size in sizes:
            yield ExactSum(size, [limb[start : start + size] for limb in limbs])
            start += size

    def _divide(
        self,
        part: tuple[Block, ExactSum, list[Segment]],
        weight: Weight,
        spec: ArraySpec,
        base: Params | None,
        buffers: Buffers,
        out: Array,
    ) -> int:
        block, total, segments = part
        where = None
        if len(segments) < len(block.segments):
            where = np.concatenate([np.arange(s.place.start, s.place.stop) for s in segments])
            total = total.take(where)
        if base is not None:
            total = total.take(slice(None))
            keys = {segment.key for segment in segments}
            try:
                _add_block(block, total, base, keys, weight, buffers, where)
            except NonFiniteError:
                raise base_not_finite(base, keys) from None
        return quotient(total, weight, spec.number, buffers.scratch, out)


def _add_block(
    block: Block,
    total: ExactSum,
    params: Params,
    keys: Collection[str],
    weight: Weight,
    buffers: Buffers,
    where: npt.NDArray[np.intp] | None = None,
) -> None:
    """Add a block's values to its sum; with positions, to a sum of those elements alone."""
    for values, exponent in load(block, params, keys, buffers):
        chosen = values if where is None else values[where]
        total.add(chosen, weight * (1 << exponent), buffers.scratch)


def shown_place(shape: tuple[int, ...], index: int) -> str:
    """An element's place in an array, from its place in C order, as messages tell it."""
    return str([int(i) for i in np.unravel_index(index, shape)])


def not_finite(params: Params, key: str, index: int) -> RefusedUpdate:
    """The refusal of params of which an array's element at ``index`` is not finite."""
    array = params[key]
    value = flat(array, index, 1)[0]
    return RefusedUpdate(
        Reason.NON_FINITE,
        key=key,
        expected="finite numbers",
        got=f"{float(value)} at {shown_place(array.shape, index)}",
    )


def base_not_finite(base: Params, keys: Collection[str]) -> UsageError:
    """The error for a base of which one of these arrays is not finite."""
    key = next(key for key in keys if not np.isfinite(base[key]).all())
    refusal = not_finite(base, key, int(np.argmin(np.isfinite(base[key]))))
    return UsageError(
        f"key {quoted(key)}: expected a base of {refusal.expected}, got {refusal.got}"
    )


def out_of_range(key: str, spec: ArraySpec, index: int) -> OutOfRange:
    """The error for a result, at ``index``, that an array's dtype cannot hold."""
    return OutOfRange(
        f"key {quoted(key)}: the result at {shown_place(spec.shape, index)} is beyond the largest "
        f"number of {spec.dtype}"
    )
