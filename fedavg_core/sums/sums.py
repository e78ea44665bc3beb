"""Weighted sums of named arrays.

There are two kinds, without rounding (`exact_sums`) and in ordinary arithmetic (`plain_sums`). Both
cut the arrays into blocks (see `blocks`) and hold a sum for each block. They have one interface,
`Sums`, which knows arrays and weights and nothing of contributors or rounds. A caller first makes
room for the arrays (`grow`), then adds; what was made room for in vain is given back (`shrink`).
Blocks are independent of each other, so several threads may work on them (see `threads`).
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from fedavg_core.bad_element import out_of_range
from fedavg_core.model import ArraySpec, Params
from fedavg_core.sums.blocks import Block, Buffers, Segment, pack
from fedavg_core.sums.books import Term
from fedavg_core.sums.results import Memory, Results, size_of
from fedavg_core.sums.threads import share_out
from fedavg_core.weight import Weight

__all__ = ["Sums"]

Array: TypeAlias = npt.NDArray[Any]
Total = TypeVar("Total")

_THREAD_SHARE = 1 << 20  # elements that it takes to make a further thread worth its start


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
    def restore(self, key: str, parts: Mapping[str, Array], weight: Weight) -> None:
        """Add to a sum what `parts` gave.

        Args:
            key: The array.
            parts: What that gave.
            weight: The sum of the array's weights, which says how large its sum may be.

        Raises:
            Exception: Any ordinary one: these are no parts of a sum of this array.
        """

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
            raise MemoryError("sums of more elements than can be addressed")
        np.empty(size, np.float32)  # if there is no memory for it, not even for its blocks
        # What takes longest comes first, so that no thread waits for it at the end: blocks of
        # several arrays, which are copied to be read, then the larger ones. Those of one array stay
        # in their order.
        cut = sorted(
            pack(spec, self._capacity), key=lambda block: (len(block.segments) == 1, -block.size)
        )
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
                        results.part(segment)[:] = out[offset : offset + segment.size]
                    offset += segment.size

        self._each_block(work)
        return results.arrays

    def _each_block(self, work: Callable[[int, Buffers], None]) -> None:
        """Do some work for each block, on several threads if there is enough of it."""
        blocks = [block for block, _ in self._blocks]
        share_out(len(blocks), work, self._buffers[: self._threads_for(blocks)])

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
