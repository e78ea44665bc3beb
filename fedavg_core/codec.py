"""Named arrays to bytes and back: an npz file with a table of contents and a checksum.

What is written is an ordinary npz file, that is a zip of npy members, which plain `numpy.load`
opens. Three things make it a file that can be trusted:

* A member `fedavg.json` names each array, the member that holds it and its dtype, and carries the
  caller's own JSON. Array names are free: one that would look like a path, or like anything but a
  plain word, is stored under a number, so no name ever becomes a file name. The dtypes of
  `ml_dtypes` (bfloat16 and the float8 kinds), which npy cannot tell from raw bytes, are kept by
  name; the package is imported only to read such an array.
* It is sealed (see `archive`): a flipped bit anywhere, a missing tail or a byte too many is found.
* Nothing is compressed, dates are fixed and the order is the caller's: equal arrays and JSON give
  equal bytes.

Other people's npz files (of `numpy.savez` and `numpy.savez_compressed`) are read too, with what
checks they carry. No size is believed before memory is asked for: the container is checked first
(see `archive`), then each array's header, which must be the literal that NumPy writes, for an array
of numbers that takes just the bytes that its member has. Pickles are not read, and nothing in a
file is evaluated.

Whatever the bytes, what comes out is the right arrays or a `CheckpointError`, never another error.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.archive import BLOCK, Damaged, check_archive, require, seal, unsealed_comment
from fedavg_core.errors import CheckpointError, UsageError, quoted
from fedavg_core.model import Params, dtype_named, number_format

__all__ = ["read_npz", "write_npz"]

_FORMAT = 1
_INDEX = "fedavg.json"
_MOST_INDEX = 1 << 26
_MOST_HEADER = 10_000
_DEFAULT_LIMIT = 1 << 36
_PLAIN_CODES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_PLAIN_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
_NUMBERED = re.compile(r"array-[0-9]+")
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|])([a-zA-Z][0-9]{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,19}(?:, |,(?=\))|(?=\))))*)\), \} *\n"
)
_Entry: TypeAlias = tuple[str, str, "np.dtype[Any] | None"]
"""An array's name, the member that holds it, and its dtype where the index tells."""


def write_npz(file: IO[bytes], arrays: Params, meta: Mapping[str, Any] | None = None) -> None:
    """Write arrays, and JSON that goes with them.

    Args:
        file: An empty file, open for reading and writing in binary.
        arrays: From any name to an array of bool, integers or floats of up to 64 bits, the kinds
            of `ml_dtypes` among them; only read.
        meta: What JSON can hold.

    Raises:
        UsageError: A name is no string, an array is of another dtype, or the meta is not for JSON.
        OSError: As the file raises it.
    """
    entries = []
    for number, (name, array) in enumerate(arrays.items()):
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise UsageError(
                f"expected arrays under names that are strings, got {quoted(name)} with an object "
                f"of type {quoted(type(array).__name__)}"
            )
        if _dtype_name(array.dtype) is None:
            raise UsageError(
                f"key {quoted(name)}: expected an array of bool, integers or floats of up to "
                f"64 bits, got dtype {quoted(str(array.dtype))}"
            )
        plain = len(name) <= 200 and _PLAIN_NAME.fullmatch(name) and not _NUMBERED.match(name)
        member = f"{name if plain else f'array-{number}'}.npy"
        entries.append({"name": name, "member": member, "dtype": _dtype_name(array.dtype)})
    try:
        index = json.dumps({"format": _FORMAT, "meta": dict(meta or {}), "arrays": entries})
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"expected meta that JSON can hold: {quoted(str(error))}") from error
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = unsealed_comment()
        archive.writestr(zipfile.ZipInfo(_INDEX), index)
        for entry, array in zip(entries, arrays.values(), strict=True):
            with archive.open(zipfile.ZipInfo(str(entry["member"])), "w", force_zip64=True) as out:
                _write_npy(out, array)
    seal(file)


