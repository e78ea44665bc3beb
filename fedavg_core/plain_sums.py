"""Weighted sums of named arrays in ordinary arithmetic, rounded at each addition.

A float64 or float32 array for each block holds the sum. Nothing that was added can be taken out
again exactly, so all values are looked at before the first is added. The last bits of a sum depend
on the order of the additions, and on nothing else: not on blocks, nor on threads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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


class PlainSums(Sums[Array]):
    """Sums that are rounded at each addition; see `Sums`.

    Args:
        dtype: float64 or float32.
        block: The number of elements handled in one go.
        threads: The most threads to spread the blocks over.
    """

    def __init__(self, dtype: np.dtype[Any], block: int, threads: int) -> None:
        super().__init__(block, threads)
        self._dtype = dtype
        self._under_way = False

    def add(self, terms: Sequence[Term]) -> None:
        """See `Sums.add`."""
        for params, weight in terms:
            self._check(params, weight)
        self._under_way = True
        for params, weight in terms:
            self._add(params, float(weight))
        self._under_way = False

    def merge(self, other: Sums[Array], keys: Collection[str]) -> None:
        """See `Sums.merge`."""
        self._under_way = True
        super().merge(other, keys)
        self._under_way = False

    def mark(self) -> list[int]:
        """See `Sums.mark`."""
        return [0] * len(self._blocks)

    def undo(self, terms: Sequence[Term], mark: list[int]) -> bool:
        """See `Sums.undo`: sums that were being changed cannot be had back."""
        return not self._under_way

    def undo_merge(self, other: Any, keys: Collection[str], mark: list[int]) -> bool:
        """See `Sums.undo_merge`: the same."""
        return not self._under_way

    def _check(self, params: Params, weight: Weight) -> None:
        """Refuse what could not be added."""
        try:
            float(weight)
        except OverflowError:
            raise RefusedUpdate(
                Reason.BAD_WEIGHT, expected="a weight that is a float64", got=quoted(weight)
            ) from None

        def work(number: int, buffers: Buffers) -> None:
            block, _ = self._blocks[number]
            for values, _ in load(block, params, params, buffers):
                index = _first_not_finite(values)
                if index >= 0:
                    raise not_finite(params, *block.locate(index))

        self._each_block(work)

    def _add(self, params: Params, factor: float) -> None:
        def work(number: int, buffers: Buffers) -> None:
            block, total = self._blocks[number]
            for values, exponent in load(block, params, params, buffers):
                product = buffers.scratch.product.view(self._dtype)[: block.size]
                with np.errstate(over="ignore", invalid="ignore"):
                    scale = self._dtype.type(factor * 2.0**exponent)
                    np.multiply(values, scale, out=product, casting="same_kind")
                    np.add(total, product, out=total)

        self._each_block(work)

    def reset(self) -> None:
        """See `Sums.reset`."""
        for _, total in self._blocks:
            total.fill(0)
        self._under_way = False

    def parts(self, key: str) -> list[tuple[str, Array]]:
        """See `Sums.parts`: the rounded sum."""
        pieces = [total[segment.place] for segment, total in self._segments(key)]
        return [("sum", np.concatenate([np.empty(0, self._dtype), *pieces]))]

    def restore(self, key: str, parts: Mapping[str, Array]) -> None:
        """See `Sums.restore`."""
        _check_part(parts["sum"], self._dtype, sum(s.size for s, _ in self._segments(key)))
        for segment, total in self._segments(key):
            total[segment.place] += parts["sum"][segment.start : segment.start + segment.size]

    def _make(self, size: int) -> Array:
        return np.zeros(size, self._dtype)

    def _add_piece(self, total: Array, at: slice, other: Array, of: slice) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            total[at] += other[of]

    def _divide(
        self,
        part: tuple[Block, Array, list[Segment]],
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
        for segment in segments:
            place = slice(offset, offset + segment.size)
            with np.errstate(over="ignore", invalid="ignore"):
                mean = total[segment.place] / self._dtype.type(float(weight))
                if base is not None:
                    start = flat(base[segment.key], segment.start, segment.size)
                    if _first_not_finite(start) >= 0:
                        raise base_not_finite({segment.key})
                    mean = mean + start.astype(self._dtype)
                if number.kind == "integer":
                    mean = np.rint(mean)
                    least = -number.largest - 1 if spec.dtype.kind == "i" else 0
                    fine = (mean >= least) & (mean < float(number.largest + 1))
                    out[place] = np.where(fine, mean, 0)
                else:
                    out[place] = mean
                    fine = np.isfinite(out[place])
            if not fine.all():
                return offset + int(np.argmin(fine))
            offset += segment.size
        return -1


def _check_part(part: Array, dtype: np.dtype[Any], size: int) -> None:
    if part.dtype != dtype or part.shape != (size,) or not np.isfinite(part).all():
        raise ValueError(f"expected {size} finite numbers of {dtype}")


def _first_not_finite(values: Array) -> int:
    """The position of the first NaN or infinity, or -1."""
    if values.dtype in (np.float32, np.float64):
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.dot(values, values)
        if np.isfinite(squares):
            return -1  # a sum of squares can only be finite if they all are
    fine = np.isfinite(values)
    return -1 if fine.all() else int(np.argmin(fine))
