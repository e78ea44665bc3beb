"""A model worked through in passes, each as many blocks as some memory holds exact sums of.

How much memory an exact sum takes depends on the values: a limb for each STEP bits between the
largest and the smallest. `sum_bytes` is the most that dtypes and weights could ask for, whatever
the values; some 110 bytes an element for float32 and whole numbers as weights. `cut` makes passes
that keep to it.

A `Pass` knows which run of elements of each array it needs (`runs`), takes those of one model after
the other (`add`), and gives the means, rounded (`means`). Nothing here knows files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.exact.exact_sum import ExactSum, NonFiniteError
from fedavg_core.exact.limbs import STEP
from fedavg_core.exact.rounding import quotient
from fedavg_core.model import ArraySpec, NumberFormat
from fedavg_core.sums.blocks import Block, Buffers, is_alone, load, pack
from fedavg_core.weight import Weight, dyadic

__all__ = ["BeyondRange", "Kind", "NotFinite", "Pass", "Run", "cut", "sum_bytes"]

Array: TypeAlias = npt.NDArray[Any]
Run: TypeAlias = "tuple[int, int]"
"""The first of some consecutive elements of an array, and their number."""

_EDGE_LIMBS = 5  # those that are not filled, at both ends, and what carries over
_LOOSE_BYTES = 3  # of parts kept aside: 16 each, for three sixteenths of the elements at most
_READ_COPIES = 4  # of elements that are read, while they are put in C order
_BLOCK_COPIES = 3  # of a block's sum: itself moved, what undoes an addition, a part taken
_BLOCK_BYTES = 400  # what dividing and rounding take, an element


class _AtElement(Exception):
    def __init__(self, key: str, index: int) -> None:
        super().__init__(key, index)
        self.key = key
        self.index = index


class NotFinite(_AtElement):
    """An element (of the array ``key``, at ``index`` in C order) is a NaN or an infinity."""


class BeyondRange(_AtElement):
    """The mean of an element is beyond the largest number of its dtype."""


@dataclass(frozen=True)
class Kind:
    """What parameters have in common that can share a block.

    Attributes:
        weight: Their denominator; 0 for those that no model has, which are copied from the base.
        spec: The dtype of the result; the shape does not count.
        sum_bytes: The most that one element's exact sum takes.
        read_bytes: The most that one element takes in a model.
    """

    weight: Weight
    spec: ArraySpec
    sum_bytes: int
    read_bytes: int

    @property
    def pass_bytes(self) -> int:
        """The most that one element takes for as long as its pass lasts."""
        return self.sum_bytes + _READ_COPIES * self.read_bytes

    @property
    def block_bytes(self) -> int:
        """The most that one element takes besides, for as long as its block is worked on."""
        return _BLOCK_COPIES * self.sum_bytes + _BLOCK_BYTES


class Pass:
    """Some blocks, and the exact sums of them.

    Args:
        works: The blocks, and the kind of each; adjoining ones of each array.
    """

    def __init__(self, works: Iterable[tuple[Block, Kind]]) -> None:
        works = list(works)
        self.runs: dict[str, Run] = {}
        """The elements of each array that are needed, of each model and of the base."""
        for block, _ in works:
            for segment in block.segments:
                start, size = self.runs.get(segment.key, (segment.start, 0))
                self.runs[segment.key] = start, size + segment.size
        self._works = [(self._within(block), kind, ExactSum(block.size)) for block, kind in works]

    def _within(self, block: Block) -> Block:
        """The same block, of arrays that consist of the runs only."""
        segments = (
            replace(segment, start=segment.start - self.runs[segment.key][0])
            for segment in block.segments
        )
        return Block(tuple(segments), block.size)

    def add(self, values: Mapping[str, Array], weight: Weight, buffers: Buffers) -> None:
        """Add a model.

        Args:
            values: The runs, one dimension each, of those arrays that it has; only read.
            weight: Its weight.
            buffers: Memory for one block.

        Raises:
            NotFinite: A value is a NaN or an infinity.
        """
        for block, _, total in self._works:
            try:
                for elements, exponent in load(block, values, values.keys(), buffers):
                    total.add(elements, weight * (1 << exponent), buffers.scratch)
            except NonFiniteError as error:
                raise NotFinite(*self._locate(block, error.index)) from None

    def _locate(self, block: Block, index: int) -> tuple[str, int]:
        key, index = block.locate(index)
        return key, self.runs[key][0] + index

    def means(self, base: Mapping[str, Array], buffers: Buffers) -> Iterator[Array]:
        """What the models that were added come to.

        Args:
            base: The runs of the base, in the dtypes of the result; none if there is no base. Only
                read.
            buffers: Memory for one block.

        Yields:
            The results, in the order of the blocks: some elements of one array at a time, which
            hold until the next are asked for.

        Raises:
            NotFinite: A value of the base, to which something was to be added.
            BeyondRange: A result is beyond the largest number of its dtype.
        """
        for block, kind, total in self._works:
            if not kind.weight:
                for segment in block.segments:
                    yield base[segment.key][segment.start : segment.start + segment.size]
                continue
            result = np.empty(block.size, kind.spec.dtype)
            parts = load(block, base, base.keys(), buffers)
            try:
                lost = quotient(
                    total, kind.weight, kind.spec.number, buffers.scratch, result, parts
                )
            except NonFiniteError as error:
                raise NotFinite(*self._locate(block, error.index)) from None
            if lost >= 0:
                raise BeyondRange(*self._locate(block, lost))
            for segment in block.segments:
                yield result[segment.place]


def cut(
    spec: Mapping[str, ArraySpec], kinds: Mapping[str, Kind], capacity: int, most: int
) -> Iterator[Pass]:
    """Cut a model into passes.

    Args:
        spec: The model, in the order in which the result is wanted.
        kinds: The kind of each of its arrays.
        capacity: The most elements of a block.
        most: The most bytes that a pass takes, if one block does not take more.

    Yields:
        Passes that cover each element once.
    """
    part: list[tuple[Block, Kind]] = []
    taken = 0

    def alike(key: str) -> tuple[Kind, bool]:
        # Apart, large arrays and small ones are packed in their order.
        return kinds[key], is_alone(math.prod(spec[key].shape), capacity)

    for (kind, _), keys in groupby(spec, key=alike):
        for block in pack({key: spec[key] for key in keys}, capacity):
            needed = block.size * kind.pass_bytes
            if part and taken + needed > most:
                yield Pass(part)
                part, taken = [], 0
            part.append((block, kind))
            taken += needed
    if part:
        yield Pass(part)


def sum_bytes(dtypes: Collection[np.dtype[Any]], total: Weight, least: int) -> int:
    """The most that the exact sum of one element can take.

    Args:
        dtypes: Those of what is added.
        total: The sum of all weights.
        least: An exponent; each weight is a multiple of 2**least.

    Returns:
        A number of bytes.
    """
    numbers = [ArraySpec((), dtype).number for dtype in dtypes]
    lowest = min(_last_place(number) for number in numbers)
    highest = max(math.frexp(number.largest)[1] for number in numbers)
    odd, exponent = dyadic(total)
    reach = highest + odd.bit_length() + exponent + 1  # 1: with a base it is twice the sum
    bits = reach - lowest - least
    limbs = bits // STEP + _EDGE_LIMBS
    return limbs * np.dtype(np.float64).itemsize + _LOOSE_BYTES


def _last_place(number: NumberFormat) -> int:
    """The exponent of the smallest number above zero."""
    return number.least_exponent - (number.precision - 1) if number.kind == "float" else 0
