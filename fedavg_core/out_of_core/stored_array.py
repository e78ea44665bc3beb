"""One array in a file, read in runs of elements.

Three things can be read from, and all give elements in C order, in the dtype that they are stored
in:

* `OpenBytes`: elements that lie in a file as they are. Any run can be read. In Fortran order the
  elements of a run lie scattered: the rows that it touches are read from every column. Where they
  are few (`is_scattered`) the array is first put in C order, in a file of its own (`put_in_order`).
* `Member` and `DeflatedMember`: bytes with a checksum over all of them, which are therefore read
  from the first to the last. What is kept from one run to the next is the checksum so far, and the
  state of zlib.
* `Unpacked`: an array that was copied to a file of its own, where any run can be read.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.codec.archive import BLOCK, require
from fedavg_core.codec.npy import Layout

__all__ = [
    "INFLATER_BYTES",
    "DeflatedMember",
    "Member",
    "OpenBytes",
    "StoredArray",
    "Unpacked",
]

Array: TypeAlias = npt.NDArray[Any]

INFLATER_BYTES = 1 << 16
"""The most memory that an unfinished deflated member keeps."""

_PACKED_BLOCK = 1 << 14
_FEW_ROWS = 64
_TILE = 1 << 7  # elements each way, of an array that is put in order


@dataclass(frozen=True, slots=True)
class StoredArray:
    """Where and how an array lies in a file.

    Attributes:
        layout: How it lies in its bytes, once they are inflated.
        offset: Where its bytes begin in the file, a header of its own included.
        packed: How many bytes they are in the file.
        deflated: Whether they are deflated.
        crc: Their CRC-32 when inflated, if the file tells.
    """

    layout: Layout
    offset: int
    packed: int
    deflated: bool = False
    crc: int | None = None


class OpenBytes:
    """Elements that lie in a file as they are.

    Args:
        layout: How; ``start`` counts from the beginning of the file.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def read(self, file: IO[bytes], start: int, size: int) -> Array:
        """Read a run.

        Args:
            file: The file, open in binary.
            start: The first element, in C order.
            size: How many, at least one.

        Returns:
            New memory.

        Raises:
            EOFError: The file is too short.
        """
        layout = self._layout
        if not layout.fortran:
            return self._elements(file, start, size)
        if size == layout.size:
            return _in_c_order(self._elements(file, start, size), layout.shape)
        return self._rows(file, start, size, layout.size // layout.shape[0])

    def _elements(self, file: IO[bytes], start: int, size: int) -> Array:
        """Read elements as they lie."""
        values = np.empty(size, self._layout.stored)
        at = self._layout.start + start * self._layout.stored.itemsize
        _fill(file, at, values.view(np.uint8).data)
        return values

    def _rows(self, file: IO[bytes], start: int, size: int, length: int) -> Array:
        """Read from an array in Fortran order by way of whole rows of some length."""
        shape, stored = self._layout.shape, self._layout.stored
        first, last = start // length, (start + size - 1) // length + 1
        slab = np.empty((length, last - first), stored)
        for column in range(length):
            at = self._layout.start + (column * shape[0] + first) * stored.itemsize
            _fill(file, at, slab[column].view(np.uint8).data)
        skip = start - first * length
        return _in_c_order(slab, (last - first, *shape[1:]))[skip : skip + size]

    def is_scattered(self, size: int) -> bool:
        """Whether a run of so many elements takes nearly as many reads, of a few elements each.

        Args:
            size: How many; not all.
        """
        layout = self._layout
        return layout.fortran and size < _FEW_ROWS * (layout.size // layout.shape[0])

    def put_in_order(self, file: IO[bytes], out: IO[bytes]) -> Layout:
        """Copy an array in Fortran order to another file, in C order.

        Args:
            file: The file, open in binary.
            out: The other, empty.

        Returns:
            How it lies there.

        Raises:
            EOFError: The file is too short.
        """
        layout = self._layout
        rows, *rest = (size for size in layout.shape if size != 1)
        length, itemsize = layout.size // rows, layout.stored.itemsize
        is_wide = len(rest) == 1 and rows <= _TILE  # whole columns, one after the other
        for left in range(0, length, _TILE):
            there = np.unravel_index(np.arange(left, min(left + _TILE, length)), rest)
            columns = np.ravel_multi_index(there, rest, order="F")
            for top in range(0, rows, _TILE):
                slab = np.empty((len(columns), min(_TILE, rows - top)), layout.stored)
                pieces = [slab.reshape(-1)] if is_wide else list(slab)
                for values, column in zip(pieces, columns.tolist(), strict=False):
                    at = layout.start + (column * rows + top) * itemsize
                    _fill(file, at, values.view(np.uint8).data)
                for row, values in enumerate(np.ascontiguousarray(slab.T), start=top):
                    out.seek((row * length + left) * itemsize)
                    out.write(values.view(np.uint8).data)
        return replace(layout, start=0, fortran=False)


class Member:
    """A member of an npz that is not deflated, read from its first byte to its last.

    Args:
        array: What it holds.
    """

    def __init__(self, array: StoredArray) -> None:
        self._layout = array.layout
        self._at = array.offset
        self._expected = array.crc
        self._crc = 0

    def skip(self, file: IO[bytes], start: int) -> None:
        """Read, and forget, the header and the elements before one."""
        left = self._layout.start + start * self._layout.stored.itemsize
        for _ in self._pieces(file, left):
            pass

    def read(self, file: IO[bytes], start: int, size: int) -> Array:
        """Read the next elements.

        Args:
            file: The npz, open in binary.
            start: The first element, in C order: the one after those that were read before.
            size: How many; all, if they are in Fortran order.

        Returns:
            New memory.

        Raises:
            EOFError, zlib.error: The member is damaged.
        """
        values = np.empty(size, self._layout.stored)
        view = values.view(np.uint8).data
        for begin in range(0, len(view), BLOCK):
            self._fill(file, view[begin : begin + BLOCK])
        return _in_c_order(values, self._layout.shape) if self._layout.fortran else values

    def finish(self, file: IO[bytes]) -> None:
        """See that all was read and was right.

        Raises:
            Damaged: The checksum tells otherwise.
        """
        require(self._crc == self._expected, "its bytes do not match their checksum")

    def unpack(self, file: IO[bytes], out: IO[bytes]) -> None:
        """Copy the whole member, which has not been read from, to another file.

        Raises:
            EOFError, zlib.error, Damaged: The member is damaged.
        """
        for piece in self._pieces(file, self._layout.start + self._layout.nbytes):
            out.write(piece)
        self.finish(file)

    def _pieces(self, file: IO[bytes], length: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(BLOCK, length)))
        while length:
            piece = buffer[: min(BLOCK, length)]
            self._fill(file, piece)
            yield piece
            length -= len(piece)

    def _fill(self, file: IO[bytes], piece: memoryview) -> None:
        self._next(file, piece)
        self._crc = zlib.crc32(piece, self._crc)

    def _next(self, file: IO[bytes], piece: memoryview) -> None:
        _fill(file, self._at, piece)
        self._at += len(piece)


class DeflatedMember(Member):
    """A deflated member of an npz, read from its first byte to its last.

    Args:
        array: What it holds.
    """

    def __init__(self, array: StoredArray) -> None:
        super().__init__(array)
        self._packed = array.packed
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)

    def finish(self, file: IO[bytes]) -> None:
        """See `Member.finish`; here also that the deflated bytes end where they should."""
        rest = self._inflate(file, 1)
        whole = self._inflater.eof and not self._packed and not self._inflater.unused_data
        require(whole and not rest, "its deflated bytes go on after its end")
        super().finish(file)

    def _next(self, file: IO[bytes], piece: memoryview) -> None:
        done = 0
        while done < len(piece):
            data = self._inflate(file, len(piece) - done)
            if not data:
                raise EOFError("a member is shorter than it declares")
            piece[done : done + len(data)] = data
            done += len(data)

    def _inflate(self, file: IO[bytes], most: int) -> bytes:
        """Some of the next inflated bytes; none only at the end."""
        result = b""
        while not result and not self._inflater.eof:
            packed = bytearray(min(_PACKED_BLOCK, self._packed))
            _fill(file, self._at, memoryview(packed))
            result = self._inflater.decompress(packed, most)
            used = len(packed) - len(self._inflater.unconsumed_tail)
            self._at += used
            self._packed -= used
            if not used:
                break
        return result


class Unpacked:
    """An array that was copied to a scratch file.

    Args:
        path: The scratch file.
        layout: How the array lies in it.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._path = path
        self._bytes = OpenBytes(layout)

    def read(self, file: IO[bytes], start: int, size: int) -> Array:
        """See `OpenBytes.read`; the file it was copied from is not needed."""
        with open(self._path, "rb", 0) as unpacked:
            return self._bytes.read(unpacked, start, size)

    def finish(self, file: IO[bytes]) -> None:
        """Take the scratch file away."""
        with contextlib.suppress(OSError):
            self._path.unlink()


def _fill(file: IO[bytes], at: int, view: memoryview) -> None:
    """Read some bytes of a file, all of them."""
    file.seek(at)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]  # every binary file has it
        if not count:
            raise EOFError("the file is shorter than it declares")
        view = view[count:]


def _in_c_order(values: Array, shape: tuple[int, ...]) -> Array:
    """Elements in Fortran order, put in C order."""
    elements: Array = values.reshape(shape[::-1]).T.reshape(-1)
    return elements