def read_npz(
    file: IO[bytes], *, own: bool = False, limit: int = _DEFAULT_LIMIT
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read what `write_npz` wrote, or another program's npz file.

    Args:
        file: A seekable file, open for reading in binary.
        own: Whether to refuse a file that `write_npz` did not write.
        limit: The most bytes of arrays to make.

    Returns:
        The arrays, as new memory in C order (or in Fortran order where they were written so) and
        in native byte order, and the meta: empty for another program's file.

    Raises:
        CheckpointError: The bytes are damaged, are not what they claim to be, or ask for more than
            the limit.
    """
    name = str(getattr(file, "name", "<bytes>"))
    try:
        sealed = check_archive(file, limit)
        require(
            sealed or not own, "damaged, or not written by fedavg-core: its checksum is missing"
        )
        with zipfile.ZipFile(file) as archive:
            members = {member.filename: member for member in archive.infolist()}
            index = members.pop(_INDEX, None)
            require((index is not None) == sealed, "either its index or its checksum is missing")
            if index is not None:
                entries, meta = _read_index(archive, index, set(members))
            else:
                entries, meta = [(_stem(member), member, None) for member in members], {}
            return {
                name: _read_array(archive, members[member], dtype)
                for name, member, dtype in entries
            }, meta
    except Damaged as problem:
        raise CheckpointError(name, str(problem)) from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        NotImplementedError,
        OSError,
        OverflowError,
        RecursionError,
        RuntimeError,
        ValueError,
    ) as error:
        raise CheckpointError(name, f"unreadable ({quoted(str(error), 200)})") from error


def _dtype_name(dtype: np.dtype[Any]) -> str | None:
    """The name that a dtype is kept under; None for one that is not written."""
    if dtype.kind != "b" and number_format(dtype) is None:
        return None
    return str(dtype.name)


def _dtype_named(name: object) -> np.dtype[Any]:
    """The dtype that a file names, in native byte order."""
    if name == "bool":
        return np.dtype(np.bool_)
    if not isinstance(name, str):
        raise Damaged(f"a dtype's name is {quoted(name)}")
    try:
        return dtype_named(name)
    except UsageError as problem:
        raise Damaged(str(problem)) from None


def _is_extension(dtype: np.dtype[Any]) -> bool:
    return dtype.kind != "b" and dtype.type.__module__ == "ml_dtypes"


def _write_npy(out: IO[bytes], array: npt.NDArray[Any]) -> None:
    flat = np.ascontiguousarray(array).reshape(-1)
    size = array.dtype.itemsize
    if _is_extension(array.dtype):
        flat = flat.view(f"u{size}")
        descr = f"|V{size}"
    else:
        descr = array.dtype.newbyteorder("<").str
    flat = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {array.shape}, }}"
    length = -(10 + len(header) + 1) % 64 + len(header) + 1
    out.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", length))
    out.write(header.ljust(length - 1).encode("ascii") + b"\n")
    view = flat.view(np.uint8).data
    for start in range(0, len(view), BLOCK):
        out.write(view[start : start + BLOCK])


def _stem(member: str) -> str:
    """The array's name that a member of another program's file stands for."""
    require(member.endswith(".npy"), f"member {quoted(member)}: expected an array, a .npy")
    return member[: -len(".npy")]


def _read_index(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, members: set[str]
) -> tuple[list[_Entry], dict[str, Any]]:
    require(member.file_size <= _MOST_INDEX, "its index is too long")
    index = json.loads(archive.read(member))
    require(isinstance(index, dict), "its index is no JSON object")
    version, meta, listed = (index.get(field) for field in ("format", "meta", "arrays"))
    require(version == _FORMAT, f"its format is {quoted(version)}; this version reads {_FORMAT}")
    require(isinstance(meta, dict) and isinstance(listed, list), "its index is incomplete")
    entries: list[_Entry] = []
    for entry in listed:
        require(
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("member"), str),
            "its index is incomplete",
        )
        entries.append((entry["name"], entry["member"], _dtype_named(entry.get("dtype"))))
    require(
        len({name for name, *_ in entries}) == len(entries) == len(members)
        and {member for _, member, _ in entries} == members,
        "its index lists other arrays than it holds",
    )
    return entries, meta


def _read_array(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, dtype: np.dtype[Any] | None
) -> npt.NDArray[Any]:
    shown = f"member {quoted(member.filename)}"
    with archive.open(member) as stream:
        head = _exactly(stream, 8)
        require(
            head[:6] == b"\x93NUMPY" and head[6] in (1, 2, 3) and head[7] == 0,
            f"{shown}: not an npy array of version 1, 2 or 3",
        )
        width = 2 if head[6] == 1 else 4
        length = int.from_bytes(_exactly(stream, width), "little")
        require(length <= _MOST_HEADER, f"{shown}: a header of {length} bytes")
        match = _NPY_HEADER.fullmatch(_exactly(stream, length))
        if match is None:
            raise Damaged(f"{shown}: expected a header that describes an array of numbers")
        order, code, fortran, dims = (group.decode("ascii") for group in match.groups())
        stored = _stored_dtype(code, dtype, shown)
        if order == ">":
            stored = stored.newbyteorder(">")
        shape = tuple(int(dim) for dim in re.findall("[0-9]+", dims))
        count = math.prod(shape)
        left = member.file_size - 8 - width - length
        require(
            len(shape) <= 32 and count * stored.itemsize == left,
            f"{shown}: its header says {quoted(shape)} of {stored}, "
            f"{count * stored.itemsize} bytes, and {left} are there",
        )
        flat = np.empty(count, dtype=stored)
        view = flat.view(np.uint8).data
        for start in range(0, left, BLOCK):
            view[start : start + BLOCK] = _exactly(stream, min(BLOCK, left - start))
        stream.read(1)  # where the checksum of the member is compared
    if not flat.dtype.isnative:
        flat = flat.byteswap(inplace=True).view(flat.dtype.newbyteorder("="))
    if dtype is not None and _is_extension(dtype):
        flat = flat.view(dtype)
    require(
        flat.dtype.kind != "b" or not (flat.view(np.uint8) > 1).any(),
        f"{shown}: a truth value that is neither 0 nor 1",
    )
    return flat.reshape(shape[::-1]).T if fortran == "True" else flat.reshape(shape)


def _stored_dtype(code: str, dtype: np.dtype[Any] | None, shown: str) -> np.dtype[Any]:
    """The dtype that an array's bytes are read as, given what the header and the index say."""
    if dtype is not None and _is_extension(dtype):
        require(code == f"V{dtype.itemsize}", f"{shown}: {code} cannot hold {dtype}")
        return np.dtype(f"<u{dtype.itemsize}")
    require(
        code in _PLAIN_CODES, f"{shown}: expected an array of numbers, got dtype {quoted(code)}"
    )
    found: np.dtype[Any] = np.dtype("<" + code)
    require(
        dtype is None or dtype.newbyteorder("<") == found,
        f"{shown}: the index says {dtype}, it is {found}",
    )
    return found


def _exactly(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) != length:
        raise EOFError("a member is shorter than it declares")
    return data
