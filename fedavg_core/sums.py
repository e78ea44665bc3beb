"""Weighted sums of named arrays, in exact or in ordinary arithmetic.

Both kinds have one interface, `Sums`, which knows arrays and weights and nothing of updates, rounds
or refusals' contributors. A caller first makes room for the arrays (`grow`), then adds; what was
made room for and not used can be given back (`shrink`).

`ExactSums` cuts the arrays into blocks and holds an `ExactSum` for each. `PlainSums` holds one
float64 or float32 array for each; it serves to compare with, and where exactness is not wanted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from fractions import Fraction
from operator import itemgetter
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.blocks import Block, Buffers, Segment, flat, load, pack
from fedavg_core.errors import OutOfRange, Reason, RefusedUpdate, UsageError, quoted
from fedavg_core.exact import ExactSum, NonFiniteError
from fedavg_core.model import ArraySpec, Params
from fedavg_core.rounding import quotient

__all__ = ["ExactSums", "PlainSums", "Sums", "Weight"]

Array: TypeAlias = npt.NDArray[Any]
Weight: TypeAlias = "int | Fraction"

_THREAD_SHARE = 1 << 20  # elements that it takes to make a further thread worth its start
_GRID = 0  # the exponent of the grid on which digits are told


class Sums(Protocol):
    """Weighted sums of named arrays."""

    def grow(self, spec: Mapping[str, ArraySpec]) -> int:
        """Make room for further arrays; their sums are zero. Returns a mark for `shrink`."""

    def shrink(self, mark: int) -> None:
        """Give back the room made since the mark."""

    def add(self, params: Params, weight: Weight) -> None:
        """Add ``weight · params``, whole or not at all; RefusedUpdate if that is not finite."""

    def merge(self, other: Any, keys: Collection[str]) -> None:
        """Add the sums that another one of the same kind has for some of the arrays."""

    def is_zero(self, key: str) -> bool:
        """Whether every element of an array's sum is zero."""

    def means(
        self, targets: Mapping[str, ArraySpec], weights: Mapping[str, Weight], base: Params | None
    ) -> dict[str, Array]:
        """For each target the base's array, if there is a base, plus the sum over its weight."""

    def reset(self) -> None:
        """Make every sum zero; the memory is kept."""

    def parts(self, key: str) -> list[tuple[str, Array]]:
        """The sum of one array, as named arrays that hold its value."""

    def restore(self, key: str, parts: Mapping[str, Array]) -> None:
        """Add to a sum what `parts` gave; ValueError or KeyError if they are not of this array."""


