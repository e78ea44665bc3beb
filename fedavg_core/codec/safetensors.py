"""The safetensors format, read and written with NumPy alone.

A file is the length of its header (8 bytes, the lowest first), the header, and the elements of all
tensors, in C order, each with its lowest byte first. The header is a JSON object that gives each
tensor's dtype, shape, and the first and last offset of its elements.

A header is checked before it is believed. It is an object of tensors and of nothing else but a
string-to-string `__metadata__`; no two have one name; the elements of each take just the bytes that
its dtype and shape account for; and all together they fill the rest of the file without a hole or
an overlap. What the format knows and an average does not (truth values, complex numbers, scales,
elements of less than a byte) is refused like any other array that holds no real numbers.

Tensors are written in falling order of element size, so that each is aligned in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fedavg_core.codec.archive import Damaged, require
from fedavg_core.codec.npy import Layout, check_shape, encoded, read_exactly
from fedavg_core.errors import Reason, RefusedUpdate, UsageError, quoted
from fedavg_core.model import ArraySpec, dtype_named, is_extension

__all__ = ["SafetensorsWriter", "aligned", "list_safetensors"]

_MOST_HEADER = 100_000_000
_METADATA = "__metadata__"
_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
_CODES = {name: code for code, name in _DTYPES.items()}
_NOT_AVERAGED = {"BOOL", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"}


def list_safetensors(file: IO[bytes], size: int, limit: int) -> dict[str, Layout]:
    """What a safetensors file holds.

    Args:
        file: The file, open for reading in binary.
        size: Its length.
        limit: The longest header to read.

    Returns:
        How each tensor lies in the file, in the order of the header; ``start`` counts from the
        beginning of the file.

    Raises:
        Damaged: It is no such file, or its header is not as it should be.
        ValueError, RecursionError, EOFError: The same, by what reads it.
        RefusedUpdate: A tensor holds something else than real numbers (DTYPE).
    """
    file.seek(0)
    length = int.from_bytes(read_exactly(file, 8), "little")
    require(
        length <= min(_MOST_HEADER, size - 8),
        f"no safetensors file, or damaged: it begins with a header length of {length} bytes, "
        f"and the file has {size}",
    )
    require(length <= limit, f"its header has {length} bytes; the limit is {limit}")
    text = read_exactly(file, length)
    require(text[:1] == b"{", "no safetensors file, or damaged: its header is no JSON object")
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    metadata = header.pop(_METADATA, {})
    require(
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()),
        "its metadata is not made of strings",
    )
    layouts: dict[str, Layout] = {}
    spans: list[tuple[int, int, str]] = []
    refused: dict[str, str] = {}
    for name, entry in header.items():
        name.encode("utf-8")  # a lone surrogate is a ValueError
        code, shape, begin, end = _entry(name, entry)
        spans.append((begin, end, name))
        if code in _NOT_AVERAGED:
            refused[name] = code
        else:
            layouts[name] = _layout(name, code, shape, begin, end, 8 + length)
    position = 0
    for begin, end, name in sorted(spans):
        require(
            begin == position and end >= begin,
            f"tensor {quoted(name)}: takes the bytes from {begin} to {end}, and the one before it "
            f"ends at {position}",
        )
        position = end
    require(
        8 + length + position == size,
        f"its tensors end at byte {8 + length + position}, and the file at {size}",
    )
    for name, code in refused.items():
        raise RefusedUpdate(
            Reason.DTYPE, key=name, expected="an array of real numbers", got=f"dtype {code}"
        )
    return layouts


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    require(len(result) == len(pairs), "two entries of its header have one name")
    return result


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """The fields of a tensor's entry, each of the type that it should have."""
    shown = f"tensor {quoted(name)}"
    require(
        isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"},
        f"{shown}: expected dtype, shape and data_offsets, got {quoted(entry)}",
    )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    require(
        isinstance(shape, list) and len(shape) <= 32 and all(_is_length(dim) for dim in shape),
        f"{shown}: its shape is {quoted(shape)}",
    )
    require(
        isinstance(offsets, list) and len(offsets) == 2 and all(_is_length(at) for at in offsets),
        f"{shown}: its offsets are {quoted(offsets)}",
    )
    require(
        isinstance(code, str) and (code in _DTYPES or code in _NOT_AVERAGED),
        f"{shown}: its dtype is {quoted(code)}, which is not one of the format",
    )
    return code, tuple(shape), offsets[0], offsets[1]


def _is_length(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _layout(
    name: str, code: str, shape: tuple[int, ...], begin: int, end: int, start: int
) -> Layout:
    try:
        dtype = dtype_named(_DTYPES[code])
    except UsageError as problem:
        raise Damaged(f"tensor {quoted(name)}: {problem}") from None
    length = math.prod(shape) * dtype.itemsize
    require(
        end - begin == length,
        f"tensor {quoted(name)}: {list(shape)} of {code} takes {length} bytes, and its offsets "
        f"give it {end - begin}",
    )
    check_shape(shape, f"tensor {quoted(name)}")
    plain = np.dtype(f"u{dtype.itemsize}") if is_extension(dtype) else dtype
    return Layout(shape, plain.newbyteorder("<"), dtype, start=start + begin)


def aligned(spec: Mapping[str, ArraySpec]) -> list[str]:
    """The order in which tensors are written.

    Args:
        spec: The tensors.

    Returns:
        Their names, those of larger elements first, and else as they were.
    """
    return sorted(spec, key=lambda name: -spec[name].dtype.itemsize)


class SafetensorsWriter:
    """Writes a safetensors file whose tensors come in pieces, in the order of `aligned`.

    A context manager, as `NpzWriter` is.

    Args:
        file: An empty file, open for writing in binary.
        spec: The tensors that will come.

    Raises:
        UsageError: The format does not have a tensor's dtype, or cannot have its name.
    """

    def __init__(self, file: IO[bytes], spec: Mapping[str, ArraySpec]) -> None:
        header = {}
        position = 0
        for name in aligned(spec):
            array = spec[name]
            code = _CODES.get(array.dtype.name)
            if code is None:
                raise UsageError(
                    f"key {quoted(name)}: a safetensors file cannot hold dtype {array.dtype}"
                )
            if name == _METADATA or not _is_unicode(name):
                raise UsageError(f"a safetensors file cannot hold a key {quoted(name)}")
            end = position + math.prod(array.shape) * array.dtype.itemsize
            header[name] = {
                "dtype": code,
                "shape": list(array.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._file = file
        self._header = len(text).to_bytes(8, "little") + text
        self._left = [math.prod(spec[name].shape) for name in reversed(aligned(spec))]

    def write(self, values: npt.NDArray[Any]) -> None:
        """Write the next elements.

        Args:
            values: Some or all elements of one tensor, in C order after those before them, in the
                dtype that was announced; only read. Tensors without elements need not come.

        Raises:
            UsageError: These are more elements than are left of a tensor.
        """
        while values.size and self._left and not self._left[-1]:
            self._left.pop()
        if values.size > (self._left[-1] if self._left else 0):
            raise UsageError("expected the elements of the tensors in their order, got others")
        if values.size:
            self._left[-1] -= values.size
        self._file.write(encoded(values))

    def __enter__(self) -> SafetensorsWriter:
        self._file.write(self._header)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """See that all tensors have come; the file's end is that of the last one."""
        if kind is None and any(self._left):
            raise UsageError("expected all elements of the tensors, got less")


def _is_unicode(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
