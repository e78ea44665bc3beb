"""The memory that means are written to.

Large arrays have memory of their own. Small ones of one dtype lie side by side in one piece, in the
order in which blocks hold them. So those of a block are written in one go, and the memory comes in
large pages, where the system has them: taking a thousand small pieces from it costs more than the
arithmetic does.

Large pages are dear as well: to have them cleared by the system can take longer than an addition.
So the memory of the last two means stays (`Memory`), and serves again once nobody has an array in
it. Where each new model takes the place of the one before, the two serve in turn.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.model import ArraySpec
from fedavg_core.sums.blocks import Block, Segment

__all__ = ["Memory", "Results", "size_of"]

Array: TypeAlias = npt.NDArray[Any]
Piece: TypeAlias = "tuple[int, np.dtype[Any]]"
"""A number of elements, and their dtype."""

_LARGE = 4 << 20  # bytes; NumPy asks for large pages from here on


class Memory:
    """The memory of the last two means, as arrays of one dimension."""

    def __init__(self) -> None:
        self._kept: list[list[Array]] = [[], []]

    def __deepcopy__(self, memo: object) -> Memory:
        return Memory()

    def lend(self, pieces: Mapping[Any, Piece]) -> dict[Any, Array]:
        """Memory for one mean, which nobody has.

        Args:
            pieces: What is wanted, under any names.

        Returns:
            Arrays under those names, whose contents do not matter. Others are to be given views of
            them: that somebody has one then shows in the references to the array.
        """
        idle: dict[Piece, list[Array]] = {}
        unused = min(_UNUSED, _last_of([np.empty(0)])[1])  # a debugger may have been looking on
        busy: list[Array] = []
        for mean in self._kept:
            busy = []  # in the end, of the later of the two
            while mean:
                array, references = _last_of(mean)
                # What somebody has made another shape of, or read-only, is not used again.
                if references == unused and array.ndim == 1 and array.flags.carray:
                    idle.setdefault((array.size, array.dtype), []).append(array)
                else:
                    busy.append(array)
        lent = {
            name: idle[piece].pop() if idle.get(piece) else np.empty(*piece)
            for name, piece in pieces.items()
        }
        self._kept = [busy, list(lent.values())]
        return lent


def _last_of(arrays: list[Array]) -> tuple[Array, int]:
    """Take the last array off a list, and count the references to it."""
    array = arrays.pop()
    return array, sys.getrefcount(array)


_UNUSED = _last_of([np.empty(0)])[1]


class Results:
    """New arrays, to be written block by block; see the module's text for their memory.

    Args:
        targets: What they shall look like.
        blocks: All blocks, in their order.
        memory: Where to take their memory from.

    Attributes:
        arrays: The arrays, in the order of the targets.
    """

    def __init__(
        self, targets: Mapping[str, ArraySpec], blocks: Sequence[Block], memory: Memory
    ) -> None:
        self._start: dict[str, int] = {}
        ends: dict[np.dtype[Any], int] = {}
        sizes = {key: math.prod(spec.shape) for key, spec in targets.items()}
        for key in [s.key for block in blocks for s in block.segments if s.start == 0]:
            if key in sizes and sizes[key] * (dtype := targets[key].dtype).itemsize < _LARGE:
                self._start[key] = start = ends.get(dtype, 0)
                ends[dtype] = start + sizes[key]
        pieces: dict[Any, Piece] = {dtype: (size, dtype) for dtype, size in ends.items()}
        for key in targets.keys() - self._start.keys():
            pieces[key] = sizes[key], targets[key].dtype
        self._memory = memory.lend(pieces)
        self.arrays: dict[str, Array] = {}
        for key, spec in targets.items():
            start = self._start.get(key, -1)
            flat = (
                self._memory[key] if start < 0 else self._memory[spec.dtype][start:][: sizes[key]]
            )
            self.arrays[key] = flat.reshape(spec.shape)

    def part(self, segment: Segment) -> Array:
        """Where to write the elements of one segment: a view of one dimension."""
        return self.arrays[segment.key].reshape(-1)[segment.start : segment.start + segment.size]

    def run(self, segments: Sequence[Segment]) -> Array | None:
        """Where to write some elements in one go.

        Args:
            segments: Some of those of a block, in their order, of one dtype.

        Returns:
            Their elements as one array, a view; None if they do not lie side by side.
        """
        first, last = segments[0], segments[-1]
        if first is last:
            return self.part(first)
        start, stop = self._start.get(first.key), self._start.get(last.key)
        if start is None or stop is None or stop + last.size - start != size_of(segments):
            return None
        return self._memory[self.arrays[first.key].dtype][start : stop + last.size]


def size_of(segments: Sequence[Segment]) -> int:
    """The number of elements of some segments."""
    return sum(segment.size for segment in segments)
