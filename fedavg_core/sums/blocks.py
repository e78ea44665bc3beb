"""A model cut into blocks: runs of elements that the arithmetic handles in one go.

A block is at most `capacity` elements, so that the buffers for it stay in the processor's cache. A
large array is cut into several blocks; small ones are gathered, many to a block, so that a model
of a thousand little arrays does not pay for a thousand calls. What a block is made of is a list of
segments: which elements of which array stand where in it.

Arrays may be of any layout (strided, read-only, big-endian, memory-mapped, zero-dimensional,
empty). A block of one contiguous float32 or float64 array is read where it lies; everything else is
copied into a buffer, to float32 where that is exact and to float64 where not. Integers of 64 bits
that do not fit into a float64 are split in two, the upper part counting 2**32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.exact.products import Scratch
from fedavg_core.model import ArraySpec, Params, flat

__all__ = [
    "Block",
    "Buffers",
    "Segment",
    "fits_float32",
    "is_alone",
    "is_at_hand",
    "load",
    "pack",
]

Array: TypeAlias = npt.NDArray[Any]

_UPPER = 32  # bits below the upper part of a 64-bit integer
_EXACT_IN_FLOAT64 = 1 << 53
_READ_WHERE_THEY_LIE = frozenset({np.dtype(np.float32), np.dtype(np.float64)})


@dataclass(frozen=True)
class Segment:
    """Elements ``start`` to ``start + size`` of one array, at ``offset`` in the block."""

    key: str
    start: int
    size: int
    offset: int

    @property
    def place(self) -> slice:
        """Where the segment is in its block."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class Block:
    """A run of elements, made of segments that lie one behind the other."""

    segments: tuple[Segment, ...]
    size: int

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The arrays that its segments are of."""
        return tuple(segment.key for segment in self.segments)

    def locate(self, index: int) -> tuple[str, int]:
        """The array, and the position in it, that an element of the block comes from."""
        segment = next(s for s in self.segments if index < s.offset + s.size)
        return segment.key, segment.start + index - segment.offset


class Buffers:
    """Memory for one block under way, kept from one block to the next.

    Args:
        size: The largest number of elements of a block.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.narrow = np.empty(size, np.float32)
        self.wide = np.empty(size, np.float64)
        self.upper = np.empty(size, np.float64)
        self.scratch = Scratch(size)


def is_alone(size: int, capacity: int) -> bool:
    """Whether `pack` gives an array of so many elements blocks of its own."""
    return size > capacity // 8


def pack(spec: Mapping[str, ArraySpec], capacity: int) -> Iterator[Block]:
    """Cut arrays into blocks.

    Args:
        spec: The arrays.
        capacity: The most elements of a block, at least 1.

    Yields:
        Blocks that cover each element once. An array of more than an eighth of the capacity has
        blocks of its own, of like sizes, larger ones first; the others share, in their order, also
        to like sizes. A shared block is at most three quarters of the capacity, as the copy that it
        is read from takes its part of the cache.
    """
    sizes = {key: math.prod(array.shape) for key, array in spec.items()}
    shared = sum(size for size in sizes.values() if not is_alone(size, capacity))
    most = enough = capacity * 3 // 4
    if shared > most:  # as threads come in twos, so do blocks, of like sizes
        pairs = -(-shared // (2 * most))
        enough = -(-shared // (2 * pairs))
    gathered: list[Segment] = []
    filled = 0
    for key, size in sizes.items():
        if is_alone(size, capacity):
            pieces = -(-size // capacity)
            each, more = divmod(size, pieces)
            for number in range(pieces):
                start, stop = (each * n + min(n, more) for n in (number, number + 1))
                yield Block((Segment(key, start, stop - start, 0),), stop - start)
        elif size:
            if filled >= enough or filled + size > most:
                yield Block(tuple(gathered), filled)
                gathered, filled = [], 0
            gathered.append(Segment(key, 0, size, filled))
            filled += size
    if gathered:
        yield Block(tuple(gathered), filled)


def is_at_hand(block: Block, params: Params) -> bool:
    """Whether a block's values can be read where they lie; also if there are none."""
    array = params.get(block.segments[0].key)
    return len(block.segments) == 1 and (
        array is None or (array.dtype in _READ_WHERE_THEY_LIE and array.flags.c_contiguous)
    )


def load(
    block: Block, params: Params, keys: Collection[str], buffers: Buffers
) -> list[tuple[Array, int]]:
    """The values of a block.

    Args:
        block: The block.
        params: The arrays; those of the block that are missing count as zero. Only read.
        keys: Which of them to take.
        buffers: Memory to use.

    Returns:
        Parts ``(values, exponent)`` whose sum ``Σ values · 2**exponent`` is the block's values,
        exactly; none if the block has no key among those asked for. Values are float32 or float64,
        and stand in ``params`` or in the buffers: they hold until the buffers are used again.
    """
    if is_at_hand(block, params):
        key = block.segments[0].key
        return [(flat(params[key], block.segments[0].start, block.size), 0)] if key in keys else []
    segments, present = block.segments, block.keys
    is_whole = all(map(keys.__contains__, present))  # of a thousand little arrays, soon told
    if not is_whole:
        segments = tuple(segment for segment in segments if segment.key in keys)
        present = tuple(segment.key for segment in segments)
        if not present:
            return []
    arrays = list(map(params.__getitem__, present))
    dtypes = {array.dtype for array in arrays}
    narrow = all(map(fits_float32, dtypes))
    values: Array = (buffers.narrow if narrow else buffers.wide)[: block.size]
    upper = None
    with np.errstate(invalid="ignore"):  # NaNs are found by whoever reads the values
        if is_whole and (narrow or all(map(_fits_float64, dtypes))):
            if len(arrays) == 1:  # only where several share a block it has all of each
                arrays = [flat(arrays[0], segments[0].start, segments[0].size)]
            np.concatenate(arrays, axis=None, out=values, casting="unsafe")
            return [(values, 0)]
        values.fill(0.0)
        for segment, array in zip(segments, arrays, strict=True):
            source = flat(array, segment.start, segment.size)
            if _exceeds_float64(source):
                if upper is None:
                    upper = buffers.upper[: block.size]
                    upper.fill(0.0)
                # One by one, so that it does not show in rounded sums which are in one block.
                large = np.abs(source.astype(np.float64)) >= _EXACT_IN_FLOAT64
                upper[segment.place] = np.where(large, source >> _UPPER, 0)
                source = np.where(large, source & ((1 << _UPPER) - 1), source)
            values[segment.place] = source
    return [(values, 0)] if upper is None else [(values, 0), (upper, _UPPER)]


def fits_float32(dtype: np.dtype[Any]) -> bool:
    """Whether float32 holds every value of the dtype exactly."""
    return dtype.itemsize <= 2 or (dtype.kind == "f" and dtype.itemsize == 4)


def _fits_float64(dtype: np.dtype[Any]) -> bool:
    """Whether float64 holds every value of the dtype exactly."""
    return dtype.kind == "f" or dtype.itemsize <= 4


def _exceeds_float64(values: Array) -> bool:
    """Whether these are integers that float64 does not hold exactly."""
    if values.dtype.kind not in "iu" or values.dtype.itemsize < 8:
        return False
    return int(values.max()) > _EXACT_IN_FLOAT64 or int(values.min()) < -_EXACT_IN_FLOAT64
