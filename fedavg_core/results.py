"""The memory that means are written to.

Large arrays have memory of their own. Small ones of one dtype lie side by side in one piece, in the
order in which blocks hold them. So those of a block are written in one go, and the memory comes in
large pages, where the system has them: taking a thousand small pieces from it costs more than the
arithmetic does. The piece is free when none of its arrays is in use any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.blocks import Block, Segment
from fedavg_core.model import ArraySpec

__all__ = ["Results", "size_of"]

Array: TypeAlias = npt.NDArray[Any]

_LARGE = 4 << 20  # bytes; NumPy asks for large pages from here on


class Results:
    """New arrays, to be written block by block; see the module's text for their memory.

    Args:
        targets: What they shall look like.
        blocks: All blocks, in their order.

    Attributes:
        arrays: The arrays, in the order of the targets.
        flat: The same, in one dimension.
    """

    def __init__(self, targets: Mapping[str, ArraySpec], blocks: Sequence[Block]) -> None:
        self._start: dict[str, int] = {}
        ends: dict[np.dtype[Any], int] = {}
        sizes = {key: math.prod(spec.shape) for key, spec in targets.items()}
        for key in (s.key for block in blocks for s in block.segments if s.start == 0):
            if key in targets and sizes[key] * targets[key].dtype.itemsize < _LARGE:
                self._start[key] = ends.get(targets[key].dtype, 0)
                ends[targets[key].dtype] = self._start[key] + sizes[key]
        self._memory = {dtype: np.empty(size, dtype) for dtype, size in ends.items()}
        self.flat = {
            key: self._memory[spec.dtype][self._start[key] :][: sizes[key]]
            if key in self._start
            else np.empty(sizes[key], spec.dtype)
            for key, spec in targets.items()
        }
        self.arrays = {key: self.flat[key].reshape(spec.shape) for key, spec in targets.items()}

    def run(self, segments: Sequence[Segment]) -> Array | None:
        """Where to write some elements in one go.

        Args:
            segments: Some of those of a block, in their order, of one dtype.

        Returns:
            Their elements as one array, a view; None if they do not lie side by side.
        """
        first, last = segments[0], segments[-1]
        if first is last:
            return self.flat[first.key][first.start : first.start + first.size]
        start, stop = self._start.get(first.key), self._start.get(last.key)
        if start is None or stop is None or stop + last.size - start != size_of(segments):
            return None
        return self._memory[self.flat[first.key].dtype][start : stop + last.size]


def size_of(segments: Sequence[Segment]) -> int:
    """The number of elements of some segments."""
    return sum(segment.size for segment in segments)
