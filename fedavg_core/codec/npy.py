"""One array in the npy format: how it lies in its bytes.

Nothing in a header is evaluated, and no size is believed before memory is asked for: a header must
be the literal that NumPy writes, for an array of numbers that takes just the bytes that are there.

The npy format cannot tell the dtypes of `ml_dtypes` from raw bytes. Such an array is stored as
bytes, and what they mean has to be known from elsewhere.
"""

from __future__ import annotations

import math
import re
import struct
import sys
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fedavg_core.codec.archive import Damaged, require
from fedavg_core.model import ArraySpec, is_extension

__all__ = [
    "MAGIC",
    "MOST_DIMENSIONS",
    "Layout",
    "check_shape",
    "decoded",
    "encoded",
    "fits",
    "header_of",
    "read_exactly",
    "read_layout",
]

MAGIC = b"\x93NUMPY"
"""What an npy file begins with."""

MOST_DIMENSIONS = 32
"""How many dimensions an array may have to be read; NumPy before version 2 knows no more."""

_MOST_HEADER = 10_000
_WIDEST = 8  # bytes of an element
_PLAIN_CODES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_HEADER = re.compile(
    rb"\{'descr': '([<>|])([a-zA-Z][0-9]{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,19}(?:, |,(?=\))|(?=\))))*)\), \} *\n"
)


@dataclass(frozen=True, slots=True)
class Layout:
    """How an array lies in bytes.

    Attributes:
        shape: Its shape.
        stored: The dtype that its bytes are read as, in their byte order.
        dtype: The dtype that they mean, in native byte order.
        fortran: Whether the first index runs fastest, where that makes a difference.
        start: How many bytes come before the first element.
    """

    shape: tuple[int, ...]
    stored: np.dtype[Any]
    dtype: np.dtype[Any]
    fortran: bool = False
    start: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the elements."""
        return self.size * self.stored.itemsize


def read_layout(stream: IO[bytes], size: int, dtype: np.dtype[Any] | None, shown: str) -> Layout:
    """Read an npy header.

    Args:
        stream: At the first byte; it is then at the first element.
        size: How many bytes there are, header and elements.
        dtype: What the elements are, where that is known from elsewhere.
        shown: What to call the array in messages.

    Returns:
        How the array lies in the bytes; its elements take all that are left of them.

    Raises:
        Damaged: It is not such a header.
        EOFError: The stream is shorter than a header.
    """
    head = read_exactly(stream, 8)
    require(
        head[:6] == MAGIC and head[6] in (1, 2, 3) and head[7] == 0,
        f"{shown}: not an npy array of version 1, 2 or 3",
    )
    width = 2 if head[6] == 1 else 4
    length = int.from_bytes(read_exactly(stream, width), "little")
    require(length <= _MOST_HEADER, f"{shown}: a header of {length} bytes")
    match = _HEADER.fullmatch(read_exactly(stream, length))
    if match is None:
        raise Damaged(f"{shown}: expected a header that describes an array of numbers")
    order, code, fortran, dims = (group.decode("ascii") for group in match.groups())
    stored = _stored_dtype(code, dtype, shown)
    meant = dtype if dtype is not None and is_extension(dtype) else stored.newbyteorder("=")
    if order == ">":
        stored = stored.newbyteorder(">")
    shape = tuple(int(dim) for dim in re.findall("[0-9]+", dims))
    columns = fortran == "True" and sum(dim != 1 for dim in shape) > 1
    layout = Layout(shape, stored, meant, columns, 8 + width + length)
    if len(shape) > MOST_DIMENSIONS or layout.nbytes != size - layout.start:
        raise Damaged(
            f"{shown}: its header says {shape} of {stored}, {layout.nbytes} bytes, and "
            f"{size - layout.start} are there"
        )
    check_shape(shape, shown)
    return layout


def fits(shape: tuple[int, ...]) -> bool:
    """Whether an array of any dtype can have a shape.

    Args:
        shape: The shape.

    Returns:
        False if it has too many lengths, or those but zero come to more than any memory: an array
        without elements may lie about all lengths but one.
    """
    size = math.prod(length for length in shape if length) * _WIDEST
    return len(shape) <= MOST_DIMENSIONS and size <= sys.maxsize


def check_shape(shape: tuple[int, ...], shown: str) -> None:
    """See that an array can have a shape.

    Args:
        shape: The shape.
        shown: What to call the array in messages.

    Raises:
        Damaged: None can.
    """
    require(fits(shape), f"{shown}: no array can have the shape {shape}")


def decoded(values: npt.NDArray[Any], layout: Layout, shown: str) -> npt.NDArray[Any]:
    """Elements as they were read, turned into what they mean.

    Args:
        values: One dimension, of the dtype ``layout.stored``; may be overwritten.
        layout: How they lay.
        shown: What to call the array in messages.

    Returns:
        The elements, in the same memory, as ``layout.dtype``.

    Raises:
        Damaged: A truth value is neither 0 nor 1.
    """
    if not values.dtype.isnative:
        values = values.byteswap(inplace=True).view(values.dtype.newbyteorder("="))
    if is_extension(layout.dtype):
        values = values.view(layout.dtype)
    require(
        values.dtype.kind != "b" or not (values.view(np.uint8) > 1).any(),
        f"{shown}: a truth value that is neither 0 nor 1",
    )
    return values


def encoded(values: npt.NDArray[Any]) -> memoryview:
    """Elements as they are written: in C order, each with its lowest byte first.

    Args:
        values: Any array; only read.

    Returns:
        Its bytes; in the array's own memory where they lie there so.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    if is_extension(flat.dtype):
        flat = flat.view(f"u{flat.dtype.itemsize}")
    return flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


def header_of(array: ArraySpec) -> bytes:
    """The npy header of an array that is written as by `encoded`.

    Args:
        array: Its shape and dtype.

    Returns:
        All that comes before the first element.
    """
    dtype = array.dtype
    descr = f"|V{dtype.itemsize}" if is_extension(dtype) else dtype.newbyteorder("<").str
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {array.shape}, }}"
    length = -(10 + len(header) + 1) % 64 + len(header) + 1
    text = header.ljust(length - 1).encode("ascii") + b"\n"
    return MAGIC + b"\x01\x00" + struct.pack("<H", length) + text


def read_exactly(stream: IO[bytes], length: int) -> bytes:
    """Read a number of bytes.

    Args:
        stream: Where from.
        length: How many.

    Returns:
        That many bytes.

    Raises:
        EOFError: There are fewer.
    """
    data = stream.read(length)
    if len(data) != length:
        raise EOFError(f"expected {length} more bytes, got {len(data)}")
    return data


def _stored_dtype(code: str, dtype: np.dtype[Any] | None, shown: str) -> np.dtype[Any]:
    """The dtype that an array's bytes are read as, given what header and index say."""
    if dtype is not None and is_extension(dtype):
        require(code == f"V{dtype.itemsize}", f"{shown}: {code} cannot hold {dtype}")
        return np.dtype(f"<u{dtype.itemsize}")
    require(code in _PLAIN_CODES, f"{shown}: expected an array of numbers, got dtype {code!r}")
    found: np.dtype[Any] = np.dtype("<" + code)
    if dtype is not None and dtype.newbyteorder("<") != found:
        raise Damaged(f"{shown}: the index says {dtype}, it is {found}")
    return found
