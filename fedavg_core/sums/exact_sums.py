"""Weighted sums of named arrays without rounding.

`ExactSums` holds an `ExactSum` for each block. An addition to a block is whole or not at all, and
counted; so when one fails, those that were made before are known, and are undone by adding the same
with the opposite weight, exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.bad_element import base_not_finite, not_finite
from fedavg_core.errors import RefusedUpdate, quoted
from fedavg_core.exact.exact_sum import ExactSum, NonFiniteError
from fedavg_core.exact.limbs import STEP
from fedavg_core.exact.readout import digits, from_digits, sign
from fedavg_core.exact.rounding import quotient
from fedavg_core.model import ArraySpec, Params
from fedavg_core.sums.blocks import Block, Buffers, Segment, load
from fedavg_core.sums.books import Term
from fedavg_core.sums.sums import Sums
from fedavg_core.weight import Weight, extent_of

__all__ = ["ExactSums"]

Array: TypeAlias = npt.NDArray[Any]

_GRID = 0  # the exponent of the grid on which digits are told


class ExactSums(Sums[ExactSum]):
    """Sums without rounding; see `Sums`."""

    def add(self, terms: Sequence[Term]) -> None:
        """See `Sums.add`."""

        def work(at: int, buffers: Buffers) -> None:
            block, total = self._blocks[at]
            for number, (params, weight) in enumerate(terms):
                try:
                    for values, exponent in load(block, params, params, buffers):
                        total.add(values, weight * (1 << exponent), buffers.scratch)
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

    def restore(self, key: str, parts: Mapping[str, Array], weight: Weight) -> None:
        """See `Sums.restore`."""
        size = sum(segment.size for segment, _ in self._segments(key))
        lowest, reach = extent_of(weight)
        for name in parts.keys() - {"sign"}:
            if str(int(name)) != name or not lowest <= STEP * int(name) < reach:
                raise ValueError(f"digits {quoted(name)}, which no sum with these weights has")
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
        if base is None:
            return quotient(total, weight, spec.number, buffers.scratch, out)
        keys = {segment.key for segment in segments}
        parts = load(block, base, keys, buffers)
        if where is not None:
            parts = [(values[where], exponent) for values, exponent in parts]
        try:
            return quotient(total, weight, spec.number, buffers.scratch, out, parts)
        except NonFiniteError:
            raise base_not_finite(base, keys) from None