class ExactSums:
    """Sums without rounding.

    Args:
        block: The number of elements handled in one go.
        threads: The most threads to spread the blocks over.
    """

    def __init__(self, block: int, threads: int) -> None:
        self._capacity = block
        self._threads = threads
        self._blocks: list[tuple[Block, ExactSum]] = []
        self._buffers: list[Buffers] = []

    def grow(self, spec: Mapping[str, ArraySpec]) -> int:
        """See `Sums.grow`."""
        mark = len(self._blocks)
        self._blocks += [(block, ExactSum(block.size)) for block in pack(spec, self._capacity)]
        largest = max((block.size for block, _ in self._blocks[mark:]), default=0)
        if not self._buffers or largest > self._buffers[0].size:
            self._buffers = [Buffers(largest) for _ in range(self._threads)]
        return mark

    def shrink(self, mark: int) -> None:
        """See `Sums.shrink`."""
        del self._blocks[mark:]

    def add(self, params: Params, weight: Weight) -> None:
        """See `Sums.add`."""
        done: list[int] = []

        def work(number: int, buffers: Buffers) -> None:
            block, total = self._blocks[number]
            try:
                _add_block(block, total, params, params, weight, buffers)
            except NonFiniteError as error:
                raise _not_finite(params, *block.locate(error.index)) from None
            done.append(number)

        try:
            self._each_block(work)
        except BaseException:
            for number in done:
                block, total = self._blocks[number]
                _add_block(block, total, params, params, -weight, self._buffers[0])
            raise

    def _each_block(self, work: Callable[[int, Buffers], None]) -> None:
        """Do some work for each block, on several threads if there is enough of it.

        If it fails for several blocks, the error is that for the first of them, whatever the
        threads: numbers are handed out in order, and each that was handed out is tried.
        """
        size = sum(block.size for block, _ in self._blocks)
        threads = min(self._threads, size // _THREAD_SHARE, len(self._blocks))
        numbers = iter(range(len(self._blocks)))
        failed: list[tuple[int, BaseException]] = []

        def run(buffers: Buffers) -> None:
            for number in numbers:
                try:
                    work(number, buffers)
                except BaseException as error:
                    failed.append((number, error))
                if failed:
                    return

        others = [
            threading.Thread(target=run, args=(buffers,), daemon=True)
            for buffers in self._buffers[1:threads]
        ]
        for other in others:
            other.start()
        if self._blocks:
            run(self._buffers[0])
        for other in others:
            other.join()
        if failed:
            raise min(failed, key=itemgetter(0))[1]

    def merge(self, other: ExactSums, keys: Collection[str]) -> None:
        """See `Sums.merge`."""
        done: list[tuple[ExactSum, ExactSum, slice]] = []
        try:
            for total, at, piece in self._counterparts(other, keys):
                total.add_sum(piece, at=at)
                done.append((total, piece, at))
        except BaseException:
            for total, piece, at in done:
                total.add_sum(piece, sign=-1, at=at)
            raise

    def _counterparts(
        self, other: ExactSums, keys: Collection[str]
    ) -> Iterator[tuple[ExactSum, slice, ExactSum]]:
        """Where in our blocks which pieces of the other's sums belong."""
        theirs = [
            (segment, total)
            for block, total in other._blocks
            for segment in block.segments
            if segment.key in keys
        ]
        by_key: dict[str, list[tuple[Any, ExactSum]]] = {}
        for segment, total in theirs:
            by_key.setdefault(segment.key, []).append((segment, total))
        for block, total in self._blocks:
            for ours in block.segments:
                for segment, source in by_key.get(ours.key, ()):
                    start = max(ours.start, segment.start)
                    stop = min(ours.start + ours.size, segment.start + segment.size)
                    if start < stop:
                        to = ours.offset + start - ours.start
                        of = segment.offset + start - segment.start
                        length = stop - start
                        yield total, slice(to, to + length), source.take(slice(of, of + length))

    def is_zero(self, key: str) -> bool:
        """See `Sums.is_zero`."""
        return not any(piece.sign().any() for piece in self._pieces(key))

    def _pieces(self, key: str) -> Iterator[ExactSum]:
        """The sums of one array's elements, from the first."""
        for block, total in self._blocks:
            for segment in block.segments:
                if segment.key == key:
                    yield total.take(segment.place)

    def means(
        self, targets: Mapping[str, ArraySpec], weights: Mapping[str, Weight], base: Params | None
    ) -> dict[str, Array]:
        """See `Sums.means`."""
        result = {key: np.empty(spec.shape, spec.dtype) for key, spec in targets.items()}
        flats = {key: array.reshape(-1) for key, array in result.items()}

        def work(number: int, buffers: Buffers) -> None:
            block, total = self._blocks[number]
            # Segments of one weight and one dtype are divided and rounded together.
            alike: dict[tuple[Weight, np.dtype[Any]], list[Segment]] = {}
            for segment in block.segments:
                if segment.key in targets:
                    kind = weights[segment.key], targets[segment.key].dtype
                    alike.setdefault(kind, []).append(segment)
            for (weight, dtype), segments in alike.items():
                where = None
                part = total
                if len(segments) < len(block.segments):
                    where = np.concatenate([np.arange(block.size)[s.place] for s in segments])
                    part = total.take(where)
                elif base is not None:
                    part = total.take(slice(None))
                if base is not None:
                    keys = {segment.key for segment in segments}
                    try:
                        _add_block(block, part, base, keys, weight, buffers, where)
                    except NonFiniteError:
                        raise UsageError(
                            "expected a base of finite numbers, got a NaN or an infinity among "
                            f"the keys {quoted(sorted(keys))}"
                        ) from None
                target = flats[segments[0].key]
                start, stop = segments[0].start, segments[0].start + part.size
                values = target[start:stop] if len(segments) == 1 else np.empty(part.size, dtype)
                form = targets[segments[0].key].number
                beyond = quotient(part, weight, form, buffers.scratch, values)
                if beyond >= 0:
                    key, index = block.locate(beyond if where is None else int(where[beyond]))
                    raise _out_of_range(key, targets[key], index)
                if len(segments) > 1:
                    offset = 0
                    for segment in segments:  # each of them a whole array
                        flats[segment.key][:] = values[offset : offset + segment.size]
                        offset += segment.size

        self._each_block(work)
        return result

    def reset(self) -> None:
        """See `Sums.reset`."""
        for _, total in self._blocks:
            total.reset()

    def parts(self, key: str) -> list[tuple[str, Array]]:
        """See `Sums.parts`: the sign, and the digits on one grid for all arrays."""
        pieces = [(piece.size, *piece.digits(_GRID)) for piece in self._pieces(key)]
        signs = [sign for _, sign, _ in pieces]
        result: list[tuple[str, Array]] = [("sign", np.concatenate([np.empty(0, np.int8), *signs]))]
        for k in sorted({k for _, _, digits in pieces for k in digits}):
            columns = [digits.get(k, np.zeros(size, np.int32)) for size, _, digits in pieces]
            result.append((str(k), np.concatenate(columns).astype("<i4", copy=False)))
        return result

    def restore(self, key: str, parts: Mapping[str, Array]) -> None:
        """See `Sums.restore`."""
        for block, total in self._blocks:
            for segment in block.segments:
                if segment.key == key:
                    of = slice(segment.start, segment.start + segment.size)
                    digits = {int(k): part[of] for k, part in parts.items() if k != "sign"}
                    piece = ExactSum.from_digits(segment.size, _GRID, parts["sign"][of], digits)
                    total.add_sum(piece, at=segment.place)


class PlainSums:
    """Sums that are rounded at each addition.

    Args:
        dtype: float64 or float32.
        block: The number of elements handled in one go.
    """

    def __init__(self, dtype: np.dtype[Any], block: int) -> None:
        self._dtype = dtype
        self._sums: dict[str, Array] = {}
        self._product = np.empty(block, dtype)

    def grow(self, spec: Mapping[str, ArraySpec]) -> int:
        """See `Sums.grow`."""
        mark = len(self._sums)
        for key, array in spec.items():
            self._sums[key] = np.zeros(array.shape, self._dtype)
        return mark

    def shrink(self, mark: int) -> None:
        """See `Sums.shrink`."""
        for key in list(self._sums)[mark:]:
            del self._sums[key]

    def add(self, params: Params, weight: Weight) -> None:
        """See `Sums.add`."""
        try:
            factor = float(weight)
        except OverflowError:
            raise RefusedUpdate(
                Reason.BAD_WEIGHT, expected="a weight that is a float64", got=quoted(weight)
            ) from None
        for key, array in params.items():
            for start in range(0, array.size, self._product.size):
                values = flat(array, start, min(self._product.size, array.size - start))
                fine = np.isfinite(values)
                if not fine.all():
                    raise _not_finite(params, key, start + int(np.argmin(fine)))
        with np.errstate(over="ignore"):
            for key, array in params.items():
                total = self._sums[key].reshape(-1)
                for start in range(0, array.size, self._product.size):
                    values = flat(array, start, min(self._product.size, array.size - start))
                    product = self._product[: values.size]
                    product[:] = values
                    product *= factor
                    total[start : start + values.size] += product

    def merge(self, other: PlainSums, keys: Collection[str]) -> None:
        """See `Sums.merge`."""
        for key in keys:
            self._sums[key] += other._sums[key]

    def is_zero(self, key: str) -> bool:
        """See `Sums.is_zero`."""
        return not self._sums[key].any()

    def means(
        self, targets: Mapping[str, ArraySpec], weights: Mapping[str, Weight], base: Params | None
    ) -> dict[str, Array]:
        """See `Sums.means`."""
        result = {}
        for key, spec in targets.items():
            number = spec.number
            with np.errstate(over="ignore", invalid="ignore"):
                mean = self._sums[key] / self._dtype.type(float(weights[key]))
                if base is not None:
                    mean = mean + base[key].astype(self._dtype)
                if number.kind == "integer":
                    mean = np.rint(mean)
                    least = -number.largest - 1 if spec.dtype.kind == "i" else 0
                    fine = (mean >= least) & (mean < float(number.largest + 1))
                    values = np.where(fine, mean, 0).astype(spec.dtype)
                else:
                    values = mean.astype(spec.dtype)
                    fine = np.isfinite(values)
            if not fine.all():
                raise _out_of_range(key, spec, int(np.argmin(fine)))
            result[key] = values
        return result

    def reset(self) -> None:
        """See `Sums.reset`."""
        for total in self._sums.values():
            total.fill(0)

    def parts(self, key: str) -> list[tuple[str, Array]]:
        """See `Sums.parts`: the rounded sum."""
        return [("sum", self._sums[key].copy())]

    def restore(self, key: str, parts: Mapping[str, Array]) -> None:
        """See `Sums.restore`."""
        self._sums[key] += parts["sum"].reshape(self._sums[key].shape)


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


def _position(shape: tuple[int, ...], index: int) -> str:
    return str([int(i) for i in np.unravel_index(index, shape)])


def _not_finite(params: Params, key: str, index: int) -> RefusedUpdate:
    array = params[key]
    value = flat(array, index, 1)[0]
    return RefusedUpdate(
        Reason.NON_FINITE,
        key=key,
        expected="finite numbers",
        got=f"{float(value)} at {_position(array.shape, index)}",
    )


def _out_of_range(key: str, spec: ArraySpec, index: int) -> OutOfRange:
    return OutOfRange(
        f"key {quoted(key)}: the result at {_position(spec.shape, index)} is beyond the largest "
        f"number of {spec.dtype}"
    )
